//! The rounding of activations.

use kaio_candle::kernel::quantize::{Arguments, Config as Quantize, Plan, Problem};
use kaio_candle::kernel::{Config, Device, Element};
use kaio_candle::ptx::Factor;

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct Quantizers;

impl Family for Quantizers {
    type Problem = Problem;
    type Plan = Plan;

    /// All types, whole rows and groups.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for element in [F16, BF16, Element::F32] {
            for code in [Factor::S8, Factor::E4m3] {
                for (rows, cols) in cross(&[1, 300], &[8, 64, 136, 1000, 4096, 28_672, 65_536]) {
                    for width in [128, cols] {
                        all.push(Problem { rows, cols, width, element, code });
                    }
                }
            }
        }
        all
    }

    fn applies(problem: &Problem, device: &Device) -> bool {
        problem.is_supported(device)
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Quantize(config) = kernel else { return another() };
        let held = config.team * config.chunks * config.element.per_chunk();
        rule(u64::from(held) >= problem.width.min(problem.cols), "lines that are longer")
    }

    /// Of as many threads as a multiprocessor can have with 64 registers each.
    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::Quantize(config) => 1024 / config.threads(),
            _ => 1,
        }
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let mut address = addresses();
        let input = (address(), problem.cols);
        let arguments = Arguments { problem, input, results: [address(), address()] };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let rows = Quantize { element: BF16, code: Factor::S8, team: 256, chunks: 2 };
        let groups = Quantize { element: Element::F32, code: Factor::E4m3, team: 16, chunks: 2 };
        vec![("quantize_rows", rows.into()), ("quantize_groups", groups.into())]
    }
}
