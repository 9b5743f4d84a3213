//! Quantised weights in floats.

use kaio_candle::kernel::dequant::{self, Arguments, Codes, Plan, Problem};
use kaio_candle::kernel::{Config, Element};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct Dequants;

const CODES: [Codes; 2] = [Codes::Int8, Codes::E4m3];

impl Family for Dequants {
    type Problem = Problem;
    type Plan = Plan;

    /// All codes and types, of sizes that are and are not those of units.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for codes in CODES {
            for (scale, out) in [(F16, F16), (BF16, BF16), (Element::F32, F16), (F16, Element::F32)]
            {
                for (rows, cols) in cross(&[1, 300, 4096], &[1, 40, 4096, 50_257]) {
                    for aligned in [false, true] {
                        let group = [0, 1];
                        all.push(Problem { rows, cols, codes, scale, out, aligned, group });
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Dequant(config) = kernel else { return another() };
        let whole = config.unit == 1 || problem.aligned;
        rule(whole && problem.cols.is_multiple_of(config.unit.into()), "a line's end")
    }

    /// Of 256 threads, which is half of what most multiprocessors hold.
    fn blocks_per_sm(_: &Config) -> u32 {
        4
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let mut address = addresses();
        let arguments = Arguments {
            problem,
            plan,
            codes: (address(), problem.cols),
            scales: (address(), [problem.cols, 1]),
            out: address(),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let of =
            |codes, unit| Config::Dequant(dequant::Config { codes, scale: F16, out: BF16, unit });
        vec![("dequant_int8", of(Codes::Int8, 1)), ("dequant_e4m3", of(Codes::E4m3, 8))]
    }
}
