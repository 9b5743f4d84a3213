//! The numbers of a launch.

use super::{Config, Reduce};
use crate::kernel::gemm::Problem;
use crate::kernel::plan::count;

/// Rows of tiles that are walked together.
const GROUP: u32 = 8;

/// The numbers of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Rows of tiles.
    pub tile_rows: u32,
    /// Columns of tiles.
    pub tile_cols: u32,
    /// Tiles of the whole batch.
    pub tiles: u32,
    /// Rows that are walked together.
    pub group: u32,
    /// Blocks of the grid.
    pub grid: [u32; 3],
    /// Rows and columns of all results together.
    size: [u32; 2],
}

impl Launch {
    /// The launch of a configuration on a problem.
    pub fn new(config: &Config, problem: &Problem) -> Self {
        let tile_rows = count(problem.m.div_ceil(config.rows.into()));
        let tile_cols = count(problem.n.div_ceil(config.cols.into()));
        let each = u64::from(tile_rows) * u64::from(tile_cols);
        let tiles = each.saturating_mul(problem.batch);
        let blocks = tiles.saturating_mul(config.split.into());
        Self {
            tile_rows,
            tile_cols,
            tiles: count(tiles),
            group: tile_rows.min(GROUP),
            grid: [count(blocks), 1, 1],
            size: [count(problem.batch.saturating_mul(problem.m)), count(problem.n)],
        }
    }

    /// The grid of the kernel that adds the parts of a split.
    pub fn sum_grid(&self, reduce: &Reduce) -> [u32; 3] {
        reduce.grid(self.size)
    }
}
