//! Softmax of rows and its gradient.

use kaio_candle::kernel::softmax::{self, Arguments, Plan, Problem};
use kaio_candle::kernel::{Config, Element, Tile};

use super::{
    BF16, Extent, F16, Family, Gpu, Used, addresses, another, cross, passes, rule, within,
};

pub struct Softmaxes;

impl Family for Softmaxes {
    type Problem = Problem;
    type Plan = Plan;

    /// All types, of rows of part of a warp to those that no team holds.
    fn problems(_: Extent) -> Vec<Problem> {
        let mut all = vec![];
        let widths = [
            1, 7, 8, 13, 64, 100, 256, 515, 768, 1024, 2048, 2056, 4096, 4099, 8192, 8200, 16_384,
            50_257, 50_304,
        ];
        for element in [BF16, F16, Element::F32] {
            for (rows, cols) in cross(&[1, 16_384], &widths) {
                for [backward, aligned] in
                    [[false, false], [false, true], [true, false], [true, true]]
                {
                    all.push(Problem { rows, cols, element, backward, aligned });
                }
            }
        }
        all
    }

    fn fits(kernel: &Config, _: &Gpu, problem: &Problem) -> Result<(), String> {
        within(problem.limit())?;
        let Config::Softmax(config) = kernel else { return another() };
        let tile = config.tile;
        let held = u64::from(tile.unit * tile.team * tile.chunks);
        let whole = tile.unit == 1 || problem.aligned;
        rule(whole && problem.cols.is_multiple_of(tile.unit.into()), "a row's end")?;
        rule(!tile.full || problem.cols.is_multiple_of(held), "units that are not there")?;
        rule(config.long || held >= problem.cols, "a row that no team holds")
    }

    fn blocks_per_sm(kernel: &Config) -> u32 {
        let Config::Softmax(config) = kernel else { return 1 };
        config.blocks_per_sm()
    }

    fn passes(
        problem: &Problem,
        plan: &Plan,
        kernel: &Config,
        used: &mut Used,
    ) -> Result<(), String> {
        let (mut address, row) = (addresses(), problem.cols + 8);
        let arguments = Arguments {
            problem,
            plan,
            x: (address(), row),
            grad: problem.backward.then(|| (address(), row)),
            out: address(),
        };
        passes(plan, &arguments, kernel, used)
    }

    fn goldens() -> Vec<(&'static str, Config)> {
        let tile = Tile { unit: 8, team: 256, chunks: 2, full: true };
        let forward = softmax::Config { element: BF16, backward: false, tile, long: false };
        let tile = Tile { unit: 1, team: 512, chunks: 16, full: false };
        let long = softmax::Config { backward: true, tile, long: true, ..forward };
        vec![("softmax", forward.into()), ("softmax_long_backward", long.into())]
    }
}
