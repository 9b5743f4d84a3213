//! Copies of bytes.

use kaio_candle::kernel::Config;
use kaio_candle::kernel::strided::{self, Arguments, MOST_DIMS, Plan, Problem};

use super::{Extent, Family, Gpu, Used, addresses, another, passes, rule, within};

pub struct Copies;

impl Family for Copies {
    type Problem = Problem;
    type Plan = Plan;

    fn problems(_: Extent) -> Vec<Problem> {
        let sizes = |dims| [1, 4, 4099, 1 << 31].map(|bytes| Problem { bytes, dims });
        (1..=MOST_DIMS).flat_map(sizes).collect()
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Strided(config) = kernel else { return another() };
        rule(config.dims == problem.dims, "other dimensions")?;
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
        let dims = vec![(problem.bytes, 1); problem.dims];
        passes(
            plan,
            &Arguments { problem, input: address(), dims: &dims, out: address() },
            kernel,
            used,
        )
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        vec![("strided", strided::Config { dims: 3 }.into())]
    }
}
