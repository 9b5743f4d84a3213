//! The consumers: a warpgroup's 64 rows of a tile against all blocks of keys.

use super::Attention;
use super::config::QueryRelease;
use crate::kernel::attention::scores::FragmentScores;
use crate::kernel::attention::softmax::Softmax;
use crate::kernel::attention::work::{Ahead, Row, Tile, WorkTile};
use crate::kernel::attention::{Lengths, Mask};
use crate::kernel::hopper::barriers::RoundRobin;
use crate::kernel::hopper::product::{Descriptor, Left, product};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{LINE, Lane, SLAB, SLAB_BYTES, WARPGROUP, Warpgroup};
use crate::ptx::Reg;

/// A multiplying warpgroup, with the registers and places in rings that it keeps.
pub(super) struct Group<'k> {
    pub warps: Warpgroup<'k>,
    /// S: products of queries and keys.
    scores: Vec<Reg<'k, f32>>,
    /// P: their exponentials, in pairs, as a left operand.
    p: Vec<Reg<'k, u32>>,
    /// O: products of the exponentials and values.
    pub o: Vec<Reg<'k, f32>>,
    pub softmax: Softmax<'k>,
    queries: Descriptor<'k>,
    keys: Descriptor<'k>,
    values: Descriptor<'k>,
    query_place: Cursor<'k>,
    key_place: Cursor<'k>,
    value_place: Cursor<'k>,
    round_robin: Option<RoundRobin<'k>>,
}

/// The tiles before and after a tile.
#[derive(Clone, Copy)]
struct Neighbours<'k, 'a> {
    before: Before<'k>,
    ahead: &'a Ahead<'k, 'a>,
}

#[derive(Clone, Copy)]
struct Before<'k> {
    /// Not 0 if its last product has not begun.
    open: Reg<'k, u32>,
    tile: Tile<'k>,
}

/// What the blocks of a tile have in common.
struct Context<'k, 'w> {
    work: &'w WorkTile<'k>,
    scores: FragmentScores<'k>,
    /// The positions of the thread's rows in their sequence.
    positions: [Reg<'k, i32>; 2],
    /// The current block of keys.
    block: Reg<'k, i32>,
    /// The thread's first column of a block.
    col: Reg<'k, i32>,
}

impl<'k> Context<'k, '_> {
    /// The key of the thread's first column.
    fn first_key(&self, keys: u32) -> Reg<'k, i32> {
        self.block * keys as i32 + self.col
    }

    /// Whether the block at work is the tile's last one, which has its first keys.
    fn is_last(&self) -> Reg<'k, bool> {
        self.block.le(self.work.blocks.begin)
    }

    /// Hides scores, the thread's first column of which is key `first`.
    fn hide(&self, g: &Group<'k>, first: Reg<'k, i32>) {
        self.work.bounds.hide(&g.scores, self.positions, first);
    }
}

