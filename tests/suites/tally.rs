//! How a suite runs its cases and counts them.

use std::fmt::Display;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor};
use kaio_candle::Error;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// Counts cases; failures are collected and reported together, each under its case's name.
pub struct Tally {
    suite: &'static str,
    device: Device,
    ran: usize,
    not_applicable: usize,
    failed: Vec<String>,
}

impl Tally {
    pub fn new(suite: &'static str, device: &Device) -> Self {
        let device = device.clone();
        Self { suite, device, ran: 0, not_applicable: 0, failed: Vec::new() }
    }

    /// Runs a case. A panic fails it; what a GPU engine honestly refuses does not apply.
    pub fn case(&mut self, name: impl Display, run: impl FnOnce() -> Result<()>) {
        for elements in [1 << 8, 1 << 13, 1 << 18] {
            poison(&self.device, elements);
        }
        match catch_unwind(AssertUnwindSafe(run)) {
            Ok(Ok(())) => self.ran += 1,
            Ok(Err(e))
                if !self.device.is_cpu()
                    && matches!(Error::of(&e), Some(Error::Unsupported { .. })) =>
            {
                self.not_applicable += 1;
            }
            // Without the backtrace that candle may add.
            Ok(Err(e)) => {
                let text = e.to_string();
                let lines: Vec<_> = text.lines().take_while(|l| !l.contains("   0: ")).collect();
                let failure = format!("{name}: {}", lines.join("\n    "));
                // At once: what follows may hang.
                if self.failed.len() < 3 {
                    self.say(&failure);
                }
                self.failed.push(failure);
            }
            Err(_) => self.failed.push(format!("{name}: panicked, see above")),
        }
    }

    /// Says why none of the suite's cases applies to the device.
    pub fn inapplicable(self, why: impl Display) {
        self.say(&format!("does not apply: {why}"));
    }

    /// Prints the count.
    pub fn finish(self) {
        let Self { ran, not_applicable, .. } = self;
        self.say(&format!("{ran} ran, {not_applicable} did not apply"));
        let shown = self.failed.iter().take(20).cloned().collect::<Vec<_>>().join("\n  ");
        assert!(self.failed.is_empty(), "{} cases failed:\n  {shown}", self.failed.len());
        assert!(ran > 0, "no case ran");
    }

    /// Prints, past the test harness's capture.
    pub fn say(&self, text: &str) {
        writeln!(std::io::stderr(), "suite {}: {text}", self.suite).expect("stderr is open");
    }
}

/// Checks so many random problems as one case; a failure is shrunk to a small one.
pub fn property<S: Strategy>(
    tally: &mut Tally,
    cases: usize,
    problems: S,
    check: impl Fn(S::Value) -> Result<()>,
) {
    let config = Config { cases: cases as u32, failure_persistence: None, ..Config::default() };
    tally.case(format!("{cases} random problems"), || {
        let check = |problem| check(problem).map_err(|e| TestCaseError::fail(e.to_string()));
        TestRunner::new(config).run(&problems, check).map_err(candle_core::Error::msg)
    });
}

/// How many random problems are checked: on a GPU `KAIO_RANDOM_CASES`, or as many as take about a minute.
pub fn random_cases(device: &Device, on_cpu: usize, on_gpu: usize) -> usize {
    let asked = || std::env::var("KAIO_RANDOM_CASES").ok().and_then(|n| n.parse().ok());
    if device.is_cpu() { on_cpu } else { asked().unwrap_or(on_gpu) }
}

/// Every pair, the second member changing fastest.
pub fn pairs<A: Copy, B: Copy>(
    a: impl IntoIterator<Item = A>,
    b: impl IntoIterator<Item = B>,
) -> std::vec::IntoIter<(A, B)> {
    let b: Vec<B> = b.into_iter().collect();
    let pairs: Vec<_> = a.into_iter().flat_map(|a| b.iter().map(move |&b| (a, b))).collect();
    pairs.into_iter()
}

/// Leaves NaN in the GPU memory that the next allocations of about this size get.
pub fn poison(device: &Device, elements: usize) {
    if !device.is_cpu() {
        let nan = |_| Tensor::full(f32::NAN, elements, device).expect("memory for a few tensors");
        drop((0..8).map(nan).collect::<Vec<_>>());
    }
}

/// `KAIO_RESULTS_ALONE=1`: no gradients, and the plain formula on the CPU, so that on the device nothing but
/// this crate's kernels runs where a table can do without. For tools that stumble over others: the
/// emulator, which has no cuBLAS, and initcheck, which takes what TMA stores for uninitialised.
pub fn results_alone() -> bool {
    std::env::var_os("KAIO_RESULTS_ALONE").is_some_and(|value| value == "1")
}

/// Where the plain formula is computed for results on a device.
pub fn plain_on(device: &Device) -> Device {
    if results_alone() { Device::Cpu } else { device.clone() }
}

/// A backward pass from the sum of a tensor's elements. candle begins one with a tensor of ones, which its CUDA kernels
/// cannot fill where there are none.
pub fn backward_of_sum(t: &Tensor) -> Result<GradStore> {
    if t.elem_count() == 0 { t.sum_all()?.backward() } else { t.backward() }
}
