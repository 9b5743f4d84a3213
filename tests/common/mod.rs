//! What the suites share: seeded inputs in every layout, f64 references, the comparison, the count.
//!
//! A suite is a `pub fn name(device: &Device)` in a module of this folder, so that the CPU tests and
//! `tests/gpu.rs` run the same tables:
//!
//! ```ignore
//! let mut tally = Tally::new("matmul", device);
//! for dims in [..] {
//!     let case = format!("{dims:?}");
//!     let mut source = Source::new(&case, device);
//!     tally.case(case, || close("c", &computed, &reference, |i| tolerance));
//! }
//! tally.finish();
//! ```
#![allow(dead_code)] // Each test binary uses a part.

pub mod attention;
pub mod epilogue;
pub mod errors;
pub mod matmul;
pub mod quantized;

use std::fmt::Display;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};

use candle_core::{D, DType, Device, Result, Tensor, bail};
use half::{bf16, f16};
use kaio_candle::Error;
use proptest::strategy::Strategy;
use proptest::test_runner::{Config, TestCaseError, TestRunner};

/// A test on a device for each suite of a module of this folder.
#[allow(unused_macros)] // As above.
macro_rules! tests_on {
    ($device:expr, $module:ident: $($suite:ident)*) => {$(
        #[test]
        fn $suite() {
            crate::common::$module::$suite(&$device);
        }
    )*};
}
#[allow(unused_imports)]
pub(crate) use tests_on;

/// A tensor's elements in f64, row-major, on the host: what references compute on.
#[derive(Clone, Debug)]
pub struct Nd {
    pub dims: Vec<usize>,
    pub data: Vec<f64>,
}

impl Nd {
    pub fn of(t: &Tensor) -> Result<Self> {
        let dims = t.dims().to_vec();
        if t.elem_count() == 0 {
            // candle reads an empty view at its offset, which may lie behind its storage.
            return Ok(Self { dims, data: Vec::new() });
        }
        let flat = t.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.flatten_all()?;
        Ok(Self { dims, data: flat.to_vec1()? })
    }

    pub fn full(dims: &[usize], value: f64) -> Self {
        Self { dims: dims.to_vec(), data: vec![value; dims.iter().product()] }
    }

    pub fn map(&self, f: impl Fn(f64) -> f64) -> Self {
        Self { dims: self.dims.clone(), data: self.data.iter().map(|&x| f(x)).collect() }
    }

    /// On the CPU.
    pub fn tensor(&self, dtype: DType) -> Result<Tensor> {
        Tensor::from_slice(&self.data, self.dims.as_slice(), &Device::Cpu)?.to_dtype(dtype)
    }

    /// The largest finite magnitude, 0 if there is none.
    pub fn peak(&self) -> f64 {
        self.data.iter().filter(|x| x.is_finite()).fold(0.0, |peak, x| peak.max(x.abs()))
    }

    /// The largest error of `got` where both are finite: what the plain formula is allowed.
    pub fn max_error(&self, got: &Tensor) -> Result<f64> {
        let got = Self::of(got)?;
        assert_eq!(got.dims, self.dims);
        let errors = got.data.iter().zip(&self.data).map(|(got, want)| got - want);
        Ok(errors.filter(|e| e.is_finite()).fold(0.0, |peak, e| peak.max(e.abs())))
    }

    /// The row-major offset of every matrix of `[.., rows, columns]` after its batch dimensions were
    /// broadcast to `batch`.
    pub fn matrices(&self, batch: &[usize]) -> Vec<usize> {
        let (own, matrix) = self.dims.split_at(self.dims.len() - 2);
        let size: usize = matrix.iter().product();
        let count: usize = batch.iter().product();
        let offset = |mut i: usize| {
            let (mut at, mut stride) = (0, size);
            for (axis, len) in batch.iter().enumerate().rev() {
                if let Some(&own) = (axis + own.len()).checked_sub(batch.len()).map(|j| &own[j]) {
                    at += i % len % own * stride;
                    stride *= own;
                }
                i /= len;
            }
            at
        };
        (0..count).map(offset).collect()
    }
}

