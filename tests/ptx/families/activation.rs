//! Activations, their gradients, and sums of columns.

use kaio_candle::Activation;
use kaio_candle::kernel::activation::{self, Arguments, Plan, Problem, Work};
use kaio_candle::kernel::{Config, Element};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct Activations;

const ACTIVATIONS: [Activation; 4] =
    [Activation::Relu, Activation::GeluTanh, Activation::GeluErf, Activation::Silu];

/// Types of x, gradient and result.
const TYPES: [[Element; 3]; 6] = [
    [BF16, BF16, BF16],
    [F16, F16, F16],
    [Element::F32, Element::F32, Element::F32],
    [Element::F32, Element::F32, BF16],
    [F16, F16, Element::F32],
    [BF16, BF16, Element::F32],
];

impl Family for Activations {
    type Problem = Problem;
    type Plan = Plan;

    /// All functions and types, of a few rows and of many parts.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut works = vec![];
        for element in [BF16, F16, Element::F32] {
            works.extend([BF16, Element::F32].map(|sums| Work::Sums(element, sums)));
            works.extend(ACTIVATIONS.map(|act| Work::Apply(act, element)));
        }
        for act in ACTIVATIONS {
            for of in TYPES {
                let sums = [None, Some(BF16), Some(Element::F32)];
                works.extend(sums.map(|sums| Work::Gradient(act, of, sums)));
            }
        }
        let mut all = vec![];
        for work in works {
            for (rows, cols) in cross(&[1, 300, 16_384], &[1, 3, 8, 40, 4096, 50_257]) {
                all.extend([false, true].map(|aligned| Problem { rows, cols, work, aligned }));
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Activation(config) = kernel else { return another() };
        // Sums of parts always begin where a kernel can load them.
        let parts = matches!(config.work, Work::Sums(Element::F32, _));
        let whole = config.unit == 1 || problem.aligned || parts;
        rule(whole && problem.cols.is_multiple_of(config.unit.into()), "a row's end")
    }

    /// Of 256 threads with up to 128 registers.
    fn blocks_per_sm(_: &Config) -> u32 {
        2
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let mut address = addresses();
        let (before, out, sums) = match problem.work {
            Work::Apply(..) => (None, Some(address()), None),
            Work::Gradient(.., sums) => (Some(address()), Some(address()), sums.map(|_| address())),
            Work::Sums(..) => (None, None, Some(address())),
        };
        let parts = (plan.parts() > 0).then(&mut address);
        let input = (address(), problem.cols + 8);
        let arguments = Arguments { problem, plan, input, before, out, sums, parts };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let gradient = Work::Gradient(Activation::GeluErf, [BF16; 3], Some(Element::F32));
        let config = activation::Config { work: gradient, unit: 8, across: 32 };
        let sums = activation::Config { work: Work::Sums(Element::F32, BF16), unit: 4, across: 8 };
        vec![
            ("activation_gradient", Config::Activation(config)),
            ("activation_sums", Config::Activation(sums)),
        ]
    }
}
