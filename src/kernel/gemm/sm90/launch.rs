//! The numbers of a launch.

use super::config::{Config, Order};
use crate::kernel::gemm::Problem;
use crate::kernel::plan::count;

/// The numbers of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Stages along the depth.
    pub depth: u32,
    /// Rows of tiles.
    pub tile_rows: u32,
    /// Columns of tiles.
    pub tile_cols: u32,
    /// Tiles of the whole batch.
    pub tiles: u32,
    /// Rows that are walked together.
    pub group: u32,
    /// Blocks of the grid, in x, y and z.
    pub grid: [u32; 3],
}

impl Launch {
    /// The launch of a configuration on a problem.
    pub fn new(config: &Config, problem: &Problem, multiprocessors: u32) -> Self {
        let [rows, _] = config.orient.order([problem.m, problem.n]);
        Self::of_weights(config, problem, &[rows], multiprocessors)
    }

    /// The same, with the rows of the kernel's left operand, or of each of several.
    pub(in crate::kernel) fn of_weights(
        config: &Config,
        problem: &Problem,
        rows: &[u64],
        multiprocessors: u32,
    ) -> Self {
        let [_, cols] = config.orient.order([problem.m, problem.n]);
        let height = config.rows;
        let tile_rows = count(rows.iter().map(|rows| rows.div_ceil(height.into())).sum());
        let tile_cols = count(cols.div_ceil(config.cols.into()));
        let each = u64::from(tile_rows) * u64::from(tile_cols);
        let tiles = count(each.saturating_mul(problem.batch));
        let slots = multiprocessors * config.blocks_per_sm;
        let grid = match config.order {
            Order::Grid => [tile_rows * config.split, tile_cols, count(problem.batch)],
            Order::Raster => [tiles.min(slots), 1, 1],
        };
        // The blocks at work read the least if they cover a square of the result.
        let reads = |group: u32| group * height + slots.div_ceil(group) * config.cols;
        let group = [2, 4, 8, 16].into_iter().min_by_key(|&group| reads(group));
        let group = group.expect("there are four").min(tile_rows);
        let depth = count(problem.k.div_ceil(config.depth().into()));
        Self { depth, tile_rows, tile_cols, tiles, group, grid }
    }
}
