//! A warp's 16 rows of a tile against all blocks of keys.

use super::Attention;
use super::config::WARP;
use super::copies::Copies;
use super::lines::{Lines, Order};
use crate::kernel::attention::Mask;
use crate::kernel::attention::scores::Shape;
use crate::kernel::attention::softmax::Softmax;
use crate::kernel::attention::work::{Row, Work};
use crate::kernel::chunk::CHUNK;
use crate::ptx::{Address, Mma, Reg};

/// 16×16 elements, as `mma` takes them.
type Fragment<'k> = [Reg<'k, u32>; 4];

/// A thread, and the registers and places that it keeps.
pub(super) struct Thread<'k> {
    pub lane: Reg<'k, u32>,
    pub warp: Reg<'k, u32>,
    /// Products of queries and keys.
    scores: Vec<Reg<'k, f32>>,
    /// Products of the exponentials and values.
    pub sums: Vec<Reg<'k, f32>>,
    pub softmax: Softmax<'k>,
    /// The warp's, if they stay.
    queries: Vec<Fragment<'k>>,
    query_copies: Copies<'k>,
    /// Of keys and values.
    copies: [Copies<'k>; 2],
    /// Where the next block is from.
    pointers: [Reg<'k, u64>; 2],
    /// Where this lane finds its part of queries, keys and values, in the first stage.
    places: [Reg<'k, u32>; 3],
    /// Bytes from the first stage to the one at work.
    stage: Reg<'k, u32>,
}

/// What the blocks of a tile have in common.
struct Tile<'k, 'w> {
    work: &'w Work<'k>,
    shape: Shape<'k>,
    /// Of the thread's rows.
    positions: [Reg<'k, i32>; 2],
    /// The block at work.
    block: Reg<'k, i32>,
}

/// Where a lane finds its parts of lines, by what is XORed.
struct Places<'k> {
    lines: Lines,
    from: Vec<Reg<'k, u32>>,
}

impl<'k> Places<'k> {
    fn new(lines: Lines, start: Reg<'k, u32>) -> Self {
        let count = lines.steps().min(Lines::WIDTH / 16);
        let from = (0..count).map(|i| if i == 0 { start } else { start ^ (i * 2 * CHUNK) });
        Self { lines, from: from.collect() }
    }

    fn at(&self, block: u32, step: u32) -> Address<'k, u32> {
        let (xor, add) = self.lines.block(block, step);
        self.from[xor as usize].at(add.into())
    }
}

impl<'k> Attention<'k, '_> {
    /// This block's tiles.
    pub(super) fn run(&self) {
        let t = self.thread();
        self.tiles.for_each(|work| {
            let row = t.warp * 16 + t.lane / 4;
            let rows = [row, row + 8]
                .map(|row| self.tiles.row(&work, work.first, row, self.c.used_rows()));
            self.attend(&t, &work, rows);
            self.store(&t, &work, rows);
        });
    }

    fn thread(&self) -> Thread<'k> {
        let (k, c, plan) = (self.k, self.c, &self.plan);
        let thread = k.thread();
        let (lane, warp) = (thread % WARP, thread / WARP);
        let places = [plan.queries, plan.keys, plan.values].map(|region| self.base + region);
        let lines = [c.query_lines(), c.key_lines(), c.value_lines()];
        let copies =
            |i: usize| Copies::new(self.operands[i], lines[i], c.threads(), thread, places[i]);
        let kept = if c.kept { c.query_lines().steps() } else { 0 };
        Thread {
            lane,
            warp,
            scores: (0..c.keys / 2).map(|_| k.reg()).collect(),
            sums: (0..c.value_dim / 2).map(|_| k.reg()).collect(),
            softmax: Softmax::new(k, c.scores.plain().then_some(self.shaping.scale)),
            queries: (0..kept).map(|_| k.regs()).collect(),
            query_copies: copies(0),
            copies: [copies(1), copies(2)],
            pointers: k.regs(),
            places: [
                places[0] + warp * (16 * Lines::BYTES) + Lines::fragment(Order::Lines, lane),
                places[1] + Lines::fragment(Order::Chunks, lane),
                places[2] + Lines::fragment(Order::Lines, lane),
            ],
            stage: k.var(0u32),
        }
    }

    /// The sums of a tile's rows.
    fn attend(&self, t: &Thread<'k>, work: &Work<'k>, rows: [Row<'k>; 2]) {
        let (k, c, blocks) = (self.k, self.c, work.blocks);
        let queries = rows.map(|row| row.query);
        let positions = queries.map(|query| query.row);
        let offset = work.keys.count - work.queries.count;
        let shape = self.shaping.rows(queries, work.queries.count, offset);
        let block = k.var(blocks.end - 1);
        let tile = Tile { work, shape, positions, block };
        t.sums.iter().for_each(|sum| sum.set(0.0));
        t.softmax.reset();
        // All warps are done with the tile before.
        k.sync_block();
        k.if_(block.ge(blocks.begin), || {
            self.begin(t, &tile);
            self.turn(t, &tile, Turn::First);
            let walk = |to: Reg<'k, i32>, masked: bool| {
                let to = to.max(blocks.begin);
                k.loop_(|exit| {
                    exit.when(block.lt(to));
                    self.turn(t, &tile, Turn::Next { masked });
                });
            };
            if c.mask != Mask::None {
                walk(blocks.whole_end, true);
            }
            walk(blocks.whole_begin.unwrap_or(blocks.begin), false);
            if blocks.whole_begin.is_some() {
                walk(blocks.begin, true);
            }
        });
    }

    /// Begins to copy queries and the last block.
    fn begin(&self, t: &Thread<'k>, tile: &Tile<'k, '_>) {
        let (k, c, work) = (self.k, self.c, tile.work);
        t.query_copies.gather(work.batch, |line| {
            let row = self.tiles.row(work, work.first, line, c.used_rows());
            // Behind the last query there may be another sequence's.
            let some = row.some.unwrap_or(row.inside) & row.inside;
            (work.queries.at(row.query.row), row.query.head, some)
        });
        let first = tile.block * c.keys as i32;
        let left = work.keys.count - first;
        for (copies, pointer) in t.copies.iter().zip(t.pointers) {
            pointer.set(copies.begin(work.batch, work.kv_head, work.keys.at(first)));
            copies.next(pointer, t.stage, Some(left));
        }
        k.cp_async_commit();
    }

    /// A block of keys.
    fn turn(&self, t: &Thread<'k>, tile: &Tile<'k, '_>, turn: Turn) {
        let (k, c, work) = (self.k, self.c, tile.work);
        // It is there, and all warps are done with the one before.
        k.cp_async_wait(0);
        k.sync_block();
        k.if_(tile.block.gt(work.blocks.begin), || {
            let next = t.stage ^ self.plan.stage_bytes;
            for (copies, pointer) in t.copies.iter().zip(t.pointers) {
                copies.next(pointer, next, None);
            }
            k.cp_async_commit();
        });
        if turn == Turn::First {
            let places = Places::new(c.query_lines(), t.places[0]);
            for (&to, step) in t.queries.iter().zip(0..) {
                k.ldmatrix_to(to, places.at(0, step), false);
            }
        }
        let from = tile.block * c.keys as i32;
        let first = from + (t.lane % 4 * 2).cast::<i32>();
        // The block that ends behind the last key is the first.
        let limit = (turn == Turn::First).then_some(work.keys.count);
        let bias = tile.shape.load(t.scores.len(), first, limit);
        self.multiply_keys(t);
        tile.shape.apply(&t.scores, &bias, first);
        let hide = || work.sight.hide(&t.scores, tile.positions, first);
        match turn {
            Turn::First if c.mask == Mask::None => {
                k.if_(work.sight.beyond(from, c.keys), hide);
            }
            Turn::First | Turn::Next { masked: true } => hide(),
            Turn::Next { masked: false } => (),
        }
        let weights = match turn {
            Turn::First => t.softmax.first(&t.scores),
            Turn::Next { .. } => {
                let (weights, factors) = t.softmax.next(&t.scores);
                for (i, sum) in t.sums.iter().enumerate() {
                    sum.scale(factors[i / 2 % 2]);
                }
                weights
            }
        };
        let pairs = weights.chunks(2).map(|pair| k.pack(c.half, pair[0], pair[1]));
        self.multiply_values(t, &pairs.collect::<Vec<_>>());
        t.stage.set(t.stage ^ self.plan.stage_bytes);
        tile.block.increase(-1);
    }

    /// The products of the warp's queries and a block of keys.
    fn multiply_keys(&self, t: &Thread<'k>) {
        let (k, c) = (self.k, self.c);
        let queries = Places::new(c.query_lines(), t.places[0]);
        let keys = Places::new(c.key_lines(), t.places[1] + t.stage);
        t.scores.iter().for_each(|score| score.set(0.0));
        for step in 0..c.query_lines().steps() {
            let kept = t.queries.get(step as usize).copied();
            let a = kept.unwrap_or_else(|| k.ldmatrix(queries.at(0, step), false));
            for (scores, block) in t.scores.chunks(8).zip(0..) {
                self.multiply(scores, a, k.ldmatrix(keys.at(block, step), false));
            }
        }
    }

    /// Adds the products of the exponentials and a block of values.
    fn multiply_values(&self, t: &Thread<'k>, weights: &[Reg<'k, u32>]) {
        let (k, c) = (self.k, self.c);
        let values = Places::new(c.value_lines(), t.places[2] + t.stage);
        for (a, block) in weights.chunks(4).zip(0..) {
            let a = a.try_into().expect("keys are a multiple of 16");
            for (sums, step) in t.sums.chunks(8).zip(0..) {
                self.multiply(sums, a, k.ldmatrix(values.at(block, step), true));
            }
        }
    }

    /// Adds a product of 16×16 elements to 16 columns, or to the 8 that there are.
    fn multiply(&self, sums: &[Reg<'k, f32>], a: Fragment<'k>, b: Fragment<'k>) {
        for (sums, b) in sums.chunks(4).zip(b.chunks(2)) {
            let sums = sums.try_into().expect("columns are a multiple of 8");
            self.k.mma(self.c.half, sums, Mma { a, b: [b[0], b[1]] });
        }
    }
}

/// Which block of a tile.
#[derive(Clone, Copy, PartialEq)]
enum Turn {
    First,
    Next { masked: bool },
}
