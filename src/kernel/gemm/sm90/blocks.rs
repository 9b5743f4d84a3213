//! Sums of e4m3 in two places: those of a stage are added up in f32, of which tensor cores keep fewer bits. Where scales
//! change along the depth, they are multiplied with them before.
//!
//! Where there are registers for sums of two stages, those of one are added up while the products of the next are made:
//!
//! ```text
//! tensor cores   stage 0 │ stage 1       │ stage 2       │ ..
//! registers              │ add stage 0   │ add stage 1   │ ..
//! ```

use super::{Gemm, descriptor};
use crate::kernel::gemm::BLOCK;
use crate::kernel::gemm::share::Share;
use crate::kernel::gemm::sm90::Orient;
use crate::kernel::hopper::SLAB_BYTES;
use crate::kernel::hopper::barriers::Mbarrier;
use crate::kernel::hopper::product::{LeftStep, products};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{Lane, SLAB};
use crate::kernel::multiprocessor::WARP;
use crate::kernel::raster::Tile;
use crate::ptx::Reg;

/// The parameters: f32 `[rows, depth]` of the left operand and `[depth, blocks of columns]` of the right one.
#[derive(Clone, Copy)]
pub(super) struct BlockScales<'k> {
    pub rows: Reg<'k, u64>,
    pub cols: Reg<'k, u64>,
}

/// The scales of a tile: those of a thread's rows or columns of the left operand, and those of the right one's blocks:
/// one for the tile, or for each 64 of its columns.
///
/// Lanes that need the same scales hold those of some lines and stages, one each, and hand them round: each of four lanes
/// that share two rows loads one row's of each second stage, and does so two stages ahead.
struct TileScales<'k> {
    lines: Spread<'k>,
    blocks: Spread<'k>,
    /// The next stage of this block's share, and how many it has.
    stage: Reg<'k, u32>,
    stages: Reg<'k, u32>,
}

/// Scales of lines, or of blocks of columns, over lanes.
struct Spread<'k> {
    /// What a lane holds: each is of one of so many lines that follow each other.
    held: Vec<Held<'k>>,
    lines: u32,
    turns: Turns<'k>,
}

/// Which lane has what.
#[derive(Clone, Copy)]
struct Turns<'k> {
    /// Stages of a turn.
    stages: u32,
    /// The one that the lane holds of each turn.
    place: Reg<'k, u32>,
    /// The lane that holds the first line of the first one for this lane, and lanes from a stage's to the next one's.
    first: Reg<'k, u32>,
    step: u32,
}

/// What a lane holds: a scale of each turn.
struct Held<'k> {
    now: Reg<'k, f32>,
    /// Of the turn after this one, where there are registers for it.
    next: Option<Reg<'k, f32>>,
    /// Where the next one to load is, and bytes from a turn's to the next turn's.
    from: Reg<'k, u64>,
    apart: Reg<'k, u64>,
}

/// Columns of blocks whose scales a warp holds at most.
const MOST_BLOCKS: u32 = 4;

impl<'k> Turns<'k> {
    /// Of `rows` rows of a quad, of which each lane has one: row `lane % rows`.
    fn of_rows(lane: Reg<'k, u32>, rows: u32) -> Self {
        Self { stages: 4 / rows, place: lane % 4 / rows, first: lane / 4 * 4, step: rows }
    }

    /// Of the columns of eight lanes.
    fn of_columns(lane: Reg<'k, u32>) -> Self {
        Self { stages: 8, place: lane / 4, first: lane % 4, step: 4 }
    }

    /// Of blocks, of which each lane of four has one.
    fn of_blocks(lane: Reg<'k, u32>) -> Self {
        let none = lane.kernel().var(0);
        Self {
            stages: WARP / MOST_BLOCKS,
            place: lane / MOST_BLOCKS,
            first: none,
            step: MOST_BLOCKS,
        }
    }
}

impl<'k> Held<'k> {
    /// `from`: the lane's of the first turn. Loads that one, if it is `ahead` of its turn.
    fn new(
        from: Reg<'k, u64>,
        stride: Reg<'k, u64>,
        turns: Turns<'k>,
        stages: Reg<'k, u32>,
        ahead: bool,
    ) -> Self {
        let k = from.kernel();
        let from = k.var(from + turns.place.wide() * stride);
        let apart = stride * u64::from(turns.stages);
        let held = Self { now: k.reg(), next: ahead.then(|| k.reg()), from, apart };
        if let Some(next) = held.next {
            held.load(next, turns.place.lt(stages));
            held.from.increase(apart);
        }
        held
    }

