//! A warp's m16 tiles, of 16 rows each, against all blocks of keys.

use super::Attention;
use crate::kernel::Element;
use crate::kernel::ampere::copies::Copies;
use crate::kernel::ampere::product::{self, Fragment, Lines, M16};
use crate::kernel::ampere::swizzle::MatrixOrder;
use crate::kernel::ampere::tf32x3;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::Mask;
use crate::kernel::attention::scores::FragmentScores;
use crate::kernel::attention::softmax::Softmax;
use crate::kernel::attention::work::{Row, Tile, WorkTile};
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Half, Kernel, Reg};

/// A thread, with the registers and addresses that it keeps.
pub(super) struct Thread<'k> {
    pub m16_tiles: Vec<M16Tile<'k>>,
    /// The copies of keys and of values.
    copies: [Copies<'k>; 2],
    /// Where the next block of each comes from.
    pointers: [Reg<'k, u64>; 2],
    /// Where this lane finds its part of queries, keys and values, in the first stage.
    pub places: [Reg<'k, u32>; 3],
    /// Bytes from the first stage to the current one.
    pub stage: Reg<'k, u32>,
}

/// A thread's place. It is computed where it is needed: what is kept all the time takes registers.
#[derive(Clone, Copy)]
pub(super) struct Lane<'k> {
    thread: Reg<'k, u32>,
    pub lane: Reg<'k, u32>,
    warp: Reg<'k, u32>,
}

impl<'k> Lane<'k> {
    fn new(k: &'k Kernel) -> Self {
        let thread = k.thread();
        Self { thread, lane: thread % WARP, warp: thread / WARP }
    }
}

/// 16 of a warp's rows.
pub(super) struct M16Tile<'k> {
    /// S: products of queries and keys.
    pub scores: Vec<Reg<'k, f32>>,
    /// O: products of the exponentials and values.
    pub o: Vec<Reg<'k, f32>>,
    pub softmax: Softmax<'k>,
    /// The queries, if they stay in registers.
    pub queries: Vec<Fragment<'k>>,
}

/// What the blocks of a tile have in common.
struct Context<'k, 'w> {
    work: &'w WorkTile<'k>,
    /// The rows of each m16 tile.
    rows: Vec<FragmentRows<'k>>,
    /// The current block of keys.
    block: Reg<'k, i32>,
}

/// What the scores of a thread's two rows of an m16 tile depend on.
struct FragmentRows<'k> {
    scores: FragmentScores<'k>,
    positions: [Reg<'k, i32>; 2],
}

