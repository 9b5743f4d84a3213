//! A quantised weight in floats: one pass over its codes.
//!
//! A thread takes a word of eight codes of four bits, which are a column of eight elements, or a few words side by side; or some
//! codes of eight bits. Their results are stored where they are in the weight.

use super::params::{self, Argument, names};
use super::plan::{Plan as _, Step, count};
use super::{Device, Element};
use crate::ptx::{Half, Kernel, Reg, Source, Target};

/// Threads of a block.
const THREADS: u32 = 256;
/// Codes of four bits in a word.
const CODES: u32 = 8;
/// Words, and codes of eight bits, that a thread takes of lines that can be read so.
const WORDS: u32 = 4;
const BYTES: u32 = 8;

/// What codes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Four bits that stand for −8 to 7: eight more, or two's complement.
    Int4 {
        /// Two's complement.
        signed: bool,
    },
    /// Four bits, with a zero point of 8 bits for each scale.
    Uint4,
    /// Four bits that stand for an element of a table.
    Table([u32; 16]),
    /// Bytes of two's complement.
    Int8,
    /// Floats of eight bits, with four of exponent.
    E4m3,
}

impl Codes {
    /// Whether eight of them make a word.
    pub fn are_nibbles(&self) -> bool {
        !matches!(self, Self::Int8 | Self::E4m3)
    }

    fn name(&self) -> &'static str {
        match self {
            Self::Int4 { signed: false } => "int4",
            Self::Int4 { signed: true } => "signed int4",
            Self::Uint4 => "int4 with zero points",
            Self::Table(_) => "table",
            Self::Int8 => "int8",
            Self::E4m3 => "e4m3",
        }
    }
}

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows and columns of the result, at least 1.
    pub rows: u64,
    /// Contiguous.
    pub cols: u64,
    /// What is read.
    pub codes: Codes,
    /// The type of scales.
    pub scale: Element,
    /// The type of the result.
    pub out: Element,
    /// Whether words are of columns that lie in one piece; those of the result then do, too. There are rows of whole words
    /// then.
    pub down: bool,
    /// Whether all lines of codes begin at multiples of 16 bytes.
    pub aligned: bool,
    /// Rows and columns that share a scale: a power of two, or 0 for all.
    pub group: [u32; 2],
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// What is read.
    pub codes: Codes,
    /// The type of scales.
    pub scale: Element,
    /// The type of the result.
    pub out: Element,
    /// Words of a thread, or codes of eight bits.
    pub unit: u32,
    /// Whether columns lie in one piece.
    pub down: bool,
    /// Whether the last words have codes past the last row.
    pub ragged: bool,
}

impl Config {
    /// `dequant int4 x4, f16 to bf16`
    pub fn name(&self) -> String {
        let Self { codes, scale, out, unit, down, ragged } = *self;
        let (codes, scale, out) = (codes.name(), scale.name(), out.name());
        let down = if down { " down" } else { "" };
        let ragged = if ragged { " ragged" } else { "" };
        format!("dequant {codes} x{unit}{down}, {scale} to {out}{ragged}")
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    config: Config,
    /// Units of a line of codes.
    units: u32,
    /// Units in all.
    total: u32,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let Problem { rows, cols, codes, scale, out, down, aligned, .. } = *problem;
        let wide = if codes.are_nibbles() { WORDS } else { BYTES };
        let unit = if aligned && !down && cols.is_multiple_of(wide.into()) { wide } else { 1 };
        let words = if codes.are_nibbles() { rows.div_ceil(CODES.into()) } else { rows };
        let [lines, len] = if down { [cols, words] } else { [words, cols] };
        let units = len / u64::from(unit);
        let ragged = codes.are_nibbles() && !rows.is_multiple_of(CODES.into());
        Self {
            config: Config { codes, scale, out, unit, down, ragged },
            units: count(units),
            total: count(lines.saturating_mul(units)),
        }
    }

    fn steps(&self) -> Vec<Step> {
        vec![Step { kernel: self.config.into(), grid: [self.total.div_ceil(THREADS), 1, 1] }]
    }
}

impl Problem {
    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self, device: &Device) -> Option<(String, u32)> {
        let most = i32::MAX as u32;
        let over = self.rows > most.into()
            || self.cols > most.into()
            || Plan::new(self, device).total > most;
        over.then(|| (format!("a weight of {} x {} elements", self.rows, self.cols), most))
    }

    /// Bits of an index that say which element of a group it is.
    fn shift(&self, side: usize) -> u32 {
        match self.group[side] {
            // All.
            0 => 31,
            len => len.trailing_zeros(),
        }
    }
}

