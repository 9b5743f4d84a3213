//! The warps that do not multiply: what comes from global memory, and what goes back while tiles are at work.

use super::Backward;
use super::config::GROUPS;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::backward::sums::DqSums;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::hopper::load::{BoxLines, TileBoxes};
use crate::kernel::multiprocessor::WARP;
use crate::ptx::Reg;

impl<'k> Backward<'k, '_> {
    /// Runs `body` for each block of queries of a tile, of all heads that share its keys: with the head and
    /// the block.
    fn blocks(&self, work: &WorkTile<'k>, body: impl Fn(Reg<'k, u32>, Reg<'k, i32>)) {
        let k = self.k;
        self.heads(work, |head| {
            let block = k.var(work.blocks.end - 1);
            k.loop_(|exit| {
                exit.when(block.lt(work.blocks.begin));
                body(head, block);
                block.increase(-1);
            });
        });
    }

    /// Runs `body` for each head that shares a tile's keys.
    pub(super) fn heads(&self, work: &WorkTile<'k>, body: impl FnOnce(Reg<'k, u32>)) {
        let group = self.tiles.heads[1];
        let first = work.head * group;
        self.k.for_(first, first + group, 1, body);
    }

    /// Lets TMA fill the rings for all tiles of this block. A warp calls it, one of its threads does the work.
    pub(super) fn load(&self) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let elected = k.elect_sync();
        let tiles = || {
            let boxes = |i: usize, slabs: u32, lines: u32, at: u32| {
                let lines = BoxLines { loaded: lines, pitch: lines };
                TileBoxes::new(self.maps[i], slabs, lines, self.base + at)
            };
            let queries = boxes(0, c.head_slabs(), c.queries, smem.queries);
            let keys = boxes(1, c.head_slabs(), c.keys(), smem.keys);
            let values = boxes(2, c.value_slabs(), c.keys(), smem.values);
            let grads = boxes(3, c.value_slabs(), c.queries, smem.grads);
            let [key_place, value_place, query_place, grad_place] =
                [smem.key_ring, smem.value_ring, smem.query_ring, smem.grad_ring]
                    .map(|ring| ring.producer(k, self.base));
            let fill = |work: &WorkTile<'k>| {
                let at = work.keys.at(work.first);
                keys.fill(key_place, &[at, work.head, work.batch]);
                values.fill(value_place, &[at, work.head, work.batch]);
                self.blocks(work, |head, block| {
                    let at = work.queries.at(block * c.queries as i32);
                    queries.fill(query_place, &[at, head, work.batch]);
                    grads.fill(grad_place, &[at, head, work.batch]);
                });
            };
            self.tiles.for_each(|work| match c.lengths {
                // The warp looks for the next tile together.
                Lengths::Packed => {
                    k.if_(elected, || fill(&work));
                    k.bar_warp_sync();
                }
                Lengths::Full | Lengths::Padded => fill(&work),
            });
        };
        match c.lengths {
            Lengths::Packed => tiles(),
            Lengths::Full | Lengths::Padded => k.if_(elected, tiles),
        }
    }

    /// Fetches what is known of each block's queries.
    pub(super) fn fetch_rows(&self) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let place = smem.row_ring.producer(k, self.base);
        let lane = k.lane();
        let [max, log, delta] = self.row_memory;
        self.tiles.for_each(|work| {
            self.blocks(&work, |head, block| {
                let first = block * c.queries as i32;
                let row = (work.batch * self.tiles.heads[0] + head)
                    .mul_wide(self.tiles.size[0].cast::<u32>());
                let left = work.queries.count - first;
                let start = row + work.queries.at(first).wide();
                let values: Vec<_> = (0..c.queries / WARP)
                    .map(|i| {
                        let query = lane + i * WARP;
                        let inside = left.gt(query.cast::<i32>());
                        let at = (start + query.wide()) * 4u64;
                        // Past the last query all is 0.
                        let [less_max, less_log, d] =
                            [0f32, f32::NEG_INFINITY, 0f32].map(|x| k.var(x));
                        k.if_(inside, || {
                            let [m] = k.ld_global::<f32, 1>(max + at);
                            let [l] = k.ld_global::<f32, 1>(log + at);
                            let [x] = k.ld_global::<f32, 1>(delta + at);
                            less_max.set(-m);
                            less_log.set(-l);
                            d.set(x);
                        });
                        (query, [less_max, less_log], d)
                    })
                    .collect();
                place.wait_empty();
                let stage = self.base + smem.rows + place.stage * c.row_bytes();
                for (query, both, delta) in values {
                    k.st_shared(stage + query * 8, both);
                    k.st_shared((stage + query * 4).at((c.queries * 8).into()), [delta]);
                }
                place.filled().arrive();
                place.advance();
            });
        });
    }

    /// Adds each block's share of dQ to the sums.
    pub(super) fn add_up(&self, sums: DqSums<'k>) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let elected = k.elect_sync();
        let groups = || (0..GROUPS).map(|group| k.var(group));
        self.tiles.for_each(|work| {
            groups().for_each(|group| smem.dq_empty.of(group).arrive(k));
            let heads = self.tiles.heads[0];
            self.heads(&work, |head| {
                let of_head = sums.head(work.batch * heads + head, work.sequence, work.queries);
                let block = k.var(work.blocks.end - 1);
                k.loop_(|exit| {
                    exit.when(block.lt(work.blocks.begin));
                    let to = sums.block(of_head, block.cast());
                    for (i, group) in (0..).zip(groups()) {
                        smem.dq_full.of(group).sync(k);
                        let from = self.base + smem.dq + i * c.dq_pitch();
                        let to = to.at((i * c.dq_bytes()).into());
                        k.if_(elected, || {
                            k.bulk_reduce_add(to, from, c.dq_bytes());
                            k.tma_commit();
                        });
                    }
                    for (i, group) in (0..).zip(groups()) {
                        k.when(elected, || k.tma_wait_read(GROUPS - 1 - i));
                        k.bar_warp_sync();
                        smem.dq_empty.of(group).arrive(k);
                    }
                    block.increase(-1);
                });
            });
        });
        k.when(elected, || k.tma_wait(0));
    }
}
