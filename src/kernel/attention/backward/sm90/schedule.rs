//! The dynamic tile scheduler: blocks of threads are persistent, and whichever is done takes the next tile.
//!
//! A number in global memory counts the tiles that were taken; a block's first one is that of its own number. The
//! warp that loads takes a tile when all of the last one is on its way, finds out what it is, and writes that to
//! shared memory, from where the other warps have it:
//!
//! ```text
//! loads         write tile 7 · load its blocks ······ take 9, write it · load its blocks ······ take 14 ..
//! multiplies       its blocks ······························· its blocks ····························
//! ```
//!
//! A tile stays there until all warps are done with it, so that they need not keep in registers what they seldom need.
//!
//! Tiles are taken in their order: one that waits for those before it waits for tiles that are at work, or have been.

use crate::kernel::Arena;
use crate::kernel::attention::backward::work::{ALL_WORDS, Tiles, WorkTile};
use crate::kernel::attention::{Lengths, Name};
use crate::kernel::hopper::ring::{Cursor, Ring};
use crate::ptx::{Kernel, Reg};

/// Tiles of a block that are in shared memory: the one that is at work and the one that is loaded.
const STAGES: u32 = 2;

/// Where in shared memory a block's tiles are.
#[derive(Clone, Copy)]
pub struct TileSlots {
    at: u32,
    ring: Ring,
}

impl TileSlots {
    pub fn new(arena: &mut Arena) -> Self {
        let at = arena.region(STAGES * Self::BYTES, 16);
        Self { at, ring: Ring::new(arena, STAGES) }
    }

    const BYTES: u32 = ALL_WORDS * 4;

    /// Its barriers, which each warp empties that [has the tiles](TileSchedule::for_each).
    pub fn ring(&self) -> Ring {
        self.ring
    }
}

/// A tile in shared memory.
#[derive(Clone, Copy)]
pub struct Tile<'k, 't> {
    tiles: &'t Tiles<'k>,
    at: Reg<'k, u32>,
}

impl<'k> Tile<'k, '_> {
    /// What it is. Who asks again does not keep it.
    pub fn read(&self) -> WorkTile<'k> {
        self.tiles.kept(self.at)
    }
}

/// The tiles of a grid, taken one by one.
pub struct TileSchedule<'k> {
    /// How many were taken, less the first one of each block.
    taken: Reg<'k, u64>,
    slots: TileSlots,
    base: Reg<'k, u32>,
    lengths: Lengths,
}

impl<'k> TileSchedule<'k> {
    /// Declares the parameter that counts.
    pub fn params(k: &'k Kernel, lengths: Lengths, slots: TileSlots, base: Reg<'k, u32>) -> Self {
        Self { taken: k.pointer(Name::TilesTaken), slots, base, lengths }
    }

    /// Takes tile after tile and hands it to all other warps; then one thread runs `body` for it. One warp calls this.
    pub fn hand_out(&self, tiles: &Tiles<'k>, body: impl Fn(&WorkTile<'k>)) {
        let k = self.taken.kernel();
        let elected = k.elect_sync();
        // The warp looks for tiles of packed sequences together.
        let together = self.lengths == Lengths::Packed;
        let run = || {
            let place = self.slots.ring.producer(k, self.base);
            let by_one = |run: &dyn Fn()| match together {
                true => {
                    k.if_(elected, run);
                    k.bar_warp_sync();
                }
                false => run(),
            };
            let number = k.var(k.block_x());
            k.loop_(|exit| {
                exit.when(number.ge(tiles.count()));
                tiles.with(number, |work| {
                    by_one(&|| {
                        place.wait_empty();
                        tiles.write(&work, self.slot(place));
                        place.filled().arrive();
                        place.advance();
                        body(&work);
                    });
                });
                match together {
                    true => {
                        let taken = k.when(k.lane().eq(0), || k.atom_add(self.taken));
                        number.set(k.shfl_idx(taken, 0));
                    }
                    false => number.set(k.atom_add(self.taken)),
                }
                number.increase(k.blocks_x());
            });
            by_one(&|| {
                place.wait_empty();
                tiles.write_end(self.slot(place));
                place.filled().arrive();
            });
        };
        match together {
            true => run(),
            false => k.if_(elected, run),
        }
    }

    /// Runs `body` for each tile that this block takes. Whole warps call this, and all threads run `body`.
    pub fn for_each(&self, tiles: &Tiles<'k>, body: impl FnOnce(Tile<'k, '_>)) {
        let k = self.taken.kernel();
        let place = self.slots.ring.consumer(k, self.base);
        k.loop_(|exit| {
            place.wait();
            let at = self.slot(place);
            exit.when(tiles.ends(at));
            body(Tile { tiles, at });
            k.bar_warp_sync();
            let done = place.done();
            k.when(k.lane().eq(0), || done.arrive());
            place.advance();
        });
    }

    fn slot(&self, place: Cursor<'k>) -> Reg<'k, u32> {
        self.base + self.slots.at + place.stage * TileSlots::BYTES
    }
}