/// The batch dimensions that two stacks of matrices broadcast to, and M, K, N.
fn sizes(a: &[usize], b: &[usize]) -> (Vec<usize>, [usize; 3]) {
    let ((a_batch, a), (b_batch, b)) = (a.split_at(a.len() - 2), b.split_at(b.len() - 2));
    let rank = a_batch.len().max(b_batch.len());
    let size = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |j| dims[j]);
    let wider = |i| if size(a_batch, i) == 1 { size(b_batch, i) } else { size(a_batch, i) };
    ((0..rank).map(wider).collect(), [a[0], a[1], b[1]])
}

/// candle's own product; candle takes any strides only in one batch dimension.
pub fn plain_product(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    let (batch, [m, k, n]) = sizes(a.dims(), b.dims());
    let full = |matrix: [usize; 2]| [batch.as_slice(), &matrix].concat();
    let count: usize = batch.iter().product();
    let a = a.broadcast_as(full([m, k]))?.reshape((count, m, k))?;
    let b = b.broadcast_as(full([k, n]))?.reshape((count, k, n))?;
    a.matmul(&b)?.reshape(full([m, n]))
}

/// `a·b` over `[.., M, K]` and `[.., K, N]`, batch dimensions broadcast.
pub fn product(a: &Nd, b: &Nd) -> Nd {
    let (batch, [m, k, n]) = sizes(&a.dims, &b.dims);
    let mut c = Nd::full(&[batch.as_slice(), &[m, n]].concat(), 0.0);
    for (i, (a0, b0)) in a.matrices(&batch).into_iter().zip(b.matrices(&batch)).enumerate() {
        for row in 0..m {
            let out = &mut c.data[(i * m + row) * n..][..n];
            for p in 0..k {
                let x = a.data[a0 + row * k + p];
                out.iter_mut().zip(&b.data[b0 + p * n..][..n]).for_each(|(sum, y)| *sum += x * y);
            }
        }
    }
    c
}

