//! The warpgroups that multiply: 64 keys of a tile each, against all blocks of queries.

use super::Backward;
use super::config::{DS_STAGES, KEYS};
use crate::kernel::attention::Lengths;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::attention::scores::FragmentScores;
use crate::kernel::hopper::product::{Descriptor, Left, product};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{LINE, Lane, SLAB, SLAB_BYTES, WARPGROUP, Warpgroup, store};
use crate::ptx::Reg;

/// A multiplying warpgroup, with the registers and places in rings that it keeps.
pub(super) struct Group<'k> {
    pub warps: Warpgroup<'k>,
    /// S and dP, of 64 keys and a block of queries.
    scores: Vec<Reg<'k, f32>>,
    grads: Vec<Reg<'k, f32>>,
    /// P and dS in pairs, as left operands.
    p: Vec<Reg<'k, u32>>,
    ds: Vec<Reg<'k, u32>>,
    pub dk: Vec<Reg<'k, f32>>,
    pub dv: Vec<Reg<'k, f32>>,
    dq: Vec<Reg<'k, f32>>,
    operands: Operands<'k>,
    /// Of the rings of queries and of what belongs to them, which have as many stages.
    place: Cursor<'k>,
    key_place: Cursor<'k>,
    value_place: Cursor<'k>,
    /// Bytes from the first stage of dS to the current one.
    ds_stage: Reg<'k, u32>,
}

/// Where products find what is in shared memory.
struct Operands<'k> {
    /// This warpgroup's keys and values, along their elements.
    keys: Descriptor<'k>,
    values: Descriptor<'k>,
    /// Queries and gradients along their elements, and as the right operands of sums over queries.
    queries: Descriptor<'k>,
    grads: Descriptor<'k>,
    queries_across: Descriptor<'k>,
    grads_across: Descriptor<'k>,
    /// What this warpgroup multiplies for dQ.
    ds: Descriptor<'k>,
    keys_across: Descriptor<'k>,
}

/// What the blocks of a tile and a head have in common.
struct Context<'k, 'w> {
    work: &'w WorkTile<'k>,
    scores: FragmentScores<'k>,
    /// The positions of the thread's keys in their sequence.
    positions: [Reg<'k, i32>; 2],
    /// The current block of queries.
    block: Reg<'k, i32>,
}

impl<'k> Backward<'k, '_> {
    /// A warpgroup's keys of all tiles of this block.
    pub(super) fn consume(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) {
        let g = self.group(thread, number);
        self.tiles.for_each(|work| self.attend(&g, &work));
        self.k.when(g.warps.leader, || self.k.tma_wait_read(0));
    }

