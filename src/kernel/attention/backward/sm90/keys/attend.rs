//! Warpgroups with 64 keys of a tile each, against all blocks of queries.

use super::Backward;
use super::config::EXCHANGE_STAGES;
use super::pointwise::{Block, Context};
use super::store::Gradient;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::backward::sm90::schedule::Tile;
use crate::kernel::hopper::product::{Descriptor, Left, product};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{
    LINE, Lane, SLAB, SLAB_BYTES, WARPGROUP, Warpgroup, clear_lines, store,
};
use crate::ptx::Reg;

/// A multiplying warpgroup, with the registers and places in rings that it keeps.
struct Group<'k> {
    warps: Warpgroup<'k>,
    /// S and dP, of 64 keys and a block of queries.
    scores: Vec<Reg<'k, f32>>,
    grads: Vec<Reg<'k, f32>>,
    /// P and dS in pairs, as left operands.
    p: Vec<Reg<'k, u32>>,
    ds: Vec<Reg<'k, u32>>,
    dk: Vec<Reg<'k, f32>>,
    dv: Vec<Reg<'k, f32>>,
    dq: Vec<Reg<'k, f32>>,
    operands: Operands<'k>,
    /// Of the rings of queries and of what belongs to them, which have as many stages.
    place: Cursor<'k>,
    /// Of the ring of keys and of that of values.
    key_place: Cursor<'k>,
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