/// [`product`], and what the largest error of a result in f32 may be: twice that of candle's f32
/// product of `a` and `plain`, and what the order of a sum in f32 can change. `plain` is `b` in the
/// dtype in which the plain formula multiplies it.
pub fn product_within(a: &Nd, b: &Nd, plain: &Nd) -> Result<(Nd, f64)> {
    let want = product(a, b);
    let formula = plain_product(&a.tensor(DType::F32)?, &plain.tensor(DType::F32)?)?;
    let k = b.dims[b.dims.len() - 2] as f64;
    let order = ulp(DType::F32, 1.0) / 2.0 * k * a.peak() * b.peak();
    let allowed = 2.0 * want.max_error(&formula)? + order;
    Ok((want, allowed))
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

/// Checks 128 random problems as one case; a failure is shrunk to a small one.
pub fn property<S: Strategy>(
    tally: &mut Tally,
    problems: S,
    check: impl Fn(S::Value) -> Result<()>,
) {
    let config = Config { cases: 128, failure_persistence: None, ..Config::default() };
    tally.case("128 random problems", || {
        let check = |problem| check(problem).map_err(|e| TestCaseError::fail(e.to_string()));
        TestRunner::new(config).run(&problems, check).map_err(candle_core::Error::msg)
    });
}

/// The distance from |x| to the next larger number of a float dtype.
pub fn ulp(dtype: DType, x: f64) -> f64 {
    let (digits, least) = match dtype {
        DType::F16 => (10, -14),
        DType::BF16 => (7, -126),
        _ => (23, -126),
    };
    // The exponent as it stands in the number.
    let exponent = (x.to_bits() >> 52 & 0x7ff) as i32 - 1023;
    2f64.powi(exponent.clamp(least, 127) - digits)
}

/// Rounds to a float dtype.
pub fn round(dtype: DType, x: f64) -> f64 {
    match dtype {
        DType::F16 => f16::from_f64(x).to_f64(),
        DType::BF16 => bf16::from_f64(x).to_f64(),
        DType::F32 => f64::from(x as f32),
        _ => x,
    }
}

/// Fails with the first element of `got` further than `tol(index)` from the reference. NaN wants
/// NaN; what the dtype of `got` can only hold as an infinity wants that infinity.
pub fn close(what: &str, got: &Tensor, want: &Nd, tol: impl Fn(usize) -> f64) -> Result<()> {
    if got.dims() != want.dims {
        bail!("{what} has shape {:?}, wanted {:?}", got.dims(), want.dims);
    }
    for (i, (got_i, &want_i)) in Nd::of(got)?.data.into_iter().zip(&want.data).enumerate() {
        let rounded = round(got.dtype(), want_i);
        let same = got_i == rounded || (got_i.is_nan() && want_i.is_nan());
        let near = want_i.is_finite() && (got_i - want_i).abs() <= tol(i);
        if !same && !near {
            let at = coordinate(i, &want.dims);
            bail!("{what}{at:?} is {got_i:e}, wanted {want_i:e} to within {:e}", tol(i));
        }
    }
    Ok(())
}

/// Fails unless both tensors hold the same bits.
pub fn identical(what: &str, got: &Tensor, want: &Nd) -> Result<()> {
    let got = Nd::of(got)?;
    let differs = |(a, b): (&f64, &f64)| a.to_bits() != b.to_bits();
    if let Some(i) = got.data.iter().zip(&want.data).position(differs) {
        bail!("{what}{:?} is {}, was {}", coordinate(i, &want.dims), got.data[i], want.data[i]);
    }
    Ok(())
}

fn coordinate(mut i: usize, dims: &[usize]) -> Vec<usize> {
    let mut at = vec![0; dims.len()];
    for (at, len) in at.iter_mut().zip(dims).rev() {
        *at = i % len;
        i /= len;
    }
    at
}

/// How a tensor's elements lie in its storage. All but `Plain` and the transposed ones leave gaps or
/// repeat elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// Contiguous.
    Plain,
    /// The last two dimensions swapped.
    Transposed,
    /// The middle of a larger tensor, at an odd offset.
    Narrowed,
    /// Every second row.
    Rows,
    /// Every second column.
    Columns,
    /// One row repeated.
    Repeated,
    /// One matrix repeated over the batch.
    Expanded,
    /// The rows outside of the last batch dimension, as `[B, S, H, D]` read as `[B, H, S, D]`.
    Permuted,
}

impl Layout {
    pub const ALL: [Self; 8] = [
        Self::Plain,
        Self::Transposed,
        Self::Narrowed,
        Self::Rows,
        Self::Columns,
        Self::Repeated,
        Self::Expanded,
        Self::Permuted,
    ];

    /// The shape of the storage in which a tensor of shape `dims` lies so.
    pub fn base(self, dims: &[usize]) -> Vec<usize> {
        let (mut base, r) = (dims.to_vec(), dims.len());
        match self {
            Self::Plain => {}
            Self::Transposed => base.swap(r - 2, r - 1),
            Self::Narrowed => base[r - 2..].iter_mut().for_each(|len| *len += 2),
            Self::Rows => base.insert(r - 1, 2),
            Self::Columns => base.push(2),
            Self::Repeated => base[r - 2] = 1,
            Self::Expanded => base[..r - 2].fill(1),
            Self::Permuted if r == 2 => {}
            Self::Permuted => base.swap(r - 3, r - 2),
        }
        base
    }

    /// The tensor of shape `dims` in that storage.
    pub fn view(self, base: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let r = dims.len();
        match self {
            Self::Plain => Ok(base.clone()),
            Self::Transposed => base.t(),
            Self::Narrowed => base.narrow(r - 2, 1, dims[r - 2])?.narrow(r - 1, 1, dims[r - 1]),
            Self::Rows => base.narrow(r - 1, 1, 1)?.squeeze(r - 1),
            Self::Columns => base.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1),
            Self::Repeated | Self::Expanded => base.broadcast_as(dims),
            Self::Permuted if r == 2 => Ok(base.clone()),
            Self::Permuted => base.transpose(r - 3, r - 2),
        }
    }
}