names! {
    /// The parameters. Strides are in elements.
    pub enum Name {
        /// The address of codes or words.
        Codes "codes",
        /// From line to line.
        CodesLine "codes_line",
        /// The address of scales.
        Scales "scales",
        /// From row to row.
        ScalesRow "scales_row",
        /// From column to column.
        ScalesCol "scales_col",
        /// The address of zero points.
        Zeros "zeros",
        /// From row to row.
        ZerosRow "zeros_row",
        /// The address of the result, without gaps.
        Out "out",
        /// Rows of the result.
        Rows "rows",
        /// From line to line of the result.
        OutLine "out_line",
        /// Units of a line of codes.
        Units "units",
        /// Units in all.
        Total "total",
        /// Bits of a row that say which one of a group it is.
        GroupRows "group_rows",
        /// The same of a column.
        GroupCols "group_cols",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// By which kernel.
    pub plan: &'a Plan,
    /// The address of codes, and elements from line to line.
    pub codes: (u64, u64),
    /// The address of scales, and elements from row to row and from column to column.
    pub scales: (u64, [u64; 2]),
    /// The address of zero points, and elements from row to row.
    pub zeros: Option<(u64, u64)>,
    /// The address of the result.
    pub out: u64,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let Problem { rows, cols, down, .. } = *self.problem;
        Some(match name {
            Name::Codes => Argument::Pointer(self.codes.0),
            Name::CodesLine => Argument::U64(self.codes.1),
            Name::Scales => Argument::Pointer(self.scales.0),
            Name::ScalesRow => Argument::U64(self.scales.1[0]),
            Name::ScalesCol => Argument::U64(self.scales.1[1]),
            Name::Zeros => Argument::Pointer(self.zeros?.0),
            Name::ZerosRow => Argument::U64(self.zeros?.1),
            Name::Out => Argument::Pointer(self.out),
            Name::Rows => Argument::U32(count(rows)),
            Name::OutLine => Argument::U64(if down { rows } else { cols }),
            Name::Units => Argument::U32(self.plan.units),
            Name::Total => Argument::U32(self.plan.total),
            Name::GroupRows => Argument::U32(self.problem.shift(0)),
            Name::GroupCols => Argument::U32(self.problem.shift(1)),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("dequant", Target::Sm80, THREADS);
    let codes = (k.pointer(Name::Codes), k.param::<u64>(Name::CodesLine));
    let scales = Scales {
        k,
        element: config.scale,
        address: k.pointer(Name::Scales),
        strides: [k.param::<u64>(Name::ScalesRow), k.param::<u64>(Name::ScalesCol)],
        shifts: [k.param::<u32>(Name::GroupRows), k.param::<u32>(Name::GroupCols)],
        zeros: (config.codes == Codes::Uint4)
            .then(|| (k.pointer(Name::Zeros), k.param::<u64>(Name::ZerosRow))),
    };
    let (out, out_line) = (k.pointer(Name::Out), k.param::<u64>(Name::OutLine));
    let rows = config.ragged.then(|| k.param::<u32>(Name::Rows));
    let (units, total) = (k.param::<u32>(Name::Units), k.param::<u32>(Name::Total));
    let decoder = Decoder::new(k, config.codes);

    let index = k.block_x() * THREADS + k.thread();
    k.if_(index.lt(total), || {
        let line = index / units;
        let at = (index - line * units) * config.unit;
        let from = |size: u32| element(codes, line, at, size);
        let to = |line, at| element((out, out_line), line, at, config.out.size());
        if !config.codes.are_nibbles() {
            let bytes = load_bytes(k, from(1), config.unit);
            let values = (0..).zip(&bytes).map(|(i, &byte)| {
                let (scale, _) = scales.at(line, at + i);
                decoder.byte(byte) * scale
            });
            return store(k, config.out, to(line, at), &values.collect::<Vec<_>>());
        }
        let words = load_words(k, from(4), config.unit);
        if config.down {
            // One word is eight elements of a line of the result.
            let row = at * CODES;
            let (scale, zero) = scales.at(row, line);
            let values = (0..CODES).map(|i| decoder.nibble(words[0], i, zero) * scale);
            return store(k, config.out, to(line, row), &values.collect::<Vec<_>>());
        }
        let row = line * CODES;
        let factors: Vec<_> = (0..config.unit).map(|i| scales.at(row, at + i)).collect();
        for i in 0..CODES {
            let one_row = || {
                let pairs = words.iter().zip(&factors);
                let values =
                    pairs.map(|(&word, &(scale, zero))| decoder.nibble(word, i, zero) * scale);
                store(k, config.out, to(row + i, at), &values.collect::<Vec<_>>());
            };
            match rows {
                Some(rows) if i > 0 => k.if_((row + i).lt(rows), one_row),
                _ => one_row(),
            }
        }
    });
    k.finish()
}

/// The address of an element `at` of a line of a matrix at some address, lines of which are some elements apart.
fn element<'k>(
    (address, stride): (Reg<'k, u64>, Reg<'k, u64>),
    line: Reg<'k, u32>,
    at: Reg<'k, u32>,
    size: u32,
) -> Reg<'k, u64> {
    address + (line.wide() * stride + at.wide()) * u64::from(size)
}

/// Scales and zero points of elements.
struct Scales<'k> {
    k: &'k Kernel,
    element: Element,
    address: Reg<'k, u64>,
    strides: [Reg<'k, u64>; 2],
    shifts: [Reg<'k, u32>; 2],
    zeros: Option<(Reg<'k, u64>, Reg<'k, u64>)>,
}

impl<'k> Scales<'k> {
    /// Those of an element of the result.
    fn at(&self, row: Reg<'k, u32>, col: Reg<'k, u32>) -> (Reg<'k, f32>, Option<Reg<'k, f32>>) {
        let k = self.k;
        let (row, col) = (row >> self.shifts[0], col >> self.shifts[1]);
        let at = row.wide() * self.strides[0] + col.wide() * self.strides[1];
        let from = self.address + at * u64::from(self.element.size());
        let scale = match self.element {
            Element::F32 => k.ld_global_nc::<f32, 1>(from)[0],
            Element::Half(half) => k.widen(half, k.ld_global_nc::<u16, 1>(from)[0]),
        };
        let zero = self.zeros.map(|(address, stride)| {
            k.ld_global_nc_u8(address + (row.wide() * stride + col.wide())).to_f32()
        });
        (scale, zero)
    }
}

/// Codes to what they stand for.
struct Decoder<'k> {
    k: &'k Kernel,
    codes: Codes,
    /// Where the table is in shared memory.
    table: Option<Reg<'k, u32>>,
}

impl<'k> Decoder<'k> {
    fn new(k: &'k Kernel, codes: Codes) -> Self {
        let Codes::Table(values) = codes else { return Self { k, codes, table: None } };
        let table = k.shared(4 * values.len() as u32);
        k.if_(k.thread().eq(0), || {
            for (i, four) in values.chunks_exact(4).enumerate() {
                let four = [four[0], four[1], four[2], four[3]].map(|bits| k.var(bits));
                k.st_shared(table.at(16 * i as i64), four);
            }
        });
        k.sync_block();
        Self { k, codes, table: Some(table) }
    }

    /// Code `i` of a word.
    fn nibble(&self, word: Reg<'k, u32>, i: u32, zero: Option<Reg<'k, f32>>) -> Reg<'k, f32> {
        let code = word.bfe(4 * i, 4);
        match (self.codes, self.table, zero) {
            (_, Some(table), _) => self.k.ld_shared::<f32, 1>(table + code * 4)[0],
            (Codes::Int4 { signed: true }, ..) => signed(word << (28 - 4 * i), 28),
            (_, _, Some(zero)) => code.to_f32() - zero,
            _ => code.to_f32() - 8.0,
        }
    }

    /// A code in the lowest byte of a word.
    fn byte(&self, (word, i): (Reg<'k, u32>, u32)) -> Reg<'k, f32> {
        let k = self.k;
        if self.codes == Codes::Int8 {
            return signed(word << (24 - 8 * i), 24);
        }
        let (magnitude, sign) = (word.bfe(8 * i, 7), word.bfe(8 * i + 7, 1) << 31);
        let normal = ((magnitude + (120 << 3)) << 20).cast::<f32>();
        let value = k.select(magnitude.lt(8), magnitude.to_f32() * (1.0 / 512.0), normal);
        let value = k.select(magnitude.eq(0x7f), k.var(f32::NAN), value);
        (value.cast::<u32>() | sign).cast()
    }
}

/// The topmost bits, as a number of two's complement.
fn signed(top: Reg<u32>, shift: u32) -> Reg<f32> {
    (top.cast::<i32>() >> shift).to_float()
}

fn load_words<'k>(k: &'k Kernel, from: Reg<'k, u64>, unit: u32) -> Vec<Reg<'k, u32>> {
    match unit {
        1 => k.ld_global_nc::<u32, 1>(from).into(),
        _ => k.ld_global_nc::<u32, 4>(from).into(),
    }
}

/// Each byte as a word and its place in it.
fn load_bytes<'k>(k: &'k Kernel, from: Reg<'k, u64>, unit: u32) -> Vec<(Reg<'k, u32>, u32)> {
    match unit {
        1 => vec![(k.ld_global_nc_u8(from), 0)],
        _ => {
            let words = k.ld_global_nc::<u32, 2>(from);
            words.into_iter().flat_map(|word| (0..4).map(move |i| (word, i))).collect()
        }
    }
}

/// Values side by side, rounded.
fn store<'k>(k: &'k Kernel, element: Element, to: Reg<'k, u64>, values: &[Reg<'k, f32>]) {
    let Element::Half(half) = element else {
        match *values {
            [x] => k.st_global(to, [x]),
            _ => (0..).zip(values.as_chunks::<4>().0).for_each(|(i, &four)| {
                k.st_global(to.at(16 * i), four);
            }),
        }
        return;
    };
    let pair = |half: Half, [low, high]: [Reg<'k, f32>; 2]| k.cvt_rn_x2(half, low, high);
    match *values {
        [x] => k.st_global(to, [k.cvt_rn(half, x)]),
        [a, b, c, d] => k.st_global(to, [[a, b], [c, d]].map(|two| pair(half, two))),
        [a, b, c, d, e, f, g, h] => {
            k.st_global(to, [[a, b], [c, d], [e, f], [g, h]].map(|two| pair(half, two)));
        }
        _ => unreachable!("a unit is 1, 4 or 8 elements"),
    }
}
