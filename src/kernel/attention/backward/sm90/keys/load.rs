//! The warps that do not multiply: what comes from global memory, and what goes back while tiles are at work.

use super::Backward;
use super::config::GROUPS;
use crate::kernel::attention::backward::sums::DqSums;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::hopper::load::{BoxLines, TileBoxes};
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Address, Reg};

impl<'k> Backward<'k, '_> {
    /// Runs `body` for each block of queries of a tile, of all heads that share its keys: with the head and
    /// the block. Heads take turns, so that blocks of threads stay side by side, and what one has read is in L2.
    fn blocks(&self, work: &WorkTile<'k>, body: impl Fn(Reg<'k, u32>, Reg<'k, i32>)) {
        let k = self.k;
        let count = k.var(work.blocks.end - 1);
        k.loop_(|exit| {
            exit.when(count.lt(work.blocks.begin));
            let block = work.block(count);
            match self.c.grouped {
                true => {
                    let group = self.tiles.heads[1];
                    let first = work.head * group;
                    k.for_(first, first + group, 1, |head| body(head, block));
                }
                false => body(work.head, block),
            }
            count.increase(-1);
        });
    }

    /// Lets TMA fill the rings for all tiles of this block. A warp calls it, one of its threads does the work.
    pub(super) fn load(&self) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let boxes = |i: usize, slabs: u32, lines: u32, at: u32| {
            let lines = BoxLines { loaded: lines, pitch: lines };
            TileBoxes::new(self.maps[i], slabs, lines, self.base + at)
        };
        let queries = boxes(0, c.head_slabs(), c.queries, smem.queries);
        let keys = boxes(1, c.head_slabs(), c.keys(), smem.keys);
        let values = boxes(2, c.value_slabs(), c.keys(), smem.values);
        let grads = boxes(3, c.value_slabs(), c.queries, smem.grads);
        // Registers are few: rings of as many stages share a place.
        let place_of_keys = smem.key_ring.producer(k, self.base);
        let place = smem.query_ring.producer(k, self.base);
        let fill = |work: &WorkTile<'k>| {
            let at = [work.keys.at(work.first), work.head, work.batch];
            keys.fill_stage(place_of_keys, &at);
            values.fill_stage(place_of_keys.of(smem.value_ring), &at);
            place_of_keys.advance();
            self.blocks(work, |head, block| {
                let at = [work.queries.at(block * c.queries as i32), head, work.batch];
                queries.fill_stage(place, &at);
                grads.fill_stage(place.of(smem.grad_ring), &at);
                place.advance();
            });
        };
        self.schedule.hand_out(&self.tiles, fill);
    }

    /// Fetches what is known of each block's queries.
    pub(super) fn fetch_rows(&self) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let place = smem.row_ring.producer(k, self.base);
        let lane = k.lane();
        let [max, log, delta] = self.row_memory;
        self.schedule.for_each(&self.tiles, |tile| {
            let work = tile.read();
            self.blocks(&work, |head, block| {
                let first = block * c.queries as i32;
                let row = (work.batch * self.tiles.heads[0] + head)
                    .mul_wide(self.tiles.size[0].cast::<u32>());
                let left = work.queries.count - first;
                let start = (row + work.queries.at(first).wide() + lane.wide()) * 4u64;
                place.wait_empty();
                let stage = self.base + smem.rows + place.stage * c.row_bytes();
                let (to, to_delta) = (stage + lane * 8, stage + lane * 4);
                // One after the other: registers are few.
                for i in (0..c.queries).step_by(WARP as usize) {
                    let at = |memory: Reg<'k, u64>| (memory + start).at((4 * i).into());
                    // Past the last query all is 0.
                    let [less_max, less_log, d] = [0f32, f32::NEG_INFINITY, 0f32].map(|x| k.var(x));
                    k.if_((lane + i).cast::<i32>().lt(left), || {
                        let [m] = k.ld_global::<f32, 1>(at(max));
                        let [l] = k.ld_global::<f32, 1>(at(log));
                        let [x] = k.ld_global::<f32, 1>(at(delta));
                        less_max.set(-m);
                        less_log.set(-l);
                        d.set(x);
                    });
                    k.st_shared(to.at((8 * i).into()), [less_max, less_log]);
                    k.st_shared(to_delta.at((c.queries * 8 + 4 * i).into()), [d]);
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
        // And the turn that has not ended yet.
        let turns = self.dq_turns.map(|turns| (turns, k.var(0u64)));
        self.schedule.for_each(&self.tiles, |tile| {
            let work = tile.read();
            groups().for_each(|group| smem.dq_empty.of(group).arrive(k));
            let heads = self.tiles.heads[0];
            self.blocks(&work, |head, block| {
                let first = sums.first(work.batch * heads + head, work.sequence, work.queries);
                let number = first + block.cast();
                let mut to = Address::from(sums.block(number));
                if let Some((turns, last)) = turns {
                    let turn = turns.element(number, 4);
                    k.if_(elected, || self.take_turn(&work, block, turn, last));
                    last.set(turn);
                }
                for (i, group) in (0..).zip(groups()) {
                    smem.dq_full.of(group).sync(k);
                    let from = self.base + smem.dq + i * c.dq_pitch();
                    let bytes = c.dq_bytes(i);
                    k.if_(elected, || {
                        if bytes > 0 {
                            k.bulk_reduce_add(to, from, bytes);
                        }
                        k.tma_commit();
                    });
                    to = to.at(bytes.into());
                }
                for (i, group) in (0..).zip(groups()) {
                    k.when(elected, || k.tma_wait_read(GROUPS - 1 - i));
                    k.bar_warp_sync();
                    smem.dq_empty.of(group).arrive(k);
                }
            });
            if let Some((_, last)) = turns {
                k.if_(elected, || self.end_turn(last));
                last.set(0);
            }
            // Until a warpgroup was at its tile's end, where it waits for its last share, too: two arrivals in a row
            // would count for a warp of it that is not there yet.
            groups().for_each(|group| smem.dq_full.of(group).sync(k));
        });
        k.when(elected, || k.tma_wait(0));
    }

    /// Ends the turn `before`, if there was one, and waits until the tiles before this one in the order have added to
    /// a block of queries; `turn` is where how many have is counted.
    ///
    /// It takes about as long until memory says whose turn it is as until what was added last is there, and a block's
    /// products take not much longer than both together. So it is asked before the last turn ends.
    ///
    /// The tiles of a head are taken in the order of their keys, by blocks of threads that run: whoever is waited for is at work, or has been.
    fn take_turn(
        &self,
        work: &WorkTile<'k>,
        block: Reg<'k, i32>,
        turn: Reg<'k, u64>,
        before: Reg<'k, u64>,
    ) {
        let (k, c) = (self.k, self.c);
        let of_queries = work.bounds.transposed(work.keys.count);
        let first = block * c.queries as i32;
        let last = (first + c.queries as i32).min(work.queries.count);
        let tiles = of_queries.blocks(first, last, c.keys());
        let tile = (work.first.cast::<u32>() / c.keys()).cast::<i32>();
        let mine = (tile - tiles.begin).cast::<u32>();
        let now = k.var(k.ld_acquire(turn));
        self.end_turn(before);
        k.loop_(|exit| {
            exit.when(now.eq(mine));
            now.set(k.ld_acquire(turn));
        });
    }

    /// Lets the next tile add to a block of queries as soon as what this one has added is there. No turn is 0.
    fn end_turn(&self, turn: Reg<'k, u64>) {
        let k = self.k;
        k.if_(turn.ne(0), || {
            k.tma_wait(0);
            k.red_release_add(turn);
        });
    }
}
