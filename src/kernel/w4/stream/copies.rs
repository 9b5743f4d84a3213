//! A lane's copies of what a block of codes needs.

use super::config::{Config, LINE, Slot};
use super::lines::LineCopies;
use crate::kernel::ampere::swizzle::CHUNK;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::gemm::Name;
use crate::kernel::multiprocessor::WARP;
use crate::kernel::w4::params::WeightNames;
use crate::kernel::w4::weight::{Rows, Weight};
use crate::kernel::w4::{BLOCK, BLOCK_BYTES};
use crate::ptx::{Kernel, Reg, Value};

/// Blocks of codes that a warp takes together: the rows of a group may be those of two.
pub const PAIR: u32 = 2;

/// What the kernel is given.
#[derive(Clone, Copy)]
pub struct Operands<'k> {
    x: Reg<'k, u64>,
    x_line: Reg<'k, u64>,
    pub m: Reg<'k, u32>,
    pub k: Reg<'k, u32>,
    pub weight: Weight<'k>,
}

impl<'k> Operands<'k> {
    /// Declares the parameters: those of all weights.
    pub fn params(k: &'k Kernel, c: &Config) -> (Self, Vec<Weight<'k>>) {
        let codes = |names: &WeightNames| {
            let bytes = c.scheme.codes.are_bytes();
            (k.pointer(names.codes), bytes.then(|| k.param(names.codes_line)))
        };
        // First what the first copies ask for, of four bits with groups just as much as the first line of the constants' cache
        // has of parameters, 48 bytes: a warp waits for each line.
        let (depth, m) = (k.param(Name::K), k.param(Name::M));
        let (x, x_line) = (k.pointer(Name::Lhs), k.param(Name::LhsLine));
        let all = Weight::params(k, c.scheme, c.weights, codes, |out| k.pointer(out));
        let m = if c.one_token() { k.var(1) } else { m };
        (Self { x, x_line, m, k: depth, weight: all[0] }, all)
    }

    /// Blocks of codes along K.
    fn blocks(&self) -> Reg<'k, u32> {
        self.k.div_ceil(BLOCK)
    }

    /// The same, in pairs.
    pub fn pairs(&self) -> Reg<'k, u32> {
        self.k.div_ceil(PAIR * BLOCK)
    }
}

/// A lane's copies, pair of blocks after pair.
pub struct Copies<'k> {
    k: &'k Kernel,
    cut: bool,
    slot: Slot,
    operands: Operands<'k>,
    lane: Reg<'k, u32>,
    /// The next pair, and how many a warp leaves to others before its next one.
    pair: Reg<'k, u32>,
    step: u32,
    codes: Reg<'k, u64>,
    /// Bytes of each block that are the warp's.
    code_bytes: u32,
    /// Codes that are bytes.
    lines: Option<LineCopies<'k>>,
    /// Rows of `x`: of each some lanes have a chunk.
    x: Vec<Reg<'k, u64>>,
    x_place: Reg<'k, u32>,
    x_chunk: Reg<'k, u32>,
    x_mine: Option<Reg<'k, bool>>,
    groups: Vec<GroupCopies<'k>>,
}

/// A lane's copies of scales or zero points.
struct GroupCopies<'k> {
    pointer: Reg<'k, u64>,
    /// Bytes from a row of groups to the next.
    line: Reg<'k, u64>,
    /// The row of the slot, and where in the slot.
    row: Reg<'k, u32>,
    to: u32,
    /// Rows of a slot, and of the weight.
    rows: u32,
    all: Reg<'k, u32>,
    rows_of_pair: u32,
    mine: Reg<'k, bool>,
    /// Bytes of a lane's columns, if not always a chunk.
    bytes: Option<Reg<'k, u32>>,
}

/// Bytes of a chunk: all of them where nothing is [cut off](Config::cut).
pub fn of_chunk<'k>(there: Option<Reg<'k, u32>>) -> Value<'k, u32> {
    there.map_or(CHUNK.into(), Value::from)
}