impl<'k> Attention<'k, '_> {
    /// A warpgroup's rows of all tiles of this block.
    pub(super) fn consume(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let group = self.group(thread, number);
        // The first turn is the first group's.
        let (first, last) = (number.eq(0), number.eq(c.consumers() - 1));
        if let Some(round_robin) = group.round_robin {
            k.if_(last, || round_robin.pass(k));
        }
        if c.overlaps_tail() {
            let before = Before { open: k.var(0), tile: self.tiles.unset() };
            self.tiles.for_each_ahead(|work, ahead| {
                self.attend(&group, &work, Some(Neighbours { before, ahead }));
            });
        } else {
            self.tiles.for_each(|work| self.attend(&group, &work, None));
        }
        if let Some(round_robin) = group.round_robin {
            k.if_(first, || round_robin.wait(k));
        }
        if self.out_map.is_some() {
            k.when(group.warps.leader, || k.tma_wait_read(0));
        }
    }

    fn group(&self, thread: Reg<'k, u32>, number: Reg<'k, u32>) -> Group<'k> {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let zero = k.var(0);
        let next = k.select(number.eq(c.consumers() - 1), zero, number + 1);
        Group {
            warps: Warpgroup {
                number,
                lane: Lane::new(thread),
                leader: (thread % WARPGROUP).eq(0),
                meeting: smem.meeting,
            },
            scores: (0..c.keys / 2).map(|_| k.reg()).collect(),
            p: (0..c.keys / 4).map(|_| k.reg()).collect(),
            o: (0..c.variant.value_dim / 2).map(|_| k.reg()).collect(),
            softmax: self.score_params.softmax(),
            queries: Descriptor::along_k(self.base + smem.queries, SLAB),
            keys: Descriptor::along_k(self.base + smem.keys, c.keys),
            values: Descriptor::across_k(self.base + smem.values, c.keys),
            query_place: smem.query_ring.owner(k, self.base, number),
            key_place: smem.key_ring.consumer(k, self.base),
            value_place: smem.value_ring.consumer(k, self.base),
            round_robin: smem
                .round_robin
                .map(|all| RoundRobin { mine: all.of(number), next: all.of(next) }),
        }
    }

    /// This thread's rows of a tile, and whether they are queries of the tensor.
    pub(super) fn rows(&self, g: &Group<'k>, tile: &Tile<'k>) -> [Row<'k>; 2] {
        let c = self.c;
        let first = tile.first + (g.warps.number * c.positions()).cast();
        let row = g.warps.lane.warp * 16 + g.warps.lane.lane / 4;
        let used = (c.used_rows() < SLAB).then(|| c.used_rows());
        [row, row + 8].map(|row| self.tiles.row(tile, first, row, used))
    }

    /// Attends a tile. With neighbours, its last product is left to the next tile if that has keys, which
    /// begins it together with its own first one.
    fn attend(&self, g: &Group<'k>, work: &WorkTile<'k>, neighbours: Option<Neighbours<'k, '_>>) {
        let (k, c, blocks) = (self.k, self.c, work.blocks);
        let Tile { queries, keys, .. } = work.tile;
        let rows = self.rows(g, &work.tile).map(|row| row.query);
        let scores = self.score_params.of_queries(rows, queries.count, keys.count - queries.count);
        let col = (g.warps.lane.lane % 4 * 2).cast::<i32>();
        let block = k.var(blocks.end - 1);
        let context = Context { work, scores, positions: rows.map(|row| row.row), block, col };
        let some = blocks.some();
        g.query_place.wait();
        let first = || k.if_else(some, || self.first(g, &context, None), || self.nothing(g));
        match neighbours {
            None => first(),
            Some(near) => k.if_else(
                near.before.open.ne(0),
                || self.first(g, &context, Some(near)),
                || {
                    near.ahead.look();
                    first();
                },
            ),
        }
        block.increase(-1);
        blocks.walk(block, |masked| {
            self.step(g, &context, masked);
            block.increase(-1);
        });
        self.release_queries(g, QueryRelease::AtTheEnd, None);
        let end = || {
            k.if_(some, || {
                g.value_place.wait();
                self.multiply_values(g);
                k.wgmma_wait(0);
                self.release(g, g.value_place);
            });
            self.store(g, &work.tile, g.softmax.finish(c.variant.stats));
        };
        match neighbours {
            None => end(),
            Some(Neighbours { before, ahead }) => {
                let open = some & ahead.has_keys();
                k.if_(!open, end);
                before.open.set(k.select(open, k.var(1), 0));
                before.tile.set(&work.tile);
            }
        }
        self.release_queries(g, QueryRelease::Stored, None);
        g.query_place.skip(k.var(c.consumers()));
    }

    /// A tile without keys.
    fn nothing(&self, g: &Group<'k>) {
        // Products keep the warps together; without any, one could still wait for the queries that
        // another has let go.
        g.warps.sync();
        g.o.iter().for_each(|sum| sum.set(0.0));
        g.softmax.reset();
        self.release_queries(g, QueryRelease::Multiplied, None);
    }

    /// A tile's first block of keys, and with it the end of an open tile.
    fn first(&self, g: &Group<'k>, context: &Context<'k, '_>, open: Option<Neighbours<'k, '_>>) {
        let (k, c, work) = (self.k, self.c, context.work);
        let (first, keys) = (context.first_key(c.keys), work.tile.keys.count);
        g.key_place.wait();
        match open {
            None => self.multiply_keys(g),
            Some(_) => self.multiply(g),
        }
        let ended = open.map(|Neighbours { before, ahead }| {
            ahead.look();
            (before.tile, g.softmax.finish(c.variant.stats))
        });
        let bias = context.scores.load(g.scores.len(), first, Some(keys));
        k.wgmma_wait(open.is_some().into());
        self.release(g, g.key_place);
        self.release_queries(g, QueryRelease::Multiplied, Some(context));
        context.scores.apply(&g.scores, &bias, first);
        let from = context.block * c.keys as i32;
        let beyond = work.bounds.beyond(from, c.keys);
        match c.variant.mask {
            Mask::None => k.if_(beyond, || context.hide(g, first)),
            Mask::Right | Mask::Window => context.hide(g, first),
        }
        let p = g.softmax.first(&g.scores);
        if open.is_some() {
            k.wgmma_wait(0);
            self.release(g, g.value_place);
        }
        self.pack_p(g, &p);
        if let Some((tile, finished)) = ended {
            self.store(g, &tile, finished);
        }
        g.o.iter().for_each(|sum| sum.set(0.0));
        if c.variant.lengths != Lengths::Full {
            k.if_(beyond, || self.clear_values(g, (keys - from).cast()));
        }
    }

    /// Another block of keys, and the values of the one before it.
    fn step(&self, g: &Group<'k>, context: &Context<'k, '_>, masked: bool) {
        let k = self.k;
        let first = context.first_key(self.c.keys);
        g.key_place.wait();
        self.multiply(g);
        // The block that ends past the last key was the first.
        let bias = context.scores.load(g.scores.len(), first, None);
        k.wgmma_wait(1);
        self.release(g, g.key_place);
        self.release_queries(g, QueryRelease::Multiplied, Some(context));
        context.scores.apply(&g.scores, &bias, first);
        if masked {
            context.hide(g, first);
        }
        let (p, factors) = g.softmax.next(&g.scores);
        k.wgmma_wait(0);
        self.release(g, g.value_place);
        self.pack_p(g, &p);
        for (i, sum) in g.o.iter().enumerate() {
            sum.scale(factors[i / 2 % 2]);
        }
    }

    /// Zeroes the stage's values from line `first` on: they are another sequence's or nobody's, and 0
    /// times what they are need not be 0. Each warpgroup does this itself.
    fn clear_values(&self, g: &Group<'k>, first: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        const UNIT: u32 = 16;
        let units = LINE / UNIT;
        g.value_place.wait();
        let stage = self.base + self.smem.values + g.value_place.stage * c.value_bytes();
        let thread = g.warps.lane.warp * 32 + g.warps.lane.lane;
        let to = stage + thread % units * UNIT;
        let zero = k.var(0u32);
        k.for_(first + thread / units, c.keys, WARPGROUP / units, |line| {
            let at = to + line * LINE;
            for slab in 0..c.value_slabs() {
                k.st_shared(at.at((slab * c.keys * LINE).into()), [zero; 4]);
            }
        });
        k.fence_proxy_async();
        g.warps.sync();
    }

    /// Begins the products of the queries and a block of keys, and of exponentials and the block of values
    /// before it, when it is this warpgroup's turn.
    fn multiply(&self, g: &Group<'k>) {
        if let Some(round_robin) = g.round_robin {
            round_robin.wait(self.k);
        }
        self.multiply_keys(g);
        g.value_place.wait();
        self.multiply_values(g);
        if let Some(round_robin) = g.round_robin {
            round_robin.pass(self.k);
        }
    }

    /// Begins the product of the queries and a block of keys.
    fn multiply_keys(&self, g: &Group<'k>) {
        let c = self.c;
        let queries = g.queries.stage(g.query_place.stage, c.query_bytes());
        let keys = g.keys.stage(g.key_place.stage, c.key_bytes());
        product(c.half(), &g.scores, Left::Shared(queries), keys, c.variant.head_dim, false);
    }

    /// Begins the product of the exponentials and a block of values.
    fn multiply_values(&self, g: &Group<'k>) {
        let c = self.c;
        let values = g.values.stage(g.value_place.stage, c.value_bytes());
        product(c.half(), &g.o, Left::Registers(&g.p), values, c.keys, true);
    }

    /// Packs exponentials.
    fn pack_p(&self, g: &Group<'k>, exponentials: &[Reg<'k, f32>]) {
        for (&to, pair) in g.p.iter().zip(exponentials.chunks(2)) {
            self.k.cvt_rn_x2_to(to, self.c.half(), pair[0], pair[1]);
        }
    }

    /// This warpgroup has read a stage.
    fn release(&self, g: &Group<'k>, place: Cursor<'k>) {
        let done = place.done();
        self.k.when(g.warps.leader, || done.arrive());
        place.advance();
    }

    /// Lets the next queries come, if the configuration says that they may now; with `at`, only after the
    /// tile's last block.
    fn release_queries(&self, g: &Group<'k>, when: QueryRelease, at: Option<&Context<'k, '_>>) {
        if self.c.query_release() != when {
            return;
        }
        let last = at.map(Context::is_last);
        let done = g.query_place.done();
        let one = last.map_or(g.warps.leader, |last| g.warps.leader & last);
        self.k.when(one, || done.arrive());
    }

    /// The address at which this warpgroup's part of the result is staged.
    pub(super) fn staged(&self, g: &Group<'k>) -> Reg<'k, u32> {
        let each = match self.c.store_stages {
            0 => self.c.query_bytes(),
            slabs => slabs * SLAB_BYTES,
        };
        self.base + self.smem.result + g.warps.number * each
    }
}
