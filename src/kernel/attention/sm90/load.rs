//! The producer: one thread that fetches queries, and keeps the rings of keys and values full.

use super::Attention;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::work::{Tile, Work};
use crate::kernel::hopper::{LINE, SLAB};
use crate::kernel::ring::Cursor;
use crate::ptx::{Delivery, Kernel, Reg};

/// Boxes that make up a stage, one for each 64 elements.
struct Boxes<'k> {
    map: Reg<'k, u64>,
    /// Their first elements.
    cols: Vec<Reg<'k, u32>>,
    /// Lines of a box, and from one to the next in shared memory.
    lines: u32,
    pitch: u32,
    /// Where the first stage begins.
    to: Reg<'k, u32>,
}

impl<'k> Boxes<'k> {
    fn new(
        k: &'k Kernel,
        map: Reg<'k, u64>,
        slabs: u32,
        (lines, pitch): (u32, u32),
        to: Reg<'k, u32>,
    ) -> Self {
        Self { map, cols: (0..slabs).map(|slab| k.var(slab * SLAB)).collect(), lines, pitch, to }
    }

    /// Fills the stage at `place` with what is at `at`, behind the elements.
    fn load(&self, place: Cursor<'k>, at: &[Reg<'k, u32>]) {
        let (k, slabs) = (self.map.kernel(), self.cols.len() as u32);
        let full = place.fill(k.var(slabs * self.lines * LINE));
        let to = place.stage * (slabs * self.pitch * LINE) + self.to;
        for (i, &col) in self.cols.iter().enumerate() {
            let to = to.at(i as i64 * i64::from(self.pitch * LINE));
            let at: Vec<_> = [col].iter().chain(at).copied().collect();
            k.tma_load(to, self.map, &at, full, Delivery::Plain);
        }
        place.advance();
    }
}

impl<'k> Attention<'k, '_> {
    /// Fills stages for all tiles of this block. Called by a warp, done by one thread.
    pub(super) fn produce(&self) {
        let (k, c, plan) = (self.k, self.c, &self.plan);
        let elected = k.elect();
        let boxes = |i: usize, slabs: u32, lines: (u32, u32), at: u32| {
            Boxes::new(k, self.maps[i], slabs, lines, self.base + at)
        };
        let tiles = || {
            let queries = boxes(0, c.head_slabs(), (c.used_rows(), SLAB), plan.queries);
            let keys = boxes(1, c.head_slabs(), (c.keys, c.keys), plan.keys);
            let values = boxes(2, c.value_slabs(), (c.keys, c.keys), plan.values);
            let places = [
                plan.query_ring.producer(k, self.base),
                plan.key_ring.producer(k, self.base),
                plan.value_ring.producer(k, self.base),
            ];
            let all = [&queries, &keys, &values];
            self.tiles.for_each(|work| match c.task.lengths {
                // The warp looks for the next tile together.
                Lengths::Packed => {
                    k.if_(elected, || self.fill(&work, all, places));
                    k.sync_warp();
                }
                Lengths::Full | Lengths::Padded => self.fill(&work, all, places),
            });
        };
        match c.task.lengths {
            Lengths::Packed => tiles(),
            Lengths::Full | Lengths::Padded => k.if_(elected, tiles),
        }
    }

    /// What a tile needs.
    fn fill(&self, work: &Work<'k>, boxes: [&Boxes<'k>; 3], places: [Cursor<'k>; 3]) {
        let (k, c) = (self.k, self.c);
        let &Work { tile, kv_head, blocks, .. } = work;
        let Tile { batch, pack, first, queries, keys, .. } = tile;
        let load = |which: usize, block: Reg<'k, i32>| {
            let at = keys.at(block * c.keys as i32);
            boxes[which].load(places[which], &[at, kv_head, batch]);
        };
        // From the last block on, which is the one that the mask cuts.
        let block = k.var(blocks.end - 1);
        let some = blocks.some();
        k.if_(some, || load(1, block));
        for group in 0..c.consumers() {
            let position = queries.at(first + (group * c.positions()) as i32);
            match c.task.pack {
                1 => boxes[0].load(places[0], &[position, pack, batch]),
                _ => boxes[0].load(places[0], &[k.var(0), position, pack, batch]),
            }
        }
        k.if_(some, || {
            k.loop_(|exit| {
                exit.when(block.le(blocks.begin));
                load(1, block - 1);
                load(2, block);
                block.increase(-1);
            });
            load(2, block);
        });
    }
}
