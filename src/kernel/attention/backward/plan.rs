//! The plan of a backward pass.

use super::delta::ZEROED_UNIT;
use super::sm90::{self, keys, queries};
use super::{Launch, Problem, delta, dq, sm80, sums};
use crate::kernel::attention::{Name, TileOrder, by_tma};
use crate::kernel::hopper::SLAB;
use crate::kernel::plan::{Step, count};
use crate::kernel::{self, Device};

/// The kernels of a backward pass, in their order, and the numbers of their launches.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The kernels.
    pub parts: Vec<Part>,
    /// What the first one zeroes for the others.
    pub zeroed: Zeroed,
}

/// A kernel and the numbers of its launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// Of each query what all its keys share: blocks for each head, and heads.
    Delta(delta::Config, [u32; 2]),
    /// A pass of the portable kernels.
    Sm80(sm80::Config, Launch),
    /// The gradients of keys and values on Hopper, and maybe shares of the queries'.
    Keys(keys::Config, Launch),
    /// The gradient of queries on Hopper.
    Queries(queries::Config, Launch),
    /// The same of the sums of shares.
    Dq(dq::Config, Launch),
}

impl kernel::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        let attention = &problem.attention;
        let mut passes = match by_tma(device, attention.element) {
            true => Part::sm90(problem, device).to_vec(),
            false => {
                let passes = sm80::choose(problem, device);
                let shares = passes.iter().any(|config| config.pass.shares_queries());
                let passes = passes.into_iter().map(|config| Part::sm80(config, problem, device));
                let dq = shares.then(|| Part::dq(sums::BLOCK, SLAB, problem, device));
                passes.chain(dq).collect()
            }
        };
        passes.extend(problem.bias_grad.map(|grad| {
            Part::sm80(sm80::bias(problem, device, grad.repeated[2]), problem, device)
        }));
        let zeroed = Zeroed::new(problem, &passes);
        let config = delta::Config {
            zeroes: zeroed.units() > 0,
            ..delta::Config::new(
                attention.out,
                attention.element,
                attention.value_dim as u32,
                problem.aligned,
                problem.lse_grad,
            )
        };
        let columns = config.columns(attention.queries);
        let heads = attention.rows() / attention.queries;
        let delta = Part::Delta(config, [columns, heads].map(count));
        Self { parts: [delta].into_iter().chain(passes).collect(), zeroed }
    }

    fn steps(&self) -> Vec<Step> {
        let step = |part: &Part| match *part {
            Part::Delta(config, [columns, heads]) => {
                Step { kernel: config.into(), grid: [columns * heads, 1, 1] }
            }
            Part::Sm80(config, launch) => {
                Step { kernel: config.into(), grid: [launch.blocks, 1, 1] }
            }
            Part::Keys(config, launch) => {
                Step { kernel: config.into(), grid: [launch.blocks, 1, 1] }
            }
            Part::Queries(config, launch) => {
                Step { kernel: config.into(), grid: [launch.blocks, 1, 1] }
            }
            Part::Dq(config, launch) => Step { kernel: config.into(), grid: [launch.blocks, 1, 1] },
        };
        self.parts.iter().map(step).collect()
    }
}

/// Numbers of 4 bytes that kernels add to, one kind after the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Zeroed {
    /// Floats that shares of the queries' gradient are added up in.
    pub dq_sums: u64,
    /// Whose turn it is to add to each block of them.
    pub dq_turns: u64,
    /// How many tiles each kernel's blocks have taken.
    pub tiles_taken: u64,
}

impl Zeroed {
    /// What the kernels after the first one add to.
    fn new(problem: &Problem, passes: &[Part]) -> Self {
        let attention = &problem.attention;
        // Blocks of sums, of so many queries.
        let blocks = |queries: u64| {
            let of_head =
                sums::blocks(attention.lengths, attention.queries, attention.batch, queries);
            attention.rows() / attention.queries * of_head
        };
        let mut zeroed = Self { dq_sums: 0, dq_turns: 0, tiles_taken: 0 };
        for part in passes {
            match part {
                Part::Keys(config, _) if config.form == keys::Form::Fused => {
                    let blocks = blocks(config.queries.into());
                    zeroed.dq_sums = blocks * u64::from(config.dq_block_bytes()) / 4;
                    zeroed.dq_turns = if config.ordered { blocks } else { 0 };
                }
                Part::Sm80(config, _) if config.pass.shares_queries() => {
                    zeroed.dq_sums = blocks(sums::BLOCK.into())
                        * u64::from(sums::BLOCK * config.variant.head_dim);
                }
                _ => {}
            }
            if matches!(part, Part::Keys(..) | Part::Queries(..)) {
                // Counted by the kernel's place in the plan.
                zeroed.tiles_taken = passes.len() as u64 + 1;
            }
        }
        zeroed
    }

    /// How many times [`ZEROED_UNIT`] bytes they are together.
    pub fn units(&self) -> u64 {
        (4 * (self.dq_sums + self.dq_turns + self.tiles_taken)).div_ceil(ZEROED_UNIT.into())
    }
}

impl Part {
    /// Hopper's passes for a problem.
    fn sm90(problem: &Problem, device: &Device) -> [Self; 2] {
        let attention = &problem.attention;
        let (keys, queries) = sm90::choose(problem, device);
        let launch = |shape| Launch::new(&shape, attention, device.multiprocessors);
        let of_keys =
            Self::Keys(keys, launch(keys.tile_shape(attention.heads / attention.kv_heads)));
        let of_queries = match queries {
            Some(config) => Self::Queries(config, launch(config.tile_shape())),
            None => Self::dq(keys.queries, keys.dq_columns(), problem, device),
        };
        [of_keys, of_queries]
    }

    /// The gradient of queries of sums in blocks of `queries`, whose warpgroups have `columns` of them.
    fn dq(queries: u32, columns: u32, problem: &Problem, device: &Device) -> Self {
        let attention = &problem.attention;
        let config = dq::Config {
            element: attention.element,
            head_dim: (attention.head_dim as u32).next_multiple_of(8),
            columns,
            queries,
            lengths: attention.lengths,
            portable: !by_tma(device, attention.element),
        };
        Self::Dq(config, Launch::new(&config.tile_shape(), attention, device.multiprocessors))
    }

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