impl<'k> Backward<'k, '_> {
    /// A warpgroup's keys of all tiles of this block.
    pub(super) fn consume(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) {
        let g = self.group(thread, number);
        self.schedule.for_each(&self.tiles, |tile| self.attend(&g, tile));
    }

    fn group(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) -> Group<'k> {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let (at, keys) = (|offset: u32| self.base + offset, c.keys());
        let own = number * SLAB_BYTES;
        // The two warpgroups' dS lie apart by all stages.
        let ds_lines = EXCHANGE_STAGES * c.queries;
        let (ds, keys_across) = match c.divides_queries() {
            true => (at(smem.exchange) + own, at(smem.keys)),
            false => (at(smem.exchange), at(smem.keys) + number * (keys * LINE)),
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
                keys: Descriptor::along_k(at(smem.keys) + own, keys),
                values: Descriptor::along_k(at(smem.values) + own, keys),
                queries: Descriptor::along_k(at(smem.queries), c.queries),
                grads: Descriptor::along_k(at(smem.grads), c.queries),
                queries_across: Descriptor::across_k(at(smem.queries), c.queries),
                grads_across: Descriptor::across_k(at(smem.grads), c.queries),
                ds: Descriptor::along_k(ds, ds_lines),
                keys_across: Descriptor::across_k(keys_across, keys),
            },
            place: smem.query_ring.consumer(k, self.base),
            key_place: smem.key_ring.consumer(k, self.base),
            ds_stage: k.var(0),
        }
    }

    /// The gradients of a tile of keys.
    fn attend(&self, g: &Group<'k>, tile: Tile<'k, '_>) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let work = tile.read();
        let first = || tile.read().first + (g.warps.number * SLAB).cast();
        g.dk.iter().chain(&g.dv).for_each(|sum| sum.set(0.0));
        g.key_place.wait();
        if c.lengths != Lengths::Full {
            let left = work.keys.count - work.first;
            k.if_(left.lt(c.keys() as i32), || {
                clear_lines(g.warps, self.base + smem.keys, c.head_slabs(), c.keys(), left);
                g.key_place.of(smem.value_ring).wait();
                clear_lines(g.warps, self.base + smem.values, c.value_slabs(), c.keys(), left);
            });
        }
        self.for_each_block(tile, (g.warps, &first), |context, masked| {
            self.step(g, context, masked);
        });
        // Also of a tile without blocks, before others come.
        g.key_place.of(smem.value_ring).wait();
        // The other warpgroup is done with this one's dS, and dQ is on its way.
        smem.everyone.only().sync(k);
        for place in [g.key_place, g.key_place.of(smem.value_ring)] {
            self.release(g, place);
        }
        g.key_place.advance();
        smem.dq_empty.of(g.warps.number).sync(k);
        smem.dq_full.of(g.warps.number).arrive(k);
        let staged = |offset: u32, pitch: u32| self.base + offset + g.warps.number * pitch;
        let gradients = [
            Gradient { which: 0, sums: &g.dk, memory: staged(smem.exchange, c.exchange_pitch()) },
            Gradient { which: 1, sums: &g.dv, memory: staged(smem.dq, c.dq_pitch()) },
        ];
        self.store(g.warps, &tile.read(), first(), &gradients);
    }

    /// A block of queries of one head.
    fn step(&self, g: &Group<'k>, context: &Context<'k, '_>, masked: bool) {
        let (k, c, smem, half) = (self.k, self.c, &self.smem, self.c.half());
        let (of, stage) = (&g.operands, g.place.stage);
        let grad_place = g.place.of(smem.grad_ring);
        let block = Block { rows: g.place.of(smem.row_ring), lane: g.warps.lane, masked };

        g.place.wait();
        self.clear_block(g.warps, context, block, [smem.queries, c.head_slabs(), c.query_bytes()]);
        let queries = of.queries.stage(stage, c.query_bytes());
        product(half, &g.scores, Left::Shared(of.keys), queries, c.depths()[0], false);
        grad_place.wait();
        g.key_place.of(smem.value_ring).wait();
        self.clear_block(g.warps, context, block, [smem.grads, c.value_slabs(), c.grad_bytes()]);
        let grads = of.grads.stage(stage, c.grad_bytes());
        product(half, &g.grads, Left::Shared(of.values), grads, c.depths()[1], false);
        block.rows.wait();
        k.wgmma_wait(self.beside_probabilities());
        self.probabilities(&g.scores, &g.p, context, block);
        k.wgmma_wait(0);
        self.score_gradients(&g.ds, [&g.scores, &g.grads], block, |j| {
            self.pack_probabilities(&g.p[2 * j..][..2], &g.scores[4 * j..][..4]);
        });
        self.release_rows(block);
        let own = self.base + smem.exchange + g.warps.number * c.exchange_pitch();
        store::write_packed_columns(k, &g.ds, own + g.ds_stage, g.warps.lane);
        let across = of.grads_across.stage(stage, c.grad_bytes());
        product(half, &g.dv, Left::Registers(&g.p), across, c.queries, true);
        k.fence_proxy_async();
        smem.everyone.only().sync(k);
        let ds = of.ds.further(g.ds_stage);
        product(half, &g.dq, Left::Shared(ds), of.keys_across, c.keys(), false);
        k.wgmma_wait(1);
        self.release(g, grad_place);
        let across = of.queries_across.stage(stage, c.query_bytes());
        product(half, &g.dk, Left::Registers(&g.ds), across, c.queries, true);
        k.wgmma_wait(1);
        self.give_dq(g);
        k.wgmma_wait(0);
        self.release(g, g.place);
        g.place.advance();
        g.ds_stage.set(k.var(c.exchange_bytes()) - g.ds_stage);
    }

    /// Products that run while scores become probabilities. With a bias that takes branches, which products that
    /// are under way do not go through.
    fn beside_probabilities(&self) -> u32 {
        if self.c.score_mod.bias.is_some() { 0 } else { 1 }
    }

    /// Zeroes what a block's stage has after the last query: `offset` of the ring, columns, bytes of a stage.
    pub(super) fn clear_block(
        &self,
        warps: Warpgroup<'k>,
        context: &Context<'k, '_>,
        block: Block<'k>,
        [offset, columns, bytes]: [u32; 3],
    ) {
        let (k, c) = (self.k, self.c);
        // Only masked blocks may end past the last query.
        if block.masked && c.lengths != Lengths::Full {
            let left = context.tile.read().queries.count - context.block * c.queries as i32;
            let to = self.base + offset + block.rows.stage * bytes;
            k.if_(left.lt(c.queries as i32), || {
                clear_lines(warps, to, columns, c.queries, left);
            });
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
