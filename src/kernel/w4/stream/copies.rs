//! A lane's copies of what a block of codes needs.

use super::config::{Config, LINE, Slot};
use super::lines::LineCopies;
use crate::kernel::ampere::swizzle::CHUNK;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::gemm::Name;
use crate::kernel::multiprocessor::WARP;
use crate::kernel::w4::{BLOCK, BLOCK_BYTES, Scheme, WEIGHTS};
use crate::ptx::{Kernel, Reg};

/// Blocks of codes that a warp takes together: the rows of a group may be those of two.
pub const PAIR: u32 = 2;

/// What the kernel is given.
#[derive(Clone, Copy)]
pub struct Operands<'k> {
    x: Reg<'k, u64>,
    x_line: Reg<'k, u64>,
    pub codes: Reg<'k, u64>,
    /// Of bytes: from column to column.
    codes_line: Option<Reg<'k, u64>>,
    scales: Lines<'k>,
    /// Of bytes whose columns have one each, or all the same: from one to the next.
    pub scale_step: Option<Reg<'k, u32>>,
    zeros: Option<Lines<'k>>,
    pub m: Reg<'k, u32>,
    pub n: Reg<'k, u32>,
    pub k: Reg<'k, u32>,
    pub out: Reg<'k, u64>,
}

/// Scales or zero points: rows of groups.
#[derive(Clone, Copy)]
pub struct Lines<'k> {
    pub address: Reg<'k, u64>,
    line: Reg<'k, u64>,
    /// Bytes of an element.
    size: u32,
}

impl<'k> Lines<'k> {
    fn params(k: &'k Kernel, [address, line]: [Name; 2], size: u32) -> Self {
        Self { address: k.pointer(address), line: k.param(line), size }
    }

    /// These if it holds, else others.
    fn or(self, other: Self, holds: Reg<'k, bool>) -> Self {
        let k = holds.kernel();
        Self {
            address: k.select(holds, self.address, other.address),
            line: k.select(holds, self.line, other.line),
            ..self
        }
    }
}

impl<'k> Operands<'k> {
    /// Declares the parameters, of the first weight.
    pub fn params(k: &'k Kernel, scheme: &Scheme) -> Self {
        let (x, x_line) = (k.pointer(Name::Lhs), k.param(Name::LhsLine));
        let names = &WEIGHTS[0];
        let bytes = scheme.codes.are_bytes();
        Self {
            x,
            x_line,
            codes: k.pointer(names.codes),
            codes_line: bytes.then(|| k.param(Name::CodesLine)),
            scales: Lines::params(k, names.scales, scheme.scale.size()),
            scale_step: (bytes && scheme.group.is_none()).then(|| k.param(Name::ScaleStep)),
            zeros: scheme.zeros.then(|| Lines::params(k, names.zeros, 1)),
            m: k.param(Name::M),
            n: k.param(names.n),
            k: k.param(Name::K),
            out: k.pointer(names.out),
        }
    }

    /// With the weight, of as many as the configuration says, that has block `column` of the columns of all, and which
    /// of its own that is. Declares the others' parameters.
    pub fn of_column(self, c: &Config, column: Reg<'k, u32>) -> (Self, Reg<'k, u32>) {
        if c.weights == 1 {
            return (self, column);
        }
        let k = column.kernel();
        let (mut of, mut own, mut before) = (self, column, self.n.div_ceil(BLOCK));
        for (names, number) in WEIGHTS[1..c.weights as usize].iter().zip(2..) {
            let other = Self {
                codes: k.pointer(names.codes),
                scales: Lines::params(k, names.scales, c.scheme.scale.size()),
                zeros: c.scheme.zeros.then(|| Lines::params(k, names.zeros, 1)),
                n: k.param(names.n),
                out: k.pointer(names.out),
                ..self
            };
            let further = column.ge(before);
            of = Self {
                codes: k.select(further, other.codes, of.codes),
                scales: other.scales.or(of.scales, further),
                zeros: other.zeros.zip(of.zeros).map(|(a, b)| a.or(b, further)),
                n: k.select(further, other.n, of.n),
                out: k.select(further, other.out, of.out),
                ..self
            };
            own = k.select(further, column - before, own);
            if number < c.weights {
                before = before + other.n.div_ceil(BLOCK);
            }
        }
        (of, own)
    }

    /// The addresses of the scales and zero points of the first group.
    pub fn first_group(&self) -> (Reg<'k, u64>, Option<Reg<'k, u64>>) {
        (self.scales.address, self.zeros.map(|zeros| zeros.address))
    }

