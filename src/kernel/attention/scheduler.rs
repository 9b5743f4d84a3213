//! The tile scheduler: which block computes which tile of queries, and when.
//!
//! Blocks are persistent. All tiles stand in one row, and of each round of `G` tiles, `G` being the number
//! of blocks, block `c` takes the `c`-th, or in odd rounds the `c`-th from the end:
//!
//! ```text
//! round 0   0 1 2 3    block 0 takes tiles 0, 7, 8, ..
//! round 1   7 6 5 4    block 1 takes tiles 1, 6, 9, ..
//! round 2   8 9 ..
//! ```
//!
//! What one round gives a block more than others, the next one takes back. That needs sections (below) of
//! two rounds or more: where one is about as long as a round, both turn around together. Nothing is
//! counted in memory: who computes a tile is the same in each run.
//!
//! With as many blocks as tiles each takes one, and the GPU gives the next block to the multiprocessor
//! that is done first.
//!
//! Heads are taken in L2 sections, whose keys and values fit that cache together: in one section first the
//! last tiles of all heads, which see the most keys under a causal mask, in the next one the first ones,
//! so that a tile costs about as much as its neighbours in the row. The last section ends with the least.

use super::Name;
use crate::ptx::{Kernel, Reg};

/// The numbers that say which tiles there are, and in which order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TileOrder {
    /// Heads, or packs of them, of all sequences.
    pub heads: u32,
    /// Tiles of each.
    pub columns: u32,
    /// Tiles of all.
    pub tiles: u32,
    /// Heads of an L2 section: those whose keys and values are meant to be in that cache together.
    pub section: u32,
}

/// The same as parameters of a kernel.
#[derive(Clone, Copy)]
pub struct TileScheduler<'k> {
    heads: Reg<'k, u32>,
    columns: Reg<'k, u32>,
    tiles: Reg<'k, u32>,
    section: Reg<'k, u32>,
}

/// Which tile.
#[derive(Clone, Copy)]
pub struct TileCoord<'k> {
    /// The head, counted through all sequences.
    pub head: Reg<'k, u32>,
    pub column: Reg<'k, u32>,
}

/// Where a place in the row is.
struct Place<'k> {
    head: Reg<'k, u32>,
    section: Reg<'k, u32>,
    /// Its number in the section.
    within: Reg<'k, u32>,
    /// Places of the section's heads before its own one.
    before: Reg<'k, u32>,
}

/// Where a block is in the row of all tiles.
#[derive(Clone, Copy)]
pub struct TileWalk<'k> {
    scheduler: TileScheduler<'k>,
    i: Reg<'k, u32>,
    /// Blocks, twice.
    twice: Reg<'k, u32>,
    step: Reg<'k, u32>,
}

impl<'k> TileWalk<'k> {
    pub fn kernel(&self) -> &'k Kernel {
        self.i.kernel()
    }

    /// Whether there is no tile left.
    pub fn over(&self) -> Reg<'k, bool> {
        self.i.ge(self.scheduler.tiles)
    }

    pub fn coord(&self) -> TileCoord<'k> {
        self.scheduler.coord(self.i)
    }

    pub fn advance(&self) {
        self.i.increase(self.step);
        self.step.set(self.twice - self.step);
    }
}

impl<'k> TileScheduler<'k> {
    /// Declares its parameters: those of [`TileOrder`].
    pub fn params(k: &'k Kernel) -> Self {
        let (heads, columns) = (k.param(Name::AllHeads), k.param(Name::Columns));
        Self { heads, columns, tiles: k.param(Name::Tiles), section: k.param(Name::TileOrder) }
    }

    /// Tiles of all heads.
    pub fn count(&self) -> Reg<'k, u32> {
        self.tiles
    }

    /// Tiles of each head.
    pub fn columns(&self) -> Reg<'k, u32> {
        self.columns
    }

    /// The tiles of this block.
    pub fn walk(&self) -> TileWalk<'k> {
        let k = self.tiles.kernel();
        let (i, blocks) = (k.var(k.block_x()), k.blocks_x());
        let twice = blocks * 2;
        TileWalk { scheduler: *self, i, twice, step: k.var(twice - 1 - i * 2) }
    }

    /// Which tile has a place in the row.
    fn coord(&self, i: Reg<'k, u32>) -> TileCoord<'k> {
        let Place { head, section, before, .. } = self.place(i);
        let last = (self.heads - 1) / self.section;
        let upwards = ((last - section) % 2).eq(1);
        let k = upwards.kernel();
        let column = k.select(upwards, before, self.columns - 1 - before);
        TileCoord { head, column }
    }

    /// The same where blocks take places as they are done, so that the first columns come first in every section.
    pub fn in_order(&self, i: Reg<'k, u32>) -> TileCoord<'k> {
        let Place { head, before, .. } = self.place(i);
        TileCoord { head, column: before }
    }

    /// Whether a place is in a section's second round of `blocks` tiles, or in its fourth, and so on.
    pub fn in_even_round(&self, i: Reg<'k, u32>, blocks: Reg<'k, u32>) -> Reg<'k, bool> {
        (self.place(i).within / blocks % 2).eq(1)
    }

    fn place(&self, i: Reg<'k, u32>) -> Place<'k> {
        let each = self.section * self.columns;
        let section = i / each;
        let within = i - section * each;
        let first = section * self.section;
        // The last one may have fewer.
        let height = (self.heads - first).min(self.section);
        let before = within / height;
        let head = first + (within - before * height);
        Place { head, section, within, before }
    }
}
