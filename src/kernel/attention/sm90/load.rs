//! The producer: one thread that fetches queries, and keeps the rings of keys and values full.

use super::Attention;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::work::{Tile, WorkTile};
use crate::kernel::hopper::SLAB;
use crate::kernel::hopper::load::{BoxLines, TileBoxes};
use crate::kernel::hopper::ring::Cursor;
use crate::ptx::Reg;

impl<'k> Attention<'k, '_> {
    /// Fills stages for all tiles of this block. A warp calls it, one of its threads does the work.
    pub(super) fn produce(&self) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let elected = k.elect_sync();
        let boxes = |i: usize, slabs: u32, lines: BoxLines, at: u32| {
            TileBoxes::new(self.maps[i], slabs, lines, self.base + at)
        };
        let tiles = || {
            let rows = BoxLines { loaded: c.used_rows(), pitch: SLAB };
            let lines = BoxLines { loaded: c.keys, pitch: c.keys };
            let queries = boxes(0, c.head_slabs(), rows, smem.queries);
            let keys = boxes(1, c.head_slabs(), lines, smem.keys);
            let values = boxes(2, c.value_slabs(), lines, smem.values);
            let places = [
                smem.query_ring.producer(k, self.base),
                smem.key_ring.producer(k, self.base),
                smem.value_ring.producer(k, self.base),
            ];
            let all = [&queries, &keys, &values];
            self.tiles.for_each(|work| match c.variant.lengths {
                // The warp looks for the next tile together.
                Lengths::Packed => {
                    k.if_(elected, || self.fill(&work, all, places));
                    k.bar_warp_sync();
                }
                Lengths::Full | Lengths::Padded => self.fill(&work, all, places),
            });
        };
        match c.variant.lengths {
            Lengths::Packed => tiles(),
            Lengths::Full | Lengths::Padded => k.if_(elected, tiles),
        }
    }

    /// Loads what a tile needs.
    fn fill(&self, work: &WorkTile<'k>, boxes: [&TileBoxes<'k>; 3], places: [Cursor<'k>; 3]) {
        let (k, c) = (self.k, self.c);
        let &WorkTile { tile, kv_head, blocks, .. } = work;
        let Tile { batch, pack, first, queries, keys, .. } = tile;
        let load = |which: usize, block: Reg<'k, i32>| {
            let at = keys.at(block * c.keys as i32);
            boxes[which].fill(places[which], &[at, kv_head, batch]);
        };
        // From the last block on, which is the one that the mask cuts.
        let block = k.var(blocks.end - 1);
        let some = blocks.some();
        k.if_(some, || load(1, block));
        for group in 0..c.consumers() {
            let position = queries.at(first + (group * c.positions()) as i32);
            match c.variant.pack {
                1 => boxes[0].fill(places[0], &[position, pack, batch]),
                _ => boxes[0].fill(places[0], &[k.var(0), position, pack, batch]),
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