    /// That of the scales, and elements from group to group.
    pub fn scale_lines(&self) -> (Reg<'k, u64>, Reg<'k, u64>) {
        (self.scales.address, self.scales.line)
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
    slot: Slot,
    operands: Operands<'k>,
    lane: Reg<'k, u32>,
    /// The next pair, and how many a warp leaves to others before its next one.
    pair: Reg<'k, u32>,
    step: u32,
    codes: Reg<'k, u64>,
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
    bytes: Reg<'k, u32>,
}

impl<'k> Copies<'k> {
    /// Of a warp whose first pair is `first`, for the rows of `x` from `token` on and the columns from
    /// `64 · column` on.
    pub fn new(
        config: &Config,
        operands: Operands<'k>,
        lane: Reg<'k, u32>,
        [token, column]: [Reg<'k, u32>; 2],
        first: Reg<'k, u32>,
    ) -> Self {
        let (k, slot) = (lane.kernel(), config.slot());
        let block = column.mul_wide(operands.blocks()) + (first * PAIR).wide();
        let codes = operands.codes + block * u64::from(BLOCK_BYTES) + (lane * CHUNK).wide();
        let (line, chunk) = SwizzledTile::first_copy(lane);
        let together = SwizzledTile::lines_together(WARP);
        let x_lines = config.tokens.div_ceil(together);
        let along = first * (PAIR * BLOCK) + chunk * (CHUNK / 2);
        let x = (0..x_lines).map(|i| {
            // Sums of rows that do not exist are not stored: any row will do.
            let line = (token + line + i * together).min(operands.m - 1);
            operands.x + (line.wide() * operands.x_line + along.wide()) * 2u64
        });
        let x = x.collect();
        let lines =
            operands.codes_line.map(|line| LineCopies::new(&operands, line, lane, column, first));
        let groups = config.scheme.group.filter(|_| lines.is_none()).map_or(vec![], |group| {
            let scales = (operands.scales, slot.scales);
            let zeros = operands.zeros.map(|zeros| (zeros, slot.zeros));
            let copies =
                |(lines, to)| GroupCopies::new(&operands, lines, to, group, lane, column, first);
            [Some(scales), zeros].into_iter().flatten().map(copies).collect()
        });
        Self {
            k,
            slot,
            operands,
            lane,
            pair: k.var(first),
            step: config.warps,
            codes: k.var(codes),
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
        let at = number * BLOCK + self.x_chunk;
        let left = self.operands.k.max(at) - at;
        let bytes = left.min(CHUNK / 2) * 2;
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
        let all = k.select(number.lt(self.operands.blocks()), k.var(CHUNK), 0);
        for part in (0..BLOCK_BYTES).step_by((WARP * CHUNK) as usize) {
            let from = self.codes.at((block * BLOCK_BYTES + part).into());
            // Of a pair the first block is there.
            match block {
                0 => k.cp_async(to.at(part.into()), from, CHUNK),
                _ => k.cp_async(to.at(part.into()), from, all),
            }
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
        operands: &Operands<'k>,
        lines: Lines<'k>,
        to: u32,
        group: u32,
        lane: Reg<'k, u32>,
        column: Reg<'k, u32>,
        first: Reg<'k, u32>,
    ) -> Self {
        let k = lane.kernel();
        let rows = BLOCK.div_ceil(group);
        let rows_of_pair = PAIR * BLOCK / group;
        let chunks = BLOCK * lines.size / CHUNK;
        let row = lane / chunks;
        let col = column * BLOCK + lane % chunks * (CHUNK / lines.size);
        let line = lines.line * u64::from(lines.size);
        let pointer = (first * rows_of_pair + row).wide() * line;
        let pointer = lines.address + pointer + (col * lines.size).wide();
        let left = operands.n.max(col) - col;
        Self {
            pointer: k.var(pointer),
            line,
            row,
            to,
            rows,
            all: operands.k.div_ceil(group),
            rows_of_pair,
            mine: lane.lt(rows * chunks),
            bytes: left.min(CHUNK / lines.size) * lines.size,
        }
    }

    fn copy(&self, pair: Reg<'k, u32>, block: u32, slot: Reg<'k, u32>) {
        // Both blocks of a pair share a row: it comes with the first one.
        if block * self.rows >= self.rows_of_pair {
            return;
        }
        let k = slot.kernel();
        let row = pair * self.rows_of_pair + self.row + block * self.rows;
        let bytes = k.select(row.lt(self.all), self.bytes, 0);
        let from = match block {
            0 => self.pointer,
            _ => self.pointer + self.line * u64::from(block * self.rows),
        };
        let to = slot + k.lane() * CHUNK;
        k.when(self.mine, || k.cp_async(to.at(self.to.into()), from, bytes));
    }
}
