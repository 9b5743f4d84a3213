//! The producer: one thread that fetches a tile's queries and gradients, and keeps the rings of keys and values
//! full.

use super::Backward;
use super::config::QUERIES;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::hopper::load::{BoxLines, TileBoxes};
use crate::ptx::Reg;

impl Backward<'_, '_> {
    /// Fills stages for all tiles of this block. A warp calls it, one of its threads does the work.
    pub(super) fn load(&self) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let boxes = |i: usize, slabs: u32, lines: u32, at: u32| {
            let lines = BoxLines { loaded: lines, pitch: lines };
            TileBoxes::new(self.maps[i], slabs, lines, self.base + at)
        };
        let all = [
            boxes(0, c.head_slabs(), QUERIES, smem.queries),
            boxes(1, c.head_slabs(), c.keys, smem.keys),
            boxes(2, c.value_slabs(), c.keys, smem.values),
            boxes(3, c.value_slabs(), QUERIES, smem.grads),
        ];
        let places = [smem.query_ring, smem.key_ring, smem.value_ring, smem.grad_ring]
            .map(|ring| ring.producer(k, self.base));
        let fill = |work: &WorkTile<'_>| {
            let kv_head = work.head / self.tiles.heads[1];
            let rows = [work.queries.at(work.first), work.head, work.batch];
            let load = |i: usize, at: &[Reg<'_, u32>; 3]| all[i].fill(places[i], at);
            load(0, &rows);
            let block = k.var(work.blocks.end - 1);
            let some = work.blocks.some();
            let columns = || [work.keys.at(block * c.keys as i32), kv_head, work.batch];
            k.if_(some, || load(1, &columns()));
            load(3, &rows);
            k.if_(some, || {
                load(2, &columns());
                k.loop_(|exit| {
                    exit.when(block.le(work.blocks.begin));
                    block.increase(-1);
                    load(1, &columns());
                    load(2, &columns());
                });
            });
        };
        self.schedule.hand_out(&self.tiles, fill);
    }
}
