//! Words of checkpoints.

use kaio_candle::kernel::Config;
use kaio_candle::kernel::regroup::{Arguments, Config as Regroup, Plan, Problem};

use super::{Extent, Family, Gpu, Used, addresses, another, cross, passes, rule, within};

pub struct Regroupings;

impl Family for Regroupings {
    type Problem = Problem;
    type Plan = Plan;

    /// All kernels.
    fn problems(_: Extent) -> Vec<Problem> {
        let flags = [false, true];
        let mut configs = vec![Regroup::Sums];
        configs.extend(
            flags
                .into_iter()
                .flat_map(|across| flags.map(|ordered| Regroup::Words { across, ordered })),
        );
        let all = cross(&[1, 129, 8192], &[1, 33, 28_672]);
        all.flat_map(|(rows, cols)| {
            configs.clone().into_iter().map(move |config| Problem { rows, cols, config })
        })
        .collect()
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        let Config::Regroup(config) = kernel else { return another() };
        within(problem.limit())?;
        rule(*config == problem.config, "another kernel")
    }

    /// As many as hide the way from memory.
    fn blocks_per_sm(_: &Config) -> u32 {
        8
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
            input: (address(), [problem.cols, 1]),
            places: [0, 1, 2, 3, 4, 5, 6, 7],
            order: matches!(problem.config, Regroup::Words { ordered: true, .. })
                .then(&mut address),
            fill: 8,
            out: address(),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let words = |across, ordered| Regroup::Words { across, ordered }.into();
        vec![
            ("regroup_words", words(false, false)),
            ("regroup_across", words(true, true)),
            ("regroup_sums", Regroup::Sums.into()),
        ]
    }
}
