//! Rotary position embeddings.

use kaio_candle::RopeLayout;
use kaio_candle::kernel::rope::{self, Arguments, Plan, Problem};
use kaio_candle::kernel::{Config, Element};

use super::{BF16, Extent, F16, Family, Gpu, Used, addresses, another, passes, rule, within};

pub struct Ropes;

impl Family for Ropes {
    type Problem = Problem;
    type Plan = Plan;

    /// All types and layouts, of all of a row and of a part.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        let types = [(BF16, BF16), (F16, F16), (BF16, Element::F32), (Element::F32, Element::F32)];
        for (element, angle) in types {
            for layout in [RopeLayout::Halves, RopeLayout::Interleaved] {
                for (cols, turned) in [(128, 128), (64, 64), (80, 32), (7, 4), (5, 0)] {
                    for dims in [[1, 1, 1], [2, 32, 4096], [64, 8, 1]] {
                        for aligned in [false, true] {
                            all.push(Problem {
                                dims,
                                cols,
                                turned,
                                element,
                                angle,
                                layout,
                                aligned,
                            });
                        }
                    }
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        within(problem.limit())?;
        let Config::Rope(config) = kernel else { return another() };
        let unit = u64::from(config.unit);
        let whole = unit == 1 || problem.aligned;
        let ends = [problem.cols, problem.turned / 2].iter().all(|len| len.is_multiple_of(unit));
        rule(whole && ends, "a row's end")
    }

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
        let arguments = Arguments {
            problem,
            plan,
            x: (address(), [3, 2, 1]),
            angles: [(address(), [2, 1]), (address(), [2, 1])],
            out: address(),
            back: false,
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let halves = rope::Config {
            element: BF16,
            angle: Element::F32,
            layout: RopeLayout::Halves,
            unit: 8,
            heads: 4,
        };
        let neighbours =
            rope::Config { layout: RopeLayout::Interleaved, unit: 1, heads: 1, ..halves };
        vec![("rope_halves", halves.into()), ("rope_interleaved", neighbours.into())]
    }
}