impl<'k> Attention<'k, '_> {
    /// This block's tiles.
    pub(super) fn run(&self) {
        let t = self.thread();
        self.tiles.for_each(|work| {
            self.attend(&t, &work);
            let lane = Lane::new(self.k);
            for (m16, rows) in t.m16_tiles.iter().zip(self.rows(&work.tile, lane)) {
                self.store(m16, &work.tile, lane, rows);
            }
        });
    }

    /// A thread's rows of each m16 tile.
    fn rows(&self, tile: &Tile<'k>, lane: Lane<'k>) -> Vec<[Row<'k>; 2]> {
        let row = lane.warp * self.c.warp_rows() + lane.lane / 4;
        let row = |below: u32| {
            let row = if below == 0 { row } else { row + below };
            self.tiles.row(tile, tile.first, row, self.c.used_rows())
        };
        (0..self.c.m16_tiles).map(|m16| [0, 8].map(|h| row(M16 * m16 + h))).collect()
    }

    fn thread(&self) -> Thread<'k> {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let Lane { thread, lane, warp } = Lane::new(k);
        let places = [smem.queries, smem.keys, smem.values].map(|region| self.base + region);
        let copies =
            |i: usize, lines| Copies::new(self.operands[i], lines, c.threads(), thread, places[i]);
        let in_regs = if c.q_in_regs { c.query_tile().steps() } else { 0 };
        let m16 = || M16Tile {
            scores: (0..c.keys / 2).map(|_| k.reg()).collect(),
            o: (0..c.columns() / 2).map(|_| k.reg()).collect(),
            softmax: self.score_params.softmax(),
            queries: (0..in_regs).map(|_| k.regs()).collect(),
        };
        Thread {
            m16_tiles: (0..c.m16_tiles).map(|_| m16()).collect(),
            copies: [copies(1, c.key_tile()), copies(2, c.value_tile())],
            pointers: k.regs(),
            places: [
                places[0]
                    + warp * (c.warp_rows() * SwizzledTile::BYTES)
                    + SwizzledTile::fragment(MatrixOrder::Lines, lane),
                places[1] + SwizzledTile::fragment(MatrixOrder::Chunks, lane),
                places[2]
                    + match c.element {
                        Element::Half(_) => SwizzledTile::fragment(MatrixOrder::Lines, lane),
                        Element::F32 => SwizzledTile::quads(lane),
                    },
            ],
            stage: k.var(0u32),
        }
    }

    /// Attends a tile: its rows against all of its blocks of keys.
    fn attend(&self, t: &Thread<'k>, work: &WorkTile<'k>) {
        let (k, blocks) = (self.k, work.blocks);
        let offset = work.tile.keys.count - work.tile.queries.count;
        let fragment = |rows: &[Row<'k>; 2]| {
            let queries = rows.map(|row| row.query);
            let scores = self.score_params.of_queries(queries, work.tile.queries.count, offset);
            FragmentRows { scores, positions: queries.map(|query| query.row) }
        };
        let rows = self.rows(&work.tile, Lane::new(k));
        let block = k.var(blocks.end - 1);
        let context = Context { work, rows: rows.iter().map(fragment).collect(), block };
        for m16 in &t.m16_tiles {
            m16.o.iter().for_each(|sum| sum.set(0.0));
            m16.softmax.reset();
        }
        // All warps are done with the tile before.
        k.sync_block();
        k.if_(block.ge(blocks.begin), || {
            self.begin(t, &context);
            self.key_block(t, &context, KeyBlock::First);
            blocks.walk(block, |masked| self.key_block(t, &context, KeyBlock::Next { masked }));
        });
    }

    /// Begins to copy queries and the last block.
    fn begin(&self, t: &Thread<'k>, context: &Context<'k, '_>) {
        let (k, c, work) = (self.k, self.c, context.work);
        let (thread, to) = (k.thread(), self.base + self.smem.queries);
        let queries = Copies::new(self.operands[0], c.query_tile(), c.threads(), thread, to);
        queries.gather(work.tile.batch, |line| {
            let row = self.tiles.row(&work.tile, work.tile.first, line, c.used_rows());
            // After the last query there may be another sequence's.
            let some = row.some.unwrap_or(row.inside) & row.inside;
            (work.tile.queries.at(row.query.row), row.query.head, some)
        });
        let first = context.block * c.keys as i32;
        let left = work.tile.keys.count - first;
        for (copies, pointer) in t.copies.iter().zip(t.pointers) {
            pointer.set(copies.begin(work.tile.batch, work.kv_head, work.tile.keys.at(first)));
            copies.next(pointer, t.stage, Some(left));
        }
        k.cp_async_commit();
    }

    /// One block of keys: scores, probabilities, and their product with the values.
    fn key_block(&self, t: &Thread<'k>, context: &Context<'k, '_>, which: KeyBlock) {
        let (k, c, work) = (self.k, self.c, context.work);
        // The block is there, and all warps are done with the one before.
        k.cp_async_wait(0);
        k.sync_block();
        k.if_(context.block.gt(work.blocks.begin), || {
            let next = t.stage ^ self.smem.stage_bytes;
            for (copies, pointer) in t.copies.iter().zip(t.pointers) {
                copies.next(pointer, next, None);
            }
            k.cp_async_commit();
        });
        if which == KeyBlock::First && c.q_in_regs {
            let lines = c.query_tile();
            let queries = self.queries(t).fragments();
            for (m16, block) in t.m16_tiles.iter().zip(0..) {
                for (&to, step) in m16.queries.iter().zip(0..) {
                    k.ldmatrix_to(to, queries.at(lines.block(block, step)), false);
                }
            }
        }
        let from = context.block * c.keys as i32;
        let first = from + (k.lane() % 4 * 2).cast::<i32>();
        // The block that ends past the last key is the first.
        let limit = (which == KeyBlock::First).then_some(work.tile.keys.count);
        let load = |rows: &FragmentRows<'k>| rows.scores.load(c.keys as usize / 2, first, limit);
        // Products of f32 leave no registers for biases on their way.
        let biases: Vec<_> = match c.element {
            Element::Half(half) => {
                let biases = context.rows.iter().map(load).collect();
                self.multiply_keys(half, t);
                biases
            }
            Element::F32 => {
                let queries = self.queries(t);
                let left = (queries, queries.fragments());
                let wide = c.columns() > 192;
                tf32x3::multiply_lines(&scores(t), left, self.keys(t), wide);
                vec![]
            }
        };
        let mut p = Vec::new();
        for (i, (m16, rows)) in t.m16_tiles.iter().zip(&context.rows).enumerate() {
            match biases.get(i) {
                Some(bias) => rows.scores.apply(&m16.scores, bias, first),
                None => self.apply_apart(t, rows, &m16.scores, first, limit),
            }
            let hide = || work.bounds.hide(&m16.scores, rows.positions, first);
            match which {
                KeyBlock::First if c.variant.mask == Mask::None => {
                    k.if_(work.bounds.beyond(from, c.keys), hide);
                }
                KeyBlock::First | KeyBlock::Next { masked: true } => hide(),
                KeyBlock::Next { masked: false } => (),
            }
            p.push(self.probabilities(m16, which));
        }
        let sums: Vec<_> = t.m16_tiles.iter().map(|m16| &m16.o[..]).collect();
        let values = Lines { tile: c.value_tile(), start: t.places[2] + t.stage, region: 0 };
        match c.element {
            Element::Half(half) => product::add_lines(half, &sums, &p, values),
            // A predicate that always holds.
            Element::F32 => {
                tf32x3::add_lines(&sums, &p, values, || t.stage.lt(self.smem.bytes));
            }
        }
        t.stage.set(t.stage ^ self.smem.stage_bytes);
        context.block.increase(-1);
    }

    /// Turns products into scores, four at a time: there are no registers for more biases at once.
    fn apply_apart(
        &self,
        t: &Thread<'k>,
        rows: &FragmentRows<'k>,
        scores: &[Reg<'k, f32>],
        first: Reg<'k, i32>,
        limit: Option<Reg<'k, i32>>,
    ) {
        let apply = |quad: &[Reg<'k, f32>], first: Reg<'k, i32>| {
            let bias = rows.scores.load(quad.len(), first, limit);
            rows.scores.apply(quad, &bias, first);
        };
        if self.c.variant.score_mod.bias.is_none() {
            return apply(scores, first);
        }
        for (j, quad) in (0..).zip(scores.chunks(4)) {
            // A predicate that always holds.
            let always = t.stage.lt(self.smem.bytes);
            self.k.apart(always, || apply(quad, if j == 0 { first } else { first + 8 * j }));
        }
    }

    /// The warp's queries.
    fn queries(&self, t: &Thread<'k>) -> Lines<'k> {
        Lines { tile: self.c.query_tile(), start: t.places[0], region: 0 }
    }

    /// The products of the warp's queries and a block of keys.
    fn multiply_keys(&self, half: Half, t: &Thread<'k>) {
        let queries = self.queries(t);
        let at = queries.fragments();
        let left = |step: u32| {
            let left = t.m16_tiles.iter().zip(0..).map(|(m16, block)| {
                let in_regs = m16.queries.get(step as usize).copied();
                in_regs.unwrap_or_else(|| {
                    self.k.ldmatrix(at.at(queries.tile.block(block, step)), false)
                })
            });
            left.collect()
        };
        product::multiply_lines(half, &scores(t), left, self.keys(t));
    }

    fn keys(&self, t: &Thread<'k>) -> Lines<'k> {
        Lines { tile: self.c.key_tile(), start: t.places[1] + t.stage, region: 0 }
    }

    /// The exponentials of an m16 tile's scores, as a left operand; its accumulators shrink.
    fn probabilities(&self, m16: &M16Tile<'k>, which: KeyBlock) -> Vec<Fragment<'k>> {
        let exponentials = match which {
            KeyBlock::First => m16.softmax.first(&m16.scores),
            KeyBlock::Next { .. } => {
                let (exponentials, factors) = m16.softmax.next(&m16.scores);
                for (i, sum) in m16.o.iter().enumerate() {
                    sum.scale(factors[i / 2 % 2]);
                }
                exponentials
            }
        };
        match self.c.element {
            Element::Half(half) => product::left(half, &exponentials),
            Element::F32 => tf32x3::left(&exponentials),
        }
    }
}

/// The scores of each m16 tile.
fn scores<'t, 'k>(t: &'t Thread<'k>) -> Vec<&'t [Reg<'k, f32>]> {
    t.m16_tiles.iter().map(|m16| &m16.scores[..]).collect()
}

/// Which block of a tile.
#[derive(Clone, Copy, PartialEq)]
enum KeyBlock {
    First,
    Next { masked: bool },
}
