//! Two warpgroups with the same 64 keys: one makes P and dV, the other dS and dK of it.

use super::Backward;
use super::config::EXCHANGE_STAGES;
use super::pointwise::{Block, Context};
use super::store::Gradient;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::backward::sm90::schedule::Tile;
use crate::kernel::hopper::product::{Descriptor, Left, product};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{Lane, WARPGROUP, Warpgroup, clear_lines};
use crate::ptx::Reg;

/// One of them.
struct Group<'k> {
    warps: Warpgroup<'k>,
    /// Whether it is the one that makes dV.
    of_values: bool,
    /// S or dP, of 64 keys and a block of queries.
    products: Vec<Reg<'k, f32>>,
    /// P or dS in pairs, as a left operand.
    left: Vec<Reg<'k, u32>>,
    /// dV or dK.
    sums: Vec<Reg<'k, f32>>,
    /// The keys or values, along their elements.
    rows: Descriptor<'k>,
    row_place: Cursor<'k>,
    /// Queries or gradients along their elements; and, as the right operand of sums over queries, the other
    /// ones.
    along: Descriptor<'k>,
    across: Descriptor<'k>,
    /// Of the rings of queries and of what belongs to them, which have as many stages.
    place: Cursor<'k>,
    /// The stage of P.
    exchange: Reg<'k, u32>,
}

impl<'k> Backward<'k, '_> {
    /// A warpgroup's gradients of all tiles of this block.
    pub(super) fn consume_wide(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) {
        let consume = |of_values: bool| {
            let g = self.wide_group(thread, number, of_values);
            if !of_values {
                (0..EXCHANGE_STAGES).for_each(|stage| self.p_empty(stage).arrive(self.k));
            }
            self.schedule.for_each(&self.tiles, |tile| self.attend_wide(&g, tile));
            if of_values {
                (0..EXCHANGE_STAGES).for_each(|stage| self.p_empty(stage).sync(self.k));
            }
        };
        self.k.if_else(number.eq(0), || consume(true), || consume(false));
    }

    fn p_empty(&self, stage: u32) -> crate::kernel::hopper::barriers::NamedBarrier<'k> {
        self.smem.p_empty.of(self.k.var(stage))
    }

    fn wide_group(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>, of_values: bool) -> Group<'k> {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let at = |offset: u32| self.base + offset;
        let (rows, ring, along, across, columns) = match of_values {
            true => (smem.keys, smem.key_ring, smem.queries, smem.grads, c.value_dim),
            false => (smem.values, smem.value_ring, smem.grads, smem.queries, c.head_dim),
        };
        Group {
            warps: Warpgroup {
                number,
                lane: Lane::new(thread),
                leader: (thread % WARPGROUP).eq(0),
                meeting: smem.meeting,
            },
            of_values,
            products: (0..c.queries / 2).map(|_| k.reg()).collect(),
            left: (0..c.queries / 4).map(|_| k.reg()).collect(),
            sums: (0..columns / 2).map(|_| k.reg()).collect(),
            rows: Descriptor::along_k(at(rows), c.keys()),
            row_place: ring.consumer(k, self.base),
            along: Descriptor::along_k(at(along), c.queries),
            across: Descriptor::across_k(at(across), c.queries),
            place: smem.query_ring.consumer(k, self.base),
            exchange: k.var(0),
        }
    }

    /// A gradient of a tile of keys.
    fn attend_wide(&self, g: &Group<'k>, tile: Tile<'k, '_>) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let work = tile.read();
        let (memory, slabs) = match g.of_values {
            true => (self.base + smem.keys, c.head_slabs()),
            false => (self.base + smem.values, c.value_slabs()),
        };
        g.sums.iter().for_each(|sum| sum.set(0.0));
        g.row_place.wait();
        if c.lengths != Lengths::Full {
            let left = work.keys.count - work.first;
            k.if_(left.lt(c.keys() as i32), || {
                clear_lines(g.warps, memory, slabs, c.keys(), left);
            });
        }
        self.for_each_block(tile, (g.warps, &|| tile.read().first), |context, masked| {
            self.step_wide(g, context, masked);
        });
        // Over what this warpgroup alone has read.
        let gradient = Gradient { which: usize::from(g.of_values), sums: &g.sums, memory };
        let work = tile.read();
        self.store(g.warps, &work, work.first, &[gradient]);
        self.release_wide(g, g.row_place);
        g.row_place.advance();
    }

    /// A block of queries of one head.
    fn step_wide(&self, g: &Group<'k>, context: &Context<'k, '_>, masked: bool) {
        let (k, c, smem, half) = (self.k, self.c, &self.smem, self.c.half());
        let stage = g.place.stage;
        let block = Block { rows: g.place.of(smem.row_ring), lane: g.warps.lane, masked };
        let queries = (g.place, [smem.queries, c.head_slabs(), c.query_bytes()]);
        let grads = (g.place.of(smem.grad_ring), [smem.grads, c.value_slabs(), c.grad_bytes()]);
        let (first, second) = if g.of_values { (queries, grads) } else { (grads, queries) };

        first.0.wait();
        self.clear_block(g.warps, context, block, first.1);
        let (along, depth) =
            (g.along.stage(stage, first.1[2]), c.depths()[usize::from(!g.of_values)]);
        product(half, &g.products, Left::Shared(g.rows), along, depth, false);
        block.rows.wait();
        let thread = g.warps.lane.warp * 32 + g.warps.lane.lane;
        let memory = self.base + smem.exchange + g.exchange * c.exchange_bytes() + thread * 16;
        let quad = |i: usize| memory.at(i as i64 * i64::from(WARPGROUP * 16));
        if g.of_values {
            k.wgmma_wait(0);
            self.release_wide(g, first.0);
            self.probabilities(&g.products, &g.left, context, block);
            smem.p_empty.of(g.exchange).sync(k);
            for (i, p) in g.products.chunks(4).enumerate() {
                k.st_shared(quad(i), [p[0], p[1], p[2], p[3]]);
            }
            smem.p_full.of(g.exchange).arrive(k);
            self.pack_probabilities(&g.left, &g.products);
        } else {
            smem.p_full.of(g.exchange).sync(k);
            let p: Vec<_> =
                (0..g.products.len() / 4).flat_map(|i| k.ld_shared::<f32, 4>(quad(i))).collect();
            k.wgmma_wait(0);
            self.release_wide(g, first.0);
            self.score_gradients(&g.left, [&p, &g.products], block, |_| ());
            smem.p_empty.of(g.exchange).arrive(k);
        }
        self.release_rows(block);
        second.0.wait();
        self.clear_block(g.warps, context, block, second.1);
        let across = g.across.stage(stage, second.1[2]);
        product(half, &g.sums, Left::Registers(&g.left), across, c.queries, true);
        k.wgmma_wait(0);
        self.release_wide(g, second.0);
        g.place.advance();
        g.exchange.set(g.exchange ^ 1);
    }

    /// This warpgroup has read a stage.
    fn release_wide(&self, g: &Group<'k>, place: Cursor<'k>) {
        let done = place.done();
        self.k.when(g.warps.leader, || done.arrive());
    }
}
