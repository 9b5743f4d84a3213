//! The transposition of bytes.

use kaio_candle::kernel::Config;
use kaio_candle::kernel::transpose::{self, Arguments, Plan, Problem};

use super::{Extent, Family, Gpu, Used, addresses, another, cross, passes, within};

pub struct Transpositions;

impl Family for Transpositions {
    type Problem = Problem;
    type Plan = Plan;

    fn problems(_: Extent) -> Vec<Problem> {
        const SIZES: [u64; 5] = [1, 16, 127, 4096, 50_257];
        cross(&SIZES, &SIZES).map(|(rows, cols)| Problem { rows, cols }).collect()
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Transpose(_) = kernel else { return another() };
        within(problem.limit())
    }

    /// As many as hide the way from memory.
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
        let input = (address(), problem.cols.next_multiple_of(16));
        passes(plan, &Arguments { problem, plan, input, out: address() }, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        vec![("transpose", transpose::Config.into())]
    }
}
