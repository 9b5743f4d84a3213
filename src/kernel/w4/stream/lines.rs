//! Codes of eight bits, which lie along K: each column of `W` is a line of its own.
//!
//! A block of 64 columns by 64 rows is copied as it lies. Of a column a lane has 16 rows that follow each other, four
//! for each `mma`; as a sum does not ask for the order of its terms, it has the same ones of `x`.
//!
//! ```text
//!             row  0 .. 15   16 .. 31   32 .. 47   48 .. 63
//!  column 0        lane 0    lane 1     lane 2     lane 3       16 bytes each: what a lane copied,
//!  column 1        lane 4    lane 5     lane 6     lane 7       it loads
//!  ⋮
//!  column 8        lane 0    lane 1     ⋮
//! ```

use super::STEPS;
use super::config::Config;
use super::copies::{Operands, PAIR, of_chunk};
use crate::kernel::ampere::swizzle::CHUNK;
use crate::kernel::multiprocessor::WARP;
use crate::kernel::w4::BLOCK;
use crate::kernel::w4::weight::{Load, Weight};
use crate::ptx::{Address, Kernel, Reg};

/// Lanes that share a column.
const TOGETHER: u32 = BLOCK / CHUNK;
/// Columns that a warp copies at once, and how often for a block.
const COLUMNS: u32 = WARP / TOGETHER;
const COPIES: u32 = BLOCK / COLUMNS;

/// A lane's copies.
pub struct LineCopies<'k> {
    cut: bool,
    /// Of its first column, for the next pair of blocks.
    from: Reg<'k, u64>,
    /// Bytes from one of its columns to the next.
    apart: Reg<'k, u64>,
    /// Columns from the first on that there are.
    columns: Reg<'k, u32>,
    /// Its first row in a block.
    row: Reg<'k, u32>,
    /// Rows of `W`.
    rows: Reg<'k, u32>,
}

impl<'k> LineCopies<'k> {
    pub fn new(
        config: &Config,
        operands: &Operands<'k>,
        line: Reg<'k, u64>,
        lane: Reg<'k, u32>,
        column: Reg<'k, u32>,
        first: Reg<'k, u32>,
    ) -> Self {
        let k = lane.kernel();
        let column = column * BLOCK + lane / TOGETHER;
        let row = lane % TOGETHER * CHUNK;
        let from =
            operands.weight.codes + column.wide() * line + (first * (PAIR * BLOCK) + row).wide();
        Self {
            cut: config.cut,
            from: k.var(from),
            apart: line * u64::from(COLUMNS),
            columns: operands.weight.n.max(column) - column,
            row,
            rows: operands.k,
        }
    }

    /// Begins to copy block `block` of the next pair, number `number` of all, to a slot. What is past the end becomes
    /// zeros. Both blocks of a pair have halves of the same lines: fetched one by one, 8192² took 24.2 µs for one row and 25.2 for
    /// 16 instead of 21.0 and 22.0 (H200, 2026-12-01, by events).
    pub fn copy(&self, block: u32, number: Reg<'k, u32>, slot: Reg<'k, u32>) {
        let k = slot.kernel();
        let bytes = self.cut.then(|| {
            let row = number * BLOCK + self.row;
            (self.rows.max(row) - row).min(CHUNK)
        });
        let to = slot + k.lane() * CHUNK;
        let from = k.var(self.from);
        for copy in 0..COPIES {
            let there = |bytes| k.select(self.columns.gt(copy * COLUMNS), bytes, 0);
            let to = to.at((copy * WARP * CHUNK).into());
            k.cp_async_line(to, from.at((block * BLOCK).into()), of_chunk(bytes.map(there)));
            from.increase(self.apart);
        }
    }

    /// Goes to the warp's next pair, so many further.
    pub fn advance(&self, pairs: u32) {
        self.from.increase(u64::from(pairs * PAIR * BLOCK));
    }
}

/// What a lane has of a slot's codes: for each eight columns a word for each step.
pub fn load<'k>(
    k: &'k Kernel,
    stage: Reg<'k, u32>,
    lane: Reg<'k, u32>,
) -> Vec<[Reg<'k, u32>; STEPS as usize]> {
    let at = stage + lane * CHUNK;
    (0..COPIES).map(|copy| k.ld_shared(at.at((copy * WARP * CHUNK).into()))).collect()
}

/// The chunks of a line of `x` that belong to them, the first of two, for a lane.
pub fn chunk<'k>(lane: Reg<'k, u32>) -> Reg<'k, u32> {
    lane % TOGETHER * 2
}

/// The right operands of all steps, given the address of the lane's first chunk and that of its second.
pub fn right<'k>(k: &'k Kernel, chunks: [Address<'k, u32>; 2]) -> Vec<[Reg<'k, u32>; 2]> {
    let steps = chunks.map(|at| {
        let [a, b, c, d] = k.ld_shared(at);
        [[a, b], [c, d]]
    });
    steps.concat()
}

/// The scales of blocks of 128 rows and columns, one for each pair of blocks of codes.
pub struct PairScales<'k> {
    weight: Weight<'k>,
    /// Which of a group's the columns have.
    column: Reg<'k, u32>,
    /// The warp's first pair, and how many it leaves to others before its next one.
    first: Reg<'k, u32>,
    step: u32,
    /// The last one.
    last: Reg<'k, u32>,
    /// Of as many pairs as a warp has lanes, one each.
    held: Reg<'k, u32>,
}

impl<'k> PairScales<'k> {
    /// Columns that share a scale, in blocks of codes.
    const COLUMNS: u32 = 2;

    pub fn new(
        c: &Config,
        operands: &Operands<'k>,
        column: Reg<'k, u32>,
        first: Reg<'k, u32>,
    ) -> Self {
        let k = column.kernel();
        let scales = Self {
            weight: operands.weight,
            column: column / Self::COLUMNS,
            first,
            step: c.together(),
            last: operands.pairs() - 1,
            held: k.var(0u32),
        };
        scales.load(k.var(0));
        scales
    }

    /// Those from the warp's pair `pair` on, before what follows a barrier.
    fn load(&self, pair: Reg<'k, u32>) {
        let group = (self.first + (pair + pair.kernel().lane()) * self.step).min(self.last);
        let at = self.weight.scales.at(group, self.column);
        self.held.set(self.weight.scale(at, Load::BeforeBarrier).cast());
    }

    /// That of the warp's pair `pair`: all of its lanes ask for each in turn.
    pub fn of(&self, pair: Reg<'k, u32>) -> Reg<'k, f32> {
        let k = pair.kernel();
        let lane = pair % WARP;
        k.if_(lane.eq(0) & pair.ne(0), || self.load(pair));
        k.shfl_idx(self.held, lane).cast()
    }
}
