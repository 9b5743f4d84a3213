//! The rounding of activations.

use kaio_candle::kernel::quantize::{Arguments, Config as Quantize, Plan, Problem};
use kaio_candle::kernel::{Config, Element};
use kaio_candle::ptx::Factor;

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct Quantizers;

impl Family for Quantizers {
    type Problem = Problem;
    type Plan = Plan;

    /// All types, rows and groups, at any addresses and at multiples of 16 bytes.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for element in [F16, BF16, Element::F32] {
            for code in [Factor::S8, Factor::E4m3] {
                const COLS: [u64; 9] = [1, 8, 64, 136, 1001, 4096, 28_672, 65_536, 131_071];
                for (rows, cols) in cross(&[1, 300], &COLS) {
                    for (width, aligned) in
                        [(cols.min(128), true), (cols.min(128), false), (cols, true), (cols, false)]
                    {
                        all.push(Problem { rows, cols, width, element, code, aligned });
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Quantize(config) = kernel else { return another() };
        let held = config.team * config.chunks * config.element.per_chunk();
        let of_chunks = problem.cols.is_multiple_of(config.element.per_chunk().into());
        rule(config.long || u64::from(held) >= problem.width, "lines that are longer")?;
        rule(!config.whole || problem.aligned && of_chunks, "a line's end")
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
        let of = |element, code, team, chunks| {
            let (long, whole, rounds) = (false, true, true);
            Quantize { element, code, team, chunks, long, whole, rounds }
        };
        let odd = of(F16, Factor::E4m3, 16, 1);
        let long = of(BF16, Factor::S8, 1024, 4);
        vec![
            ("quantize_rows", of(BF16, Factor::S8, 256, 2).into()),
            ("quantize_groups", of(Element::F32, Factor::E4m3, 16, 2).into()),
            ("quantize_odd", Quantize { whole: false, rounds: false, ..odd }.into()),
            ("quantize_long", Quantize { long: true, ..long }.into()),
        ]
    }
}
