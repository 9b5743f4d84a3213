//! The order in which tiles are computed.

use super::gemm::Name;
use crate::ptx::{Kernel, Reg};

/// Tiles of a batch of results, walked in groups of rows of tiles so that the blocks at work share
/// operands in L2: down a column of the group, then along the group.
#[derive(Clone, Copy)]
pub struct Raster<'k> {
    rows: Reg<'k, u32>,
    cols: Reg<'k, u32>,
    group: Reg<'k, u32>,
    /// Tiles of all results.
    pub count: Reg<'k, u32>,
}

/// A tile's place.
#[derive(Clone, Copy)]
pub struct Tile<'k> {
    pub batch: Reg<'k, u32>,
    pub row: Reg<'k, u32>,
    pub col: Reg<'k, u32>,
}

impl<'k> Tile<'k> {
    /// Row `m` of the tile's result, of `rows`, counted over all of the batch.
    pub fn batch_row(&self, batched: bool, rows: Reg<'k, u32>, m: Reg<'k, u32>) -> Reg<'k, u32> {
        if batched { self.batch * rows + m } else { m }
    }
}

impl<'k> Raster<'k> {
    /// Declares its parameters.
    pub fn params(k: &'k Kernel) -> Self {
        let (rows, cols) = (k.param(Name::TileRows), k.param(Name::TileCols));
        let (count, group) = (k.param(Name::Tiles), k.param(Name::Group));
        Self { rows, cols, count, group }
    }

    /// Tile number `i`.
    pub fn tile(&self, i: Reg<'k, u32>, batched: bool) -> Tile<'k> {
        let each = self.rows * self.cols;
        let batch = if batched { i / each } else { each.kernel().var(0) };
        let i = if batched { i - batch * each } else { i };
        let group_tiles = self.group * self.cols;
        let first = i / group_tiles * self.group;
        let within = i % group_tiles;
        // The last group may be lower.
        let height = (self.rows - first).min(self.group);
        let col = within / height;
        Tile { batch, row: first + (within - col * height), col }
    }
}
