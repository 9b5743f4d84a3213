//! The plan of a backward pass.

use super::{Launch, Problem, delta, sm80};
use crate::kernel::attention::{Name, TileOrder};
use crate::kernel::plan::{Step, count};
use crate::kernel::{self, Device};

/// The kernels of a backward pass, in their order, and the numbers of their launches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The kernels.
    pub parts: Vec<Part>,
}

/// A kernel and the numbers of its launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Of each query what all its keys share: blocks for each head, and heads.
    Delta(delta::Config, [u32; 2]),
    /// A pass of the portable kernels.
    Sm80(sm80::Config, Launch),
}

impl kernel::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        let attention = &problem.attention;
        let config = delta::Config::new(
            attention.out,
            attention.element,
            attention.value_dim as u32,
            problem.aligned,
            problem.lse_grad,
        );
        let columns = config.columns(attention.queries);
        let heads = attention.rows() / attention.queries;
        let delta = Part::Delta(config, [columns, heads].map(count));
        let passes = sm80::choose(problem, device).into_iter();
        let bias = problem.bias_grad.map(|grad| sm80::bias(problem, device, grad.repeated[2]));
        let passes = passes.chain(bias).map(|config| Part::sm80(config, problem, device));
        Self { parts: [delta].into_iter().chain(passes).collect() }
    }

    fn steps(&self) -> Vec<Step> {
        let step = |part: &Part| match *part {
            Part::Delta(config, [columns, heads]) => {
                Step { kernel: config.into(), grid: [columns * heads, 1, 1] }
            }
            Part::Sm80(config, launch) => {
                Step { kernel: config.into(), grid: [launch.blocks, 1, 1] }
            }
        };
        self.parts.iter().map(step).collect()
    }
}

impl Part {
    /// A pass by a configuration.
    pub fn sm80(config: sm80::Config, problem: &Problem, device: &Device) -> Self {
        let attention = &problem.attention;
        let tile_shape = config.tile_shape(attention.heads / attention.kv_heads);
        let mut launch = Launch::new(&tile_shape, attention, device.multiprocessors);
        if let (sm80::Pass::Bias { shared, .. }, Some(grad)) = (config.pass, problem.bias_grad) {
            // Tiles of its matrices, each a row of tiles after the other.
            let [batch, heads] =
                [attention.batch / grad.repeated[0], attention.heads / grad.repeated[1]];
            let rows = if shared { 1 } else { attention.queries.div_ceil(config.rows().into()) };
            let columns = rows * attention.keys.div_ceil(config.cols.into());
            let matrices = batch * heads;
            let tiles = count(matrices.saturating_mul(columns));
            let (heads, columns) = (count(matrices), count(columns));
            launch.order = TileOrder { heads, columns, tiles, section: 1 };
            launch.blocks = tiles;
        }
        Self::Sm80(config, launch)
    }
}
