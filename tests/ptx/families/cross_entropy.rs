//! Cross-entropy.

use kaio_candle::kernel::cross_entropy::{
    Access, Arguments, Config as Rows, Pass, Plan, Problem, Reduced, Sum,
};
use kaio_candle::kernel::{Config, Element};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule};

pub struct CrossEntropies;

impl Family for CrossEntropies {
    type Problem = Problem;
    type Plan = Plan;

    /// All types, passes and layouts, in rows of a warp to those of many steps of a team.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        for element in [F16, BF16, Element::F32] {
            for pass in [Pass::Losses, Pass::Gradient, Pass::Both] {
                for (rows, cols) in cross(&[1, 300], &[1, 32, 1000, 4096, 50_257, 128_256]) {
                    for [aligned, congruent] in [[true, true], [false, true], [false, false]] {
                        let i = all.len();
                        let reduced = [None, Some(Reduced::Sum), Some(Reduced::Mean)][i % 3];
                        all.push(Problem {
                            rows,
                            cols,
                            element,
                            wide: i % 2 == 0,
                            pass: Some(pass),
                            reduced: reduced.filter(|_| pass == Pass::Losses),
                            softcap: i % 5 > 2,
                            smoothing: i % 7 > 3,
                            aligned,
                            congruent: congruent || pass != Pass::Gradient,
                        });
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        match kernel {
            Config::CrossEntropy(config) => {
                let whole = problem.cols.is_multiple_of(config.element.per_chunk().into());
                let lines = config.access == Access::Lines;
                rule(!lines || problem.aligned && whole, "a row's end")?;
                rule(config.access != Access::Peeled || problem.congruent, "two alignments")
            }
            Config::CrossEntropySum(_) => Ok(()),
            _ => another(),
        }
    }

    /// Half of the threads of most multiprocessors; one block adds.
    fn blocks_per_sm(kernel: &Config) -> u32 {
        match kernel {
            Config::CrossEntropy(config) => 1024 / config.threads(),
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
        let arguments = Arguments {
            problem,
            logits: (address(), problem.cols + 8),
            targets: address(),
            ignored: -100,
            cap: 30.0,
            smoothing: 0.1,
            z_loss: 1e-4,
            losses: Some(address()),
            stats: Some(address()),
            upstream: Some((address(), 1)),
            share: Some(address()),
            out: Some(address()),
            total: Some(address()),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let of = |pass, access, team| {
            let (element, wide, softcap, smoothing) = (BF16, true, false, false);
            Rows { element, wide, pass, softcap, smoothing, access, team }
        };
        let odd = of(Pass::Gradient, Access::Peeled, 32);
        let both = of(Pass::Both, Access::Lines, 64);
        vec![
            ("cross_entropy_losses", of(Pass::Losses, Access::Lines, 512).into()),
            ("cross_entropy_gradient", of(Pass::Gradient, Access::Lines, 512).into()),
            ("cross_entropy_odd", Rows { wide: false, element: F16, ..odd }.into()),
            ("cross_entropy_both", Rows { softcap: true, smoothing: true, ..both }.into()),
            ("cross_entropy_mean", Sum { reduced: Reduced::Mean, wide: true }.into()),
        ]
    }
}