    fn load(&self, to: Reg<'k, f32>, there: Reg<'k, bool>) {
        let k = to.kernel();
        k.when(there, || k.ld_global_nc_to(to, self.from));
    }

    /// A turn begins where `begins` holds, and the one to load is there where `there` does, too.
    fn turn(&self, begins: Reg<'k, bool>, there: Reg<'k, bool>) {
        let k = self.now.kernel();
        if let Some(next) = self.next {
            k.when(begins, || self.now.set(next));
        }
        self.load(self.next.unwrap_or(self.now), begins & there);
        k.when(begins, || self.from.increase(self.apart));
    }
}

impl<'k> Spread<'k> {
    /// How many there are for a stage.
    fn count(&self) -> usize {
        self.held.len() * self.lines as usize
    }

    /// Those of stage `stage` of `stages`, in the order of lines.
    fn next(&self, stage: Reg<'k, u32>, stages: Reg<'k, u32>) -> Vec<Reg<'k, f32>> {
        let (k, turns) = (stage.kernel(), self.turns);
        let at = stage % turns.stages;
        let ahead = if self.held[0].next.is_some() { turns.stages } else { 0 };
        let there = (stage + turns.place + ahead).lt(stages);
        self.held.iter().for_each(|held| held.turn(at.eq(0), there));
        let first = turns.first + at * turns.step;
        let of_line = |held: &Held<'k>, line: u32| {
            let lane = if line == 0 { first } else { first + line };
            k.shfl_idx(held.now.cast(), lane).cast()
        };
        let lines = |held| (0..self.lines).map(move |line| of_line(held, line));
        self.held.iter().flat_map(lines).collect()
    }
}

impl<'k> TileScales<'k> {
    /// Those of the next stage: of each block, a product of both for each line.
    fn next(&self) -> Vec<Reg<'k, f32>> {
        let lines = self.lines.next(self.stage, self.stages);
        let blocks = self.blocks.next(self.stage, self.stages);
        self.stage.increase(1);
        blocks.iter().flat_map(|&block| lines.iter().map(move |&line| line * block)).collect()
    }

    /// How many these are.
    fn count(&self) -> usize {
        self.lines.count() * self.blocks.count()
    }
}

/// The sums of a stage, and what they are multiplied with: of each block of columns, a scale for each line.
struct Part<'k> {
    sums: Vec<Reg<'k, f32>>,
    scales: Vec<Reg<'k, f32>>,
}