impl<'k> Copies<'k> {
    /// Of a warp whose first pair is `first`, for the rows of `x` from `token` on and the columns from
    /// `cols · column` on.
    pub fn new(
        config: &Config,
        operands: Operands<'k>,
        lane: Reg<'k, u32>,
        [token, column]: [Reg<'k, u32>; 2],
        first: Reg<'k, u32>,
    ) -> Self {
        let (k, slot) = (lane.kernel(), config.slot());
        let of_block = BLOCK / config.cols;
        let block = (column / of_block).mul_wide(operands.blocks()) + (first * PAIR).wide();
        let within = column % of_block * config.code_bytes() + lane * CHUNK;
        let codes = operands.weight.codes + block * u64::from(BLOCK_BYTES) + within.wide();
        let (line, chunk) = SwizzledTile::first_copy(lane);
        let together = SwizzledTile::lines_together(WARP);
        let x_lines = config.tokens.div_ceil(together);
        let row = first * (PAIR * BLOCK) + chunk * (CHUNK / 2);
        let x = (0..x_lines).map(|i| {
            if config.one_token() {
                // Of one row the other lanes copy nothing.
                return operands.x + row.wide() * 2u64;
            }
            // Sums of rows that do not exist are not stored: any row will do.
            let line = (token + line + i * together).min(operands.m - 1);
            operands.x + (line.wide() * operands.x_line + row.wide()) * 2u64
        });
        let x = x.collect();
        let along = operands.weight.codes_line;
        let lines = along.map(|line| LineCopies::new(config, &operands, line, lane, column, first));
        let groups = config.scheme.group.filter(|_| lines.is_none()).map_or(vec![], |_| {
            let scales = (operands.weight.scales, slot.scales);
            let zeros = operands.weight.zeros.map(|zeros| (zeros, slot.zeros));
            let copies =
                |(lines, to)| GroupCopies::new(config, &operands, lines, to, [lane, column], first);
            [Some(scales), zeros].into_iter().flatten().map(copies).collect()
        });
        Self {
            k,
            cut: config.cut,
            slot,
            operands,
            lane,
            pair: k.var(first),
            step: config.together(),
            codes: k.var(codes),
            code_bytes: config.code_bytes(),
            lines,
            x,
            x_place: SwizzledTile::place(line, chunk),
            x_chunk: chunk * (CHUNK / 2),
            x_mine: (config.tokens < together).then(|| lane.lt(config.tokens * LINE / CHUNK)),
            groups,
        }
    }

    /// Begins to copy block `block` of the next pair to a slot. What is past the end becomes zeros.
    pub fn copy(&self, block: u32, slot: Reg<'k, u32>) {
        let k = self.k;
        let number = self.pair * PAIR + block;
        match &self.lines {
            Some(lines) => lines.copy(block, number, slot),
            None => self.copy_packed(block, number, slot),
        }
        let bytes = of_chunk(self.cut.then(|| {
            let at = number * BLOCK + self.x_chunk;
            let left = self.operands.k.max(at) - at;
            left.min(CHUNK / 2) * 2
        }));
        // Four lines further, half of the eight permutations of a line further.
        let places = [slot + self.x_place, slot + (self.x_place ^ (LINE / 2))];
        for (i, from) in (0..).zip(&self.x) {
            let line = i * SwizzledTile::lines_together(WARP);
            let to = places[i as usize % 2].at((self.slot.x + line * LINE).into());
            let copy = || k.cp_async(to, from.at((block * LINE).into()), bytes);
            match self.x_mine {
                Some(mine) => k.when(mine, copy),
                None => copy(),
            }
        }
        for group in &self.groups {
            group.copy(self.pair, block, slot);
        }
    }

    /// The codes of a block.
    fn copy_packed(&self, block: u32, number: Reg<'k, u32>, slot: Reg<'k, u32>) {
        let k = self.k;
        let to = slot + self.lane * CHUNK;
        // Of a pair the first block is there.
        let bytes = of_chunk(
            (self.cut && block > 0)
                .then(|| k.select(number.lt(self.operands.blocks()), k.var(CHUNK), 0)),
        );
        for part in (0..self.code_bytes).step_by((WARP * CHUNK) as usize) {
            let from = self.codes.at((block * BLOCK_BYTES + part).into());
            k.cp_async(to.at(part.into()), from, bytes);
        }
    }

    /// Goes to the warp's next pair.
    pub fn advance(&self) {
        self.pair.increase(self.step);
        match &self.lines {
            Some(lines) => lines.advance(self.step),
            None => self.codes.increase(u64::from(self.step * PAIR * BLOCK_BYTES)),
        }
        for x in &self.x {
            x.increase(u64::from(self.step * PAIR * LINE));
        }
        for group in &self.groups {
            let rows = u64::from(self.step * group.rows_of_pair);
            group.pointer.increase(group.line * rows);
        }
    }
}

impl<'k> GroupCopies<'k> {
    fn new(
        config: &Config,
        operands: &Operands<'k>,
        lines: Rows<'k>,
        to: u32,
        [lane, column]: [Reg<'k, u32>; 2],
        first: Reg<'k, u32>,
    ) -> Self {
        let k = lane.kernel();
        let group = config.scheme.group.expect("there are groups");
        let rows = BLOCK.div_ceil(group);
        let rows_of_pair = PAIR * BLOCK / group;
        let chunks = config.cols * lines.size / CHUNK;
        let row = lane / chunks;
        let col = column * config.cols + lane % chunks * (CHUNK / lines.size);
        let line = lines.line * u64::from(lines.size);
        let pointer = (first * rows_of_pair + row).wide() * line;
        let pointer = lines.address + pointer + (col * lines.size).wide();
        // A row ends with a whole chunk.
        let bytes = config.cut.then(|| k.select(operands.weight.n.gt(col), k.var(CHUNK), 0));
        Self {
            pointer: k.var(pointer),
            line,
            row,
            to,
            rows,
            all: operands.k.div_ceil(group),
            rows_of_pair,
            mine: lane.lt(rows * chunks),
            bytes,
        }
    }

    fn copy(&self, pair: Reg<'k, u32>, block: u32, slot: Reg<'k, u32>) {
        // Both blocks of a pair share a row: it comes with the first one.
        if block * self.rows >= self.rows_of_pair {
            return;
        }
        let k = slot.kernel();
        let bytes = of_chunk(self.bytes.map(|bytes| {
            let row = pair * self.rows_of_pair + self.row + block * self.rows;
            k.select(row.lt(self.all), bytes, 0)
        }));
        let from = match block {
            0 => self.pointer,
            _ => self.pointer + self.line * u64::from(block * self.rows),
        };
        let to = slot + k.lane() * CHUNK;
        k.when(self.mine, || k.cp_async(to.at(self.to.into()), from, bytes));
    }
}