/// A reproducible source of inputs: the same for the same case on every device.
pub struct Source {
    state: u64,
    device: Device,
}

impl Source {
    pub fn new(case: &str, device: &Device) -> Self {
        let fnv = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        Self { state: case.bytes().fold(0xcbf2_9ce4_8422_2325, fnv), device: device.clone() }
    }

    /// SplitMix64.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly in −1..1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Like [`unit`](Self::unit), with now and then an infinity, a NaN, a zero or f16's largest.
    pub fn special(&mut self) -> f64 {
        match self.bits() % 64 {
            0 => f64::INFINITY,
            1 => f64::NEG_INFINITY,
            2 => f64::NAN,
            3 => 0.0,
            4 => 65504.0,
            _ => self.unit(),
        }
    }

    /// A tensor of this shape, dtype and layout: floats in −1..1, integers of any value. What the
    /// view does not show is NaN, or for integers a fixed odd number.
    pub fn tensor(&mut self, dtype: DType, dims: &[usize], layout: Layout) -> Result<Tensor> {
        match dtype {
            DType::U8 => self.tensor_of(dtype, dims, layout, |s| f64::from(s.bits() as u8)),
            DType::U32 => self.tensor_of(dtype, dims, layout, |s| f64::from(s.bits() as u32)),
            _ => self.tensor_of(dtype, dims, layout, Self::unit),
        }
    }

    /// [`tensor`](Self::tensor) with elements from `element`.
    pub fn tensor_of(
        &mut self,
        dtype: DType,
        dims: &[usize],
        layout: Layout,
        mut element: impl FnMut(&mut Self) -> f64,
    ) -> Result<Tensor> {
        let base = layout.base(dims);
        let count = base.iter().product::<usize>();
        let places = Tensor::from_vec((0..count as u32).collect(), base.as_slice(), &Device::Cpu)?;
        let places = Nd::of(&layout.view(&places, dims)?)?;
        let hidden = if dtype.is_int() { 77.0 } else { f64::NAN };
        let mut data = vec![hidden; count];
        for place in places.data {
            data[place as usize] = element(self);
        }
        let base = Tensor::from_vec(data, base.as_slice(), &Device::Cpu)?;
        layout.view(&base.to_dtype(dtype)?.to_device(&self.device)?, dims)
    }
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

/// Counts cases; failures are collected and reported together, each under its case's name.
pub struct Tally {
    suite: &'static str,
    device: Device,
    ran: usize,
    not_applicable: usize,
    skipped: usize,
    failed: Vec<String>,
}

impl Tally {
    pub fn new(suite: &'static str, device: &Device) -> Self {
        let device = device.clone();
        Self { suite, device, ran: 0, not_applicable: 0, skipped: 0, failed: Vec::new() }
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

    /// Notes a case that should run but cannot on this machine.
    pub fn skip(&mut self, why: impl Display) {
        self.say(&format!("skipped: {why}"));
        self.skipped += 1;
    }

    /// Says why none of the suite's cases applies to the device.
    pub fn inapplicable(self, why: impl Display) {
        self.say(&format!("does not apply: {why}"));
    }

    /// Prints the count, past the test harness's capture.
    pub fn finish(self) {
        let Self { ran, not_applicable, skipped, .. } = self;
        self.say(&format!("{ran} ran, {not_applicable} did not apply, {skipped} skipped"));
        let shown = self.failed.iter().take(20).cloned().collect::<Vec<_>>().join("\n  ");
        assert!(self.failed.is_empty(), "{} cases failed:\n  {shown}", self.failed.len());
        let strict = std::env::var("KAIO_REQUIRE_GPU").is_ok_and(|v| v == "1");
        assert!(!strict || skipped == 0, "{skipped} cases skipped under KAIO_REQUIRE_GPU=1");
        assert!(ran > 0, "no case ran");
    }

    fn say(&self, text: &str) {
        writeln!(std::io::stderr(), "suite {}: {text}", self.suite).expect("stderr is open");
    }
}