    fn group(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) -> Group<'k> {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let at = |offset: u32| self.base + offset;
        let own = number * SLAB_BYTES;
        // The two warpgroups' dS lie apart by all stages.
        let ds_lines = DS_STAGES * c.queries;
        let (ds, keys_across) = match c.divides_queries() {
            true => (at(smem.ds) + own, at(smem.keys)),
            false => (at(smem.ds), at(smem.keys) + number * (KEYS * LINE)),
        };
        let floats = |count: u32| (0..count).map(|_| k.reg()).collect::<Vec<_>>();
        let pairs = |count: u32| (0..count).map(|_| k.reg()).collect::<Vec<_>>();
        Group {
            warps: Warpgroup {
                number,
                lane: Lane::new(thread),
                leader: (thread % WARPGROUP).eq(0),
                meeting: smem.meeting,
            },
            scores: floats(c.queries / 2),
            grads: floats(c.queries / 2),
            p: pairs(c.queries / 4),
            ds: pairs(c.queries / 4),
            dk: floats(c.head_dim / 2),
            dv: floats(c.value_dim / 2),
            dq: floats(c.dq_columns() / 2),
            operands: Operands {
                keys: Descriptor::along_k(at(smem.keys) + own, KEYS),
                values: Descriptor::along_k(at(smem.values) + own, KEYS),
                queries: Descriptor::along_k(at(smem.queries), c.queries),
                grads: Descriptor::along_k(at(smem.grads), c.queries),
                queries_across: Descriptor::across_k(at(smem.queries), c.queries),
                grads_across: Descriptor::across_k(at(smem.grads), c.queries),
                ds: Descriptor::along_k(ds, ds_lines),
                keys_across: Descriptor::across_k(keys_across, KEYS),
            },
            place: smem.query_ring.consumer(k, self.base),
            key_place: smem.key_ring.consumer(k, self.base),
            value_place: smem.value_ring.consumer(k, self.base),
            ds_stage: k.var(0),
        }
    }

    /// The gradients of a tile of keys.
    fn attend(&self, g: &Group<'k>, work: &WorkTile<'k>) {
        let (k, c) = (self.k, self.c);
        let key = g.warps.number * SLAB + g.warps.lane.warp * 16 + g.warps.lane.lane / 4;
        let key = work.first + key.cast();
        let positions = [key, key + 8];
        g.dk.iter().chain(&g.dv).for_each(|sum| sum.set(0.0));
        g.key_place.wait();
        if c.lengths != Lengths::Full {
            let (first, left) = (self.base + self.smem.keys, work.keys.count - work.first);
            k.if_(left.lt(KEYS as i32), || {
                self.clear(g, first, c.head_slabs(), KEYS, left);
                g.value_place.wait();
                let first = self.base + self.smem.values;
                self.clear(g, first, c.value_slabs(), KEYS, left);
            });
        }
        let offset = work.keys.count - work.queries.count;
        self.heads(work, |head| {
            let of = (work.sequence, head);
            let scores = self.score_params.of_keys(positions, of, work.keys.count, offset);
            let block = k.var(work.blocks.end - 1);
            let context = Context { work, scores, positions, block };
            work.blocks.walk(block, |masked| {
                self.step(g, &context, masked);
                block.increase(-1);
            });
        });
        // The other warpgroup is done with this one's dS, and dQ is on its way.
        self.smem.everyone.only().sync(k);
        for place in [g.key_place, g.value_place] {
            let done = place.done();
            k.when(g.warps.leader, || done.arrive());
            place.advance();
        }
        self.smem.dq_empty.of(g.warps.number).sync(k);
        self.store(g, work, positions);
    }

    /// Zeroes lines from line `left` on, which are another sequence's or nobody's: 0 times what they are need
    /// not be 0. Each warpgroup does this itself.
    fn clear(&self, g: &Group<'k>, to: Reg<'k, u32>, slabs: u32, lines: u32, left: Reg<'k, i32>) {
        const UNIT: u32 = 16;
        let (k, units) = (self.k, LINE / UNIT);
        let thread = g.warps.lane.warp * 32 + g.warps.lane.lane;
        let to = to + thread % units * UNIT;
        let zero = k.var(0u32);
        k.for_(left.or_zero() + thread / units, lines, WARPGROUP / units, |line| {
            let at = to + line * LINE;
            for slab in 0..slabs {
                k.st_shared(at.at((slab * lines * LINE).into()), [zero; 4]);
            }
        });
        k.fence_proxy_async();
        g.warps.sync();
    }

    /// A block of queries of one head.
    fn step(&self, g: &Group<'k>, context: &Context<'k, '_>, masked: bool) {
        let (k, c, smem, half) = (self.k, self.c, &self.smem, self.c.half());
        let of = &g.operands;
        let first = context.block * c.queries as i32;
        let stage = g.place.stage;
        let (grad_place, row_place) = (g.place.of(smem.grad_ring), g.place.of(smem.row_ring));
        let left = context.work.queries.count - first;
        // Only masked blocks may end past the last query.
        let clear = |offset: u32, slabs: u32, bytes: u32| {
            if masked && c.lengths != Lengths::Full {
                k.if_(left.lt(c.queries as i32), || {
                    let to = self.base + offset + stage * bytes;
                    self.clear(g, to, slabs, c.queries, left);
                });
            }
        };

        g.place.wait();
        clear(smem.queries, c.head_slabs(), c.query_bytes());
        let queries = of.queries.stage(stage, c.query_bytes());
        product(half, &g.scores, Left::Shared(of.keys), queries, c.head_dim, false);
        grad_place.wait();
        g.value_place.wait();
        clear(smem.grads, c.value_slabs(), c.grad_bytes());
        let grads = of.grads.stage(stage, c.grad_bytes());
        product(half, &g.grads, Left::Shared(of.values), grads, c.value_dim, false);
        row_place.wait();
        k.wgmma_wait(1);
        self.probabilities(g, context, masked);
        k.wgmma_wait(0);
        self.score_gradients(g);
        let ds = self.base + smem.ds + g.warps.number * (DS_STAGES * c.ds_bytes()) + g.ds_stage;
        store::write_packed_columns(k, &g.ds, ds, g.warps.lane);

        let across = of.grads_across.stage(stage, c.grad_bytes());
        product(half, &g.dv, Left::Registers(&g.p), across, c.queries, true);
        k.fence_proxy_async();
        smem.everyone.only().sync(k);
        let ds = of.ds.further(g.ds_stage);
        product(half, &g.dq, Left::Shared(ds), of.keys_across, KEYS, false);
        k.wgmma_wait(1);
        self.release(g, grad_place);
        self.release(g, row_place);
        let across = of.queries_across.stage(stage, c.query_bytes());
        product(half, &g.dk, Left::Registers(&g.ds), across, c.queries, true);
        k.wgmma_wait(1);
        self.give_dq(g);
        k.wgmma_wait(0);
        self.release(g, g.place);
        g.place.advance();
        g.ds_stage.set(k.var(c.ds_bytes()) - g.ds_stage);
    }

    /// Turns scores into probabilities in place. Under a soft cap they are packed, and what is left in place is
    /// the probabilities times the slopes of the scores.
    fn probabilities(&self, g: &Group<'k>, context: &Context<'k, '_>, masked: bool) {
        let (k, c) = (self.k, self.c);
        let first = context.block * c.queries as i32 + (g.warps.lane.lane % 4 * 2).cast::<i32>();
        let rows = self.rows(g);
        let limit = masked.then_some(context.work.queries.count);
        let scale = self.score_params.scale_left();
        for (j, quad) in (0..).zip(g.scores.chunks(4)) {
            let at = if j == 0 { first } else { first + 8 * j };
            let slopes = match scale {
                Some(_) => None,
                None => {
                    let bias = context.scores.load(4, at, limit);
                    match c.score_mod.softcap {
                        false => {
                            context.scores.apply(quad, &bias, at);
                            None
                        }
                        true => Some(context.scores.apply_with_slopes(quad, &bias, at)),
                    }
                }
            };
            if masked {
                context.work.bounds.hide(quad, context.positions, at);
            }
            let [m0, l0, m1, l1] = k.ld_shared::<f32, 4>(rows.at((64 * j).into()));
            for (i, &score) in quad.iter().enumerate() {
                let (max, log) = if i % 2 == 0 { (m0, l0) } else { (m1, l1) };
                let less = match scale {
                    Some(scale) => score.fma(scale, max),
                    None => score + max,
                };
                score.set((less + log).exp2_ftz());
            }
            if let Some(slopes) = slopes {
                self.pack(&g.p[2 * j as usize..], quad);
                slopes.back(quad);
            }
        }
    }

    /// The address of what is known of the thread's first two queries.
    fn rows(&self, g: &Group<'k>) -> Reg<'k, u32> {
        let stage = self.base + self.smem.rows + g.place.stage * self.c.row_bytes();
        stage + g.warps.lane.lane % 4 * 16
    }

    /// dS, packed, of probabilities and dP; and the probabilities packed, unless they have been.
    fn score_gradients(&self, g: &Group<'k>) {
        let (k, c) = (self.k, self.c);
        let deltas = self.base + self.smem.rows + g.place.stage * c.row_bytes();
        let deltas = deltas + g.warps.lane.lane % 4 * 8;
        for (j, (p, grads)) in (0..).zip(g.scores.chunks(4).zip(g.grads.chunks(4))) {
            let delta = k.ld_shared::<f32, 2>(deltas.at((c.queries * 8 + 32 * j).into()));
            let ds: Vec<_> = (0..4).map(|i| p[i] * (grads[i] - delta[i % 2])).collect();
            if !c.score_mod.softcap {
                self.pack(&g.p[2 * j as usize..], p);
            }
            self.pack(&g.ds[2 * j as usize..], &ds);
        }
    }

    /// Packs four numbers of a fragment.
    fn pack(&self, to: &[Reg<'k, u32>], quad: &[Reg<'k, f32>]) {
        for (&to, pair) in to.iter().zip(quad.chunks(2)) {
            self.k.cvt_rn_x2_to(to, self.c.half(), pair[0], pair[1]);
        }
    }

    /// Hands over this warpgroup's dQ of the block.
    fn give_dq(&self, g: &Group<'k>) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        smem.dq_empty.of(g.warps.number).sync(k);
        let thread = g.warps.lane.warp * 32 + g.warps.lane.lane;
        let to = self.base + smem.dq + g.warps.number * c.dq_pitch() + thread * 16;
        for (i, quad) in (0..).zip(g.dq.chunks(4)) {
            k.st_shared(to.at((i * WARPGROUP * 16).into()), [quad[0], quad[1], quad[2], quad[3]]);
        }
        k.fence_proxy_async();
        smem.dq_full.of(g.warps.number).arrive(k);
    }

    /// This warpgroup has read a stage.
    fn release(&self, g: &Group<'k>, place: Cursor<'k>) {
        let done = place.done();
        self.k.when(g.warps.leader, || done.arrive());
    }
}
