//! The warpgroups that multiply: 64 queries of a tile each, against all blocks of keys.

use super::Backward;
use super::config::QUERIES;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::attention::scores::{FragmentScores, Query};
use crate::kernel::hopper::product::{Descriptor, Left, product};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{Lane, SLAB, SLAB_BYTES, WARPGROUP, Warpgroup, clear_lines};
use crate::ptx::Reg;

/// A multiplying warpgroup, with the registers and places in rings that it keeps.
pub(super) struct Group<'k> {
    pub warps: Warpgroup<'k>,
    /// S and dP, of 64 queries and a block of keys.
    scores: Vec<Reg<'k, f32>>,
    grads: Vec<Reg<'k, f32>>,
    /// dS in pairs, as a left operand.
    ds: Vec<Reg<'k, u32>>,
    pub dq: Vec<Reg<'k, f32>>,
    queries: Descriptor<'k>,
    result_grads: Descriptor<'k>,
    keys: Descriptor<'k>,
    values: Descriptor<'k>,
    keys_across: Descriptor<'k>,
    pub query_place: Cursor<'k>,
    key_place: Cursor<'k>,
    value_place: Cursor<'k>,
}

/// What the blocks of a tile have in common.
struct Context<'k, 'w> {
    work: &'w WorkTile<'k>,
    scores: FragmentScores<'k>,
    /// The positions of the thread's queries in their sequence.
    positions: [Reg<'k, i32>; 2],
    /// Of both: minus the maximum and minus the logarithm, and the delta.
    rows: [[Reg<'k, f32>; 3]; 2],
    /// The current block of keys.
    block: Reg<'k, i32>,
}

impl<'k> Backward<'k, '_> {
    /// A warpgroup's queries of all tiles of this block.
    pub(super) fn consume(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) {
        let g = self.group(thread, number);
        self.schedule.for_each(&self.tiles, |tile| self.attend(&g, &tile.read()));
    }

    fn group(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) -> Group<'k> {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let own = number * SLAB_BYTES;
        let floats = |count: u32| (0..count).map(|_| k.reg()).collect::<Vec<_>>();
        Group {
            warps: Warpgroup {
                number,
                lane: Lane::new(thread),
                leader: (thread % WARPGROUP).eq(0),
                meeting: smem.meeting,
            },
            scores: floats(c.keys / 2),
            grads: floats(c.keys / 2),
            ds: (0..c.keys / 4).map(|_| k.reg()).collect(),
            dq: floats(c.head_dim / 2),
            queries: Descriptor::along_k(self.base + smem.queries + own, QUERIES),
            result_grads: Descriptor::along_k(self.base + smem.grads + own, QUERIES),
            keys: Descriptor::along_k(self.base + smem.keys, c.keys),
            values: Descriptor::along_k(self.base + smem.values, c.keys),
            keys_across: Descriptor::across_k(self.base + smem.keys, c.keys),
            query_place: smem.query_ring.consumer(k, self.base),
            key_place: smem.key_ring.consumer(k, self.base),
            value_place: smem.value_ring.consumer(k, self.base),
        }
    }

    /// dQ of a tile of queries.
    fn attend(&self, g: &Group<'k>, work: &WorkTile<'k>) {
        let k = self.k;
        let row = g.warps.number * SLAB + g.warps.lane.warp * 16 + g.warps.lane.lane / 4;
        let row = work.first + row.cast();
        let positions = [row, row + 8];
        let queries = positions.map(|row| Query { batch: work.sequence, head: work.head, row });
        let offset = work.keys.count - work.queries.count;
        let scores = self.score_params.of_queries(queries, work.queries.count, offset);
        let rows = positions.map(|position| self.row(work, position));
        let block = k.var(work.blocks.end - 1);
        let context = Context { work, scores, positions, rows, block };
        g.dq.iter().for_each(|sum| sum.set(0.0));
        let grad_place = g.query_place.of(self.smem.grad_ring);
        g.query_place.wait();
        grad_place.wait();
        work.blocks.walk(block, |masked| {
            self.step(g, &context, masked);
            block.increase(-1);
        });
        self.store(g, work, positions);
        for place in [grad_place, g.query_place] {
            let done = place.done();
            k.when(g.warps.leader, || done.arrive());
        }
        g.query_place.advance();
    }

    /// What is known of a query.
    fn row(&self, work: &WorkTile<'k>, position: Reg<'k, i32>) -> [Reg<'k, f32>; 3] {
        let k = self.k;
        let [less_max, less_log, delta] = [0f32, f32::NEG_INFINITY, 0f32].map(|x| k.var(x));
        let head = work.batch * self.tiles.heads[0] + work.head;
        let row = head.mul_wide(self.tiles.size[0].cast::<u32>());
        let at = (row + work.queries.at(position).wide()) * 4u64;
        k.if_(position.lt(work.queries.count), || {
            let [m, l, d] = self.row_memory.map(|memory| k.ld_global::<f32, 1>(memory + at)[0]);
            less_max.set(-m);
            less_log.set(-l);
            delta.set(d);
        });
        [less_max, less_log, delta]
    }

    /// A block of keys.
    fn step(&self, g: &Group<'k>, context: &Context<'k, '_>, masked: bool) {
        let (k, c, smem, half) = (self.k, self.c, &self.smem, self.c.half());
        let left = context.work.keys.count - context.block * c.keys as i32;
        // Only masked blocks may end past the last key.
        let clear = |offset: u32, slabs: u32, stage: Reg<'k, u32>, bytes: u32| {
            if masked && c.lengths != Lengths::Full {
                let to = self.base + offset + stage * bytes;
                k.if_(left.lt(c.keys as i32), || clear_lines(g.warps, to, slabs, c.keys, left));
            }
        };
        let (key_stage, value_stage) = (g.key_place.stage, g.value_place.stage);
        g.key_place.wait();
        clear(smem.keys, c.head_slabs(), key_stage, c.key_bytes());
        let queries = g.queries.stage(g.query_place.stage, c.query_bytes());
        let keys = g.keys.stage(key_stage, c.key_bytes());
        product(half, &g.scores, Left::Shared(queries), keys, c.depths()[0], false);
        g.value_place.wait();
        clear(smem.values, c.value_slabs(), value_stage, c.value_bytes());
        let grads = g.result_grads.stage(g.query_place.stage, c.grad_bytes());
        let values = g.values.stage(value_stage, c.value_bytes());
        product(half, &g.grads, Left::Shared(grads), values, c.depths()[1], false);
        // With a bias probabilities take branches, which products that are under way do not go through.
        k.wgmma_wait(if c.score_mod.bias.is_some() { 0 } else { 1 });
        self.probabilities(g, context, masked);
        k.wgmma_wait(0);
        self.release(g, g.value_place);
        for (j, (p, grads)) in g.scores.chunks(4).zip(g.grads.chunks(4)).enumerate() {
            let ds: Vec<_> = (0..4).map(|i| p[i] * (grads[i] - context.rows[i / 2][2])).collect();
            for (&to, pair) in g.ds[2 * j..].iter().zip(ds.chunks(2)) {
                k.cvt_rn_x2_to(to, half, pair[0], pair[1]);
            }
        }
        let keys = g.keys_across.stage(key_stage, c.key_bytes());
        product(half, &g.dq, Left::Registers(&g.ds), keys, c.keys, true);
        k.wgmma_wait(0);
        self.release(g, g.key_place);
    }

