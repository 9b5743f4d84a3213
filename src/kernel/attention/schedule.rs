//! The order of tiles of queries: who computes which, and when.
//!
//! Blocks stay, and take their turns from one row of all tiles: block `c` of `G` takes the `c`-th of each
//! even round of `G`, and the `c`-th from the end of each odd one, so that what one round gives it more
//! than others, the next one takes back. That needs sections (below) of two rounds or more: where one is
//! about as long as a round, both turn around together. Nothing is counted in memory: who computes a tile
//! is the same in each run.
//!
//! With as many blocks as tiles each takes one, and the GPU gives the next block to the multiprocessor
//! that is done first.
//!
//! Heads are taken in sections whose keys and values fit L2: in one section first the last tiles
//! of all heads, which see the most keys under a causal mask, in the next one the first ones, so that a
//! tile costs about as much as its neighbours in the row. The last section ends with the least.

use super::Name;
use crate::ptx::{Kernel, Reg};

/// Heads whose keys and values are meant to be in L2 together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Section {
    /// Heads, or packs of them, of all sequences.
    pub heads: u32,
    /// Tiles of each.
    pub columns: u32,
    /// Tiles of all.
    pub tiles: u32,
    /// Heads of a section.
    pub section: u32,
}

/// The tiles of all heads.
#[derive(Clone, Copy)]
pub struct Schedule<'k> {
    heads: Reg<'k, u32>,
    columns: Reg<'k, u32>,
    tiles: Reg<'k, u32>,
    section: Reg<'k, u32>,
}

/// A tile's place.
#[derive(Clone, Copy)]
pub struct Place<'k> {
    /// Of all sequences.
    pub head: Reg<'k, u32>,
    pub column: Reg<'k, u32>,
}

/// Where a block is in the row of all tiles.
#[derive(Clone, Copy)]
pub struct Tour<'k> {
    schedule: Schedule<'k>,
    i: Reg<'k, u32>,
    /// Blocks, twice.
    twice: Reg<'k, u32>,
    step: Reg<'k, u32>,
}

impl<'k> Tour<'k> {
    pub fn kernel(&self) -> &'k Kernel {
        self.i.kernel()
    }

    /// Whether there is no tile left.
    pub fn over(&self) -> Reg<'k, bool> {
        self.i.ge(self.schedule.tiles)
    }

    pub fn place(&self) -> Place<'k> {
        self.schedule.place(self.i)
    }

    pub fn advance(&self) {
        self.i.increase(self.step);
        self.step.set(self.twice - self.step);
    }
}

impl<'k> Schedule<'k> {
    /// Declares its parameters: those of [`Section`].
    pub fn params(k: &'k Kernel) -> Self {
        let (heads, columns) = (k.param(Name::AllHeads), k.param(Name::Columns));
        Self { heads, columns, tiles: k.param(Name::Tiles), section: k.param(Name::Section) }
    }

    /// The tiles of this block.
    pub fn tour(&self) -> Tour<'k> {
        let k = self.tiles.kernel();
        let (i, blocks) = (k.var(k.block_x()), k.blocks_x());
        let twice = blocks * 2;
        Tour { schedule: *self, i, twice, step: k.var(twice - 1 - i * 2) }
    }

    fn place(&self, i: Reg<'k, u32>) -> Place<'k> {
        let each = self.section * self.columns;
        let section = i / each;
        let within = i - section * each;
        let first = section * self.section;
        // The last one may have fewer.
        let height = (self.heads - first).min(self.section);
        let column = within / height;
        let head = first + (within - column * height);
        let last = (self.heads - 1) / self.section;
        let upwards = ((last - section) % 2).eq(1);
        let k = upwards.kernel();
        Place { head, column: k.select(upwards, column, self.columns - 1 - column) }
    }
}