impl<'k> Gemm<'k, '_> {
    /// [`multiply`](Self::multiply), stage by stage, with scales of blocks if there are any.
    pub(super) fn promote(
        &self,
        sums: &[Vec<Reg<'k, f32>>],
        place: Cursor<'k>,
        tile: Tile<'k>,
        (thread, group, leader): (Reg<'k, u32>, Reg<'k, u32>, Reg<'k, bool>),
    ) {
        let (k, c) = (self.k, self.c);
        let first_rows = group * (c.m64_tiles() * SLAB_BYTES);
        let lhs = descriptor(self.base + self.smem.lhs + first_rows, c.lhs, c.rows, c.depth());
        let rhs = descriptor(self.base + self.smem.rhs, c.rhs, c.cols, c.depth());
        let Share { first, count } = self.share();
        let of_tile =
            |blocks| self.tile_scales(blocks, tile, Lane::new(thread), group, [first, count]);
        let scales = self.blocks.map(of_tile);
        // Begins a stage's products of the warpgroup's 64 rows number `m64`, and makes the stage's scales meanwhile.
        let begin = |part: &Part<'k>, m64: u32| {
            if m64 == 0 {
                place.wait();
            }
            let a = lhs.stage(place.stage, c.lhs_boxes().bytes).rows(m64);
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            products(c.factor(), &[&part.sums], c.depth(), false, |step| {
                ([LeftStep::Shared(a.operand(step))], b.operand(step))
            });
            if let Some(scales) = scales.as_ref().filter(|_| m64 == 0) {
                let next = scales.next();
                part.scales.iter().zip(next).for_each(|(to, from)| to.set(from));
            }
        };
        let add = |part: &Part<'k>, m64: u32| {
            let lines = scales.as_ref().map(|scales| scales.lines.count());
            let sums = &sums[m64 as usize];
            for (i, (sum, of_stage)) in sums.iter().zip(&part.sums).enumerate() {
                let line = match c.orient {
                    Orient::Plain => m64 as usize * 2 + i / 2 % 2,
                    Orient::Swapped => i / 4 * 2 + i % 2,
                };
                sum.set(match lines {
                    Some(lines) => {
                        let block = i / 32 % (part.scales.len() / lines);
                        of_stage.fma(part.scales[block * lines + line], *sum)
                    }
                    None => *of_stage + *sum,
                });
            }
        };
        let part = || Part {
            sums: sums[0].iter().map(|_| k.reg()).collect(),
            scales: (0..scales.as_ref().map_or(0, TileScales::count)).map(|_| k.reg()).collect(),
        };
        sums.iter().flatten().for_each(|sum| sum.set(0.0));
        if !c.two_parts() {
            let part = part();
            k.for_(0, count, 1, |_| {
                for m64 in 0..c.m64_tiles() {
                    begin(&part, m64);
                    k.wgmma_wait(0);
                    if m64 + 1 == c.m64_tiles() {
                        k.when(leader, || place.done().arrive());
                        place.advance();
                    }
                    add(&part, m64);
                }
            });
            return;
        }
        let (even, odd) = (part(), part());
        // The barrier of the stage whose products were begun last.
        let before = Mbarrier::unset(k);
        let go_on = |next: &Part<'k>, last: &Part<'k>| {
            begin(next, 0);
            let done = place.done();
            place.advance();
            k.wgmma_wait(1);
            k.when(leader, || before.arrive());
            before.set(done);
            add(last, 0);
        };
        let end = |last: &Part<'k>| {
            k.wgmma_wait(0);
            k.when(leader, || before.arrive());
            add(last, 0);
        };
        begin(&even, 0);
        before.set(place.done());
        place.advance();
        let others = count - 1;
        k.for_(0, others / 2, 1, |_| {
            go_on(&odd, &even);
            go_on(&even, &odd);
        });
        k.if_else(
            (others % 2).eq(0),
            || end(&even),
            || {
                go_on(&odd, &even);
                end(&odd);
            },
        );
    }

    fn tile_scales(
        &self,
        BlockScales { rows, cols }: BlockScales<'k>,
        tile: Tile<'k>,
        Lane { lane, warp }: Lane<'k>,
        group: Reg<'k, u32>,
        [first, stages]: [Reg<'k, u32>; 2],
    ) -> TileScales<'k> {
        let (k, c) = (self.k, self.c);
        let [m, n] = self.size;
        let [rows_of_group, _] = c.warpgroup_tile();
        let tile_row = tile.row * c.rows + group * rows_of_group;
        let tile_col = tile.col * c.cols;
        let (lines, col, of_each, turns): (Vec<_>, _, _, _) = match c.orient {
            Orient::Plain => {
                // A thread's rows are eight apart, and a block of 64.
                let mine = lane % 2 * 8 + lane / 2 % c.m64_tiles() * SLAB;
                let row = tile_row + (warp * 16 + lane / 4 + mine);
                let rows = 2 * c.m64_tiles();
                (vec![row], tile_col, rows, Turns::of_rows(lane, rows))
            }
            Orient::Swapped => {
                let col = tile_col + lane % 4 * 2;
                let pairs = (0..c.cols / 8).flat_map(|j| [0, 1].map(|i| col + (8 * j + i)));
                (pairs.collect(), tile_row, 1, Turns::of_columns(lane))
            }
        };
        let ahead = c.scales_ahead();
        let size = k.var(4u64);
        let held = |line: Reg<'k, u32>| {
            // Sums of rows that do not exist are not stored: any row will do.
            let row = tile.batch_row(c.batched, m, line.min(m - 1));
            let from = rows + (row.wide() * self.depth.wide() + first.wide()) * 4u64;
            Held::new(from, size, turns, stages, ahead)
        };
        let [_, extent] = c.orient.order([c.rows, c.cols]);
        let each = if BLOCK.is_multiple_of(extent) { extent } else { SLAB };
        let blocks = n.div_ceil(BLOCK);
        let column = col + (lane % MOST_BLOCKS).min(extent / each - 1) * each;
        let block = (column / BLOCK).min(blocks - 1);
        let from = cols + (first.wide() * blocks.wide() + block.wide()) * 4u64;
        let lines = Spread { held: lines.into_iter().map(held).collect(), lines: of_each, turns };
        let turns = Turns::of_blocks(lane);
        let held = vec![Held::new(from, blocks.wide() * 4u64, turns, stages, true)];
        let blocks = Spread { held, lines: extent / each, turns };
        TileScales { lines, blocks, stage: k.var(0), stages }
    }
}