    /// Turns scores into probabilities in place; under a soft cap times the slopes of the scores.
    fn probabilities(&self, g: &Group<'k>, context: &Context<'k, '_>, masked: bool) {
        let c = self.c;
        let first = context.block * c.keys as i32 + (g.warps.lane.lane % 4 * 2).cast::<i32>();
        let limit = masked.then_some(context.work.keys.count);
        let scale = self.score_params.scale_left();
        let quad = |j: i32, quad: &[Reg<'k, f32>]| {
            let at = if j == 0 { first } else { first + 8 * j };
            let slopes = scale.is_none().then(|| {
                let bias = context.scores.load(4, at, limit);
                context.scores.apply_with_slopes(quad, &bias, at)
            });
            if masked {
                context.work.bounds.hide(quad, context.positions, at);
            }
            for (i, &score) in quad.iter().enumerate() {
                let [max, log, _] = context.rows[i / 2];
                let less = match scale {
                    Some(scale) => score.fma(scale, max),
                    None => score + max,
                };
                score.set((less + log).exp2_ftz());
            }
            if let Some(slopes) = slopes {
                slopes.back(quad);
            }
        };
        for (j, four) in (0..).zip(g.scores.chunks(4)) {
            match c.score_mod.bias {
                None => quad(j, four),
                // Biases on their way would take the registers of sums.
                Some(_) => self.k.apart(g.key_place.stage.lt(c.key_stages), || quad(j, four)),
            }
        }
    }

    /// This warpgroup has read a stage.
    fn release(&self, g: &Group<'k>, place: Cursor<'k>) {
        let done = place.done();
        self.k.when(g.warps.leader, || done.arrive());
        place.advance();
    }
}
