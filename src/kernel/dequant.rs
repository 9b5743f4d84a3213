//! A matrix of codes of eight bits in floats: one pass over them. (Those of four bits are [`super::w4`]'s.)
//!
//! A thread takes some codes side by side, or one. Their results are stored where they are in the matrix.

use super::params::{self, Argument, names};
use super::plan::{Plan as _, Step, count};
use super::{Device, Element};
use crate::ptx::{Half, Kernel, Reg, Source, Target};

/// Threads of a block.
const THREADS: u32 = 256;
/// Codes that a thread takes of lines that can be read so.
const BYTES: u32 = 8;

/// What codes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// Bytes of two's complement.
    Int8,
    /// Floats of eight bits, with four of exponent.
    E4m3,
}

impl Codes {
    fn name(&self) -> &'static str {
        match self {
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
    /// Codes of a thread.
    pub unit: u32,
}

impl Config {
    /// `dequant int8 x8, f16 to bf16`
    pub fn name(&self) -> String {
        let Self { codes, scale, out, unit } = *self;
        let (codes, scale, out) = (codes.name(), scale.name(), out.name());
        format!("dequant {codes} x{unit}, {scale} to {out}")
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
        let Problem { rows, cols, codes, scale, out, aligned, .. } = *problem;
        let unit = if aligned && cols.is_multiple_of(BYTES.into()) { BYTES } else { 1 };
        let units = cols / u64::from(unit);
        Self {
            config: Config { codes, scale, out, unit },
            units: count(units),
            total: count(rows.saturating_mul(units)),
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
        /// The address of codes.
        Codes "codes",
        /// From line to line.
        CodesLine "codes_line",
        /// The address of scales.
        Scales "scales",
        /// From row to row.
        ScalesRow "scales_row",
        /// From column to column.
        ScalesCol "scales_col",
        /// The address of the result, without gaps.
        Out "out",
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
    /// The address of the result.
    pub out: u64,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        Some(match name {
            Name::Codes => Argument::Pointer(self.codes.0),
            Name::CodesLine => Argument::U64(self.codes.1),
            Name::Scales => Argument::Pointer(self.scales.0),
            Name::ScalesRow => Argument::U64(self.scales.1[0]),
            Name::ScalesCol => Argument::U64(self.scales.1[1]),
            Name::Out => Argument::Pointer(self.out),
            Name::OutLine => Argument::U64(self.problem.cols),
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
        element: config.scale,
        address: k.pointer(Name::Scales),
        strides: [k.param::<u64>(Name::ScalesRow), k.param::<u64>(Name::ScalesCol)],
        shifts: [k.param::<u32>(Name::GroupRows), k.param::<u32>(Name::GroupCols)],
    };
    let out = (k.pointer(Name::Out), k.param::<u64>(Name::OutLine));
    let (units, total) = (k.param::<u32>(Name::Units), k.param::<u32>(Name::Total));

    let index = k.block_x() * THREADS + k.thread();
    k.if_(index.lt(total), || {
        let line = index / units;
        let at = (index - line * units) * config.unit;
        let bytes = load(k, element(codes, line, at, 1), config.unit);
        let values = (0..)
            .zip(&bytes)
            .map(|(i, &(word, byte))| decode(config.codes, word, byte) * scales.at(line, at + i));
        let to = element(out, line, at, config.out.size());
        store(k, config.out, to, &values.collect::<Vec<_>>());
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

/// Scales of elements.
struct Scales<'k> {
    element: Element,
    address: Reg<'k, u64>,
    strides: [Reg<'k, u64>; 2],
    shifts: [Reg<'k, u32>; 2],
}

impl<'k> Scales<'k> {
    /// That of an element of the result.
    fn at(&self, row: Reg<'k, u32>, col: Reg<'k, u32>) -> Reg<'k, f32> {
        let k = self.address.kernel();
        let (row, col) = (row >> self.shifts[0], col >> self.shifts[1]);
        let at = row.wide() * self.strides[0] + col.wide() * self.strides[1];
        let from = self.address + at * u64::from(self.element.size());
        match self.element {
            Element::F32 => k.ld_global_nc::<f32, 1>(from)[0],
            Element::Half(half) => k.widen(half, k.ld_global_nc::<u16, 1>(from)[0]),
        }
    }
}

/// What byte `i` of a word stands for.
fn decode<'k>(codes: Codes, word: Reg<'k, u32>, i: u32) -> Reg<'k, f32> {
    let k = word.kernel();
    match codes {
        Codes::Int8 => signed(word << (24 - 8 * i), 24),
        Codes::E4m3 => {
            let (magnitude, sign) = (word.bfe(8 * i, 7), word.bfe(8 * i + 7, 1) << 31);
            let normal = ((magnitude + (120 << 3)) << 20).cast::<f32>();
            let value = k.select(magnitude.lt(8), magnitude.to_f32() * (1.0 / 512.0), normal);
            let value = k.select(magnitude.eq(0x7f), k.var(f32::NAN), value);
            (value.cast::<u32>() | sign).cast()
        }
    }
}

/// The topmost bits, as a number of two's complement.
fn signed(top: Reg<u32>, shift: u32) -> Reg<f32> {
    (top.cast::<i32>() >> shift).to_float()
}

/// Each byte as a word and its place in it.
fn load<'k>(k: &'k Kernel, from: Reg<'k, u64>, unit: u32) -> Vec<(Reg<'k, u32>, u32)> {
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
        [a, b, c, d, e, f, g, h] => {
            k.st_global(to, [[a, b], [c, d], [e, f], [g, h]].map(|two| pair(half, two)));
        }
        _ => unreachable!("a unit is 1 or 8 elements"),
    }
}
