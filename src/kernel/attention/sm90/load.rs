//! The producer: one thread that fetches queries, and keeps the rings of keys and values full.

use super::{Attention, Work};
use crate::kernel::hopper::{LINE, SLAB, SLAB_BYTES};
use crate::kernel::ring::Cursor;
use crate::ptx::{Delivery, Kernel, Reg};

/// Boxes that make up a stage, one for each 64 elements.
struct Boxes<'k> {
    map: Reg<'k, u64>,
    /// Their first elements.
    cols: Vec<Reg<'k, u32>>,
    lines: u32,
    /// Where the first stage begins.
    to: Reg<'k, u32>,
}

impl<'k> Boxes<'k> {
    fn new(k: &'k Kernel, map: Reg<'k, u64>, slabs: u32, lines: u32, to: Reg<'k, u32>) -> Self {
        Self { map, cols: (0..slabs).map(|slab| k.var(slab * SLAB)).collect(), lines, to }
    }

    fn bytes(&self) -> u32 {
        self.cols.len() as u32 * self.lines * LINE
    }

    /// Fills the stage at `place` with what is at `at`, behind the elements.
    fn load(&self, place: Cursor<'k>, at: &[Reg<'k, u32>]) {
        let k = self.map.kernel();
        let full = place.fill(k.var(self.bytes()));
        let to = place.stage * self.bytes() + self.to;
        for (i, &col) in self.cols.iter().enumerate() {
            let to = to.at(i as i64 * i64::from(self.lines * LINE));
            let at: Vec<_> = [col].iter().chain(at).copied().collect();
            k.tma_load(to, self.map, &at, full, Delivery::Plain);
        }
        place.advance();
    }
}

impl<'k> Attention<'k, '_> {
    /// Fills stages for all tiles of this block.
    pub(super) fn produce(&self) {
        let (k, c, plan) = (self.k, self.c, &self.plan);
        let boxes = |i: usize, slabs: u32, lines: u32, at: u32| {
            Boxes::new(k, self.maps[i], slabs, lines, self.base + at)
        };
        let queries = boxes(0, c.head_slabs(), SLAB, plan.queries);
        let keys = boxes(1, c.head_slabs(), c.keys, plan.keys);
        let values = boxes(2, c.value_slabs(), c.keys, plan.values);
        debug_assert_eq!(queries.bytes(), c.head_slabs() * SLAB_BYTES);
        let query_place = plan.query_ring.producer(k, self.base);
        let key_place = plan.key_ring.producer(k, self.base);
        let value_place = plan.value_ring.producer(k, self.base);
        self.tiles(|work| {
            let Work { batch, head, kv_head, first, blocks, .. } = work;
            let load = |boxes: &Boxes<'k>, place: Cursor<'k>, block: Reg<'k, i32>| {
                let at = block.cast::<u32>() * c.keys;
                boxes.load(place, &[at, kv_head, batch]);
            };
            // From the last block on, which is the one that the mask cuts.
            let block = k.var(blocks.end - 1);
            let some = block.ge(blocks.begin);
            k.if_(some, || load(&keys, key_place, block));
            for group in 0..c.consumers() {
                let row = first.cast::<u32>() + group * SLAB;
                queries.load(query_place, &[row, head, batch]);
            }
            k.if_(some, || {
                k.loop_(|exit| {
                    exit.when(block.le(blocks.begin));
                    load(&keys, key_place, block - 1);
                    load(&values, value_place, block);
                    block.increase(-1);
                });
                load(&values, value_place, block);
            });
        });
    }
}
