//! A weight rounded to codes: the largest numbers of each group, and then its scale and codes. In the same way floats are divided
//! by a power of two of the largest (`divided`).
//!
//! All divisions and roundings are those of `quant::quantize`, so that a weight has the same codes wherever it is rounded.

mod codes;
mod divided;

pub use divided::{FARTHEST, NEAREST};

use super::multiprocessor::WARP;
use super::name::given;
use super::params::{self, Argument, names};
use super::plan::{Step, count, weight_limit};
use super::quantize::largest;
use super::{Device, Element};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block.
const THREADS: u32 = 128;
/// Rows of a column that a thread looks at: a group has a multiple of them, or all.
const STRIP: u32 = 32;
/// Rows of a word of codes of four bits.
const ROWS: u32 = 8;
/// Codes of eight bits that a thread stores at once.
const BYTES: u32 = 4;

/// What codes stand for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// Four bits, −8 to 7, or 0 to 15 before a zero point is subtracted.
    Int4 {
        /// Whether groups have zero points.
        zeros: bool,
    },
    /// Four bits, the sixteen values of nf4.
    Nf4,
    /// Eight bits, −127 to 127.
    Int8,
    /// Eight bits, e4m3.
    E4m3,
}

impl Code {
    fn name(self) -> &'static str {
        match self {
            Self::Int4 { zeros: false } => "int4",
            Self::Int4 { zeros: true } => "int4 zeros",
            Self::Nf4 => "nf4",
            Self::Int8 => "int8",
            Self::E4m3 => "e4m3",
        }
    }

    fn has_4bits(self) -> bool {
        matches!(self, Self::Int4 { .. } | Self::Nf4)
    }

    /// What stands for 0, or is nearest to it without a zero point: the codes past the last row.
    fn zero(self) -> u32 {
        match self {
            Self::Int4 { zeros: false } => 8,
            Self::Nf4 => 7,
            Self::Int4 { zeros: true } | Self::Int8 | Self::E4m3 => 0,
        }
    }
}

/// What is made of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Output {
    /// The largest numbers of each group, which all others are made with.
    Ranges,
    /// Codes, and a scale for each group.
    Codes(Code),
    /// Of a weight that is one group, elements in their type, divided by the power of two of the largest if f16 has not so many
    /// times that, or few digits of it. That power is the scale.
    Divided {
        /// How many times.
        farthest: u32,
    },
}

impl Output {
    fn has_4bits(self) -> bool {
        matches!(self, Self::Codes(code) if code.has_4bits())
    }
}

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows, at least 1.
    pub rows: u64,
    /// Columns, at least 1.
    pub cols: u64,
    /// Rows and columns that share a scale: all, or of rows a multiple of 32, and of columns 1 or a multiple of 32. Codes of
    /// four bits are in groups of one column.
    pub group: [u64; 2],
    /// The type of the elements.
    pub element: Element,
    /// What is wanted.
    pub output: Output,
}

impl Problem {
    /// Groups below and beside each other.
    pub fn groups(&self) -> [u64; 2] {
        [self.rows.div_ceil(self.group[0]), self.cols.div_ceil(self.group[1])]
    }

    /// The type of the scales.
    pub fn scale(&self) -> Element {
        if self.output.has_4bits() { self.element } else { Element::F32 }
    }

    /// Words of codes of four bits, bytes, or elements: those past the last one are not of the weight.
    pub fn written(&self) -> u64 {
        match self.output.has_4bits() {
            true => self.rows.div_ceil(ROWS.into()) * self.cols,
            false => (self.rows * self.cols).next_multiple_of(BYTES.into()),
        }
    }

    /// What is beyond what threads count, and the most that they do.
    pub fn limit(&self) -> Option<(String, u32)> {
        const MOST: u32 = u32::MAX - THREADS * BYTES;
        weight_limit([self.rows, self.cols], THREADS, MOST)
    }
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Config {
    /// The largest numbers of each group.
    Ranges {
        /// The elements' type.
        element: Element,
        /// Whether groups have more than one column.
        wide: bool,
    },
    /// Scales, zero points and codes.
    Codes {
        /// The elements' type.
        element: Element,
        /// The codes.
        code: Code,
        /// Whether the GPU has an instruction that rounds to the codes.
        rounds: bool,
    },
    /// Quotients by a power of two, and that: see [`Output::Divided`].
    Divided {
        /// The elements' type.
        element: Element,
        /// How many times the largest f16 must have.
        farthest: u32,
    },
}

impl Config {
    /// `encode int4 zeros, bf16`
    pub fn name(&self) -> String {
        match *self {
            Self::Ranges { element, wide } => {
                format!("encode ranges{}, {}", given(wide, " wide"), element.name())
            }
            Self::Codes { element, code, rounds } => {
                let bits = given(!rounds, " by bits");
                format!("encode {}, {}{bits}", code.name(), element.name())
            }
            Self::Divided { element, farthest } => {
                format!("encode divided of {farthest}, {}", element.name())
            }
        }
    }
}

/// The kernels and their grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    ranges: Step,
    output: Option<Step>,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        let Problem { rows, cols, group, element, output } = *problem;
        let across = count(cols.div_ceil(THREADS.into()));
        let below = |rows_of_a_thread: u32| count(rows.div_ceil(rows_of_a_thread.into()));
        let ranges = Config::Ranges { element, wide: group[1] > 1 };
        let kernel = match output {
            Output::Ranges => None,
            Output::Codes(code) => {
                let rounds = code != Code::E4m3 || device.target != Target::Sm80;
                Some(Config::Codes { element, code, rounds })
            }
            Output::Divided { farthest } => Some(Config::Divided { element, farthest }),
        };
        let grid = match output.has_4bits() {
            true => [below(ROWS), across, 1],
            false => [count((rows * cols).div_ceil((THREADS * BYTES).into())), 1, 1],
        };
        Self {
            ranges: Step { kernel: ranges.into(), grid: [below(STRIP), across, 1] },
            output: kernel.map(|kernel| Step { kernel: kernel.into(), grid }),
        }
    }

    fn steps(&self) -> Vec<Step> {
        [self.ranges].into_iter().chain(self.output).collect()
    }
}

names! {
    /// The parameters.
    pub enum Name {
        /// The address of the weight.
        Input "input",
        /// Elements from row to row.
        InputRow "input_row",
        /// Elements from column to column.
        InputCol "input_col",
        /// Rows.
        Rows "rows",
        /// Columns.
        Cols "cols",
        /// Rows that share a scale.
        GroupRows "group_rows",
        /// Columns that share a scale.
        GroupCols "group_cols",
        /// Groups beside each other.
        Groups "groups",
        /// Two numbers of each group, zeros before: the bits of the largest magnitude of those below 0, and of the others.
        Ranges "ranges",
        /// The address of the codes or quotients, a multiple of 4.
        Codes "codes",
        /// The address of the scales.
        Scales "scales",
        /// The address of the zero points.
        Zeros "zeros",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The address of the weight, and elements from row to row and from column to column.
    pub input: (u64, [u64; 2]),
    /// The address of the ranges.
    pub ranges: u64,
    /// Those of codes and scales.
    pub results: Option<[u64; 2]>,
    /// That of the zero points.
    pub zeros: Option<u64>,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let Problem { rows, cols, group, .. } = *self.problem;
        Some(match name {
            Name::Input => Argument::Pointer(self.input.0),
            Name::InputRow => Argument::U64(self.input.1[0]),
            Name::InputCol => Argument::U64(self.input.1[1]),
            Name::Rows => Argument::U32(count(rows)),
            Name::Cols => Argument::U32(count(cols)),
            Name::GroupRows => Argument::U32(count(group[0])),
            Name::GroupCols => Argument::U32(count(group[1])),
            Name::Groups => Argument::U32(count(self.problem.groups()[1])),
            Name::Ranges => Argument::Pointer(self.ranges),
            Name::Codes => Argument::Pointer(self.results?[0]),
            Name::Scales => Argument::Pointer(self.results?[1]),
            Name::Zeros => Argument::Pointer(self.zeros?),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    match *config {
        Config::Ranges { element, wide } => ranges(element, wide),
        Config::Codes { element, code, rounds } if code.has_4bits() => {
            let k = &Kernel::new("encode_words", Target::Sm80, THREADS);
            debug_assert!(rounds);
            codes::words(&Weight::new(k, element), code)
        }
        Config::Divided { element, farthest } => {
            let k = &Kernel::new("encode_divided", Target::Sm80, THREADS);
            divided::emit(&Weight::new(k, element), farthest)
        }
        Config::Codes { element, code, rounds } => {
            let target = if code == Code::E4m3 && rounds { Target::Sm89 } else { Target::Sm80 };
            let k = &Kernel::new("encode_bytes", target, THREADS);
            codes::bytes(&Weight::new(k, element), code, rounds)
        }
    }
}

/// A weight and its groups.
struct Weight<'k> {
    k: &'k Kernel,
    element: Element,
    input: Reg<'k, u64>,
    strides: [Reg<'k, u64>; 2],
    rows: Reg<'k, u32>,
    cols: Reg<'k, u32>,
    group_rows: Reg<'k, u32>,
    groups: Reg<'k, u32>,
    ranges: Reg<'k, u64>,
}

impl<'k> Weight<'k> {
    fn new(k: &'k Kernel, element: Element) -> Self {
        let [rows, cols, group_rows, groups] =
            [Name::Rows, Name::Cols, Name::GroupRows, Name::Groups].map(|name| k.param(name));
        Self {
            k,
            element,
            input: k.pointer(Name::Input),
            strides: [Name::InputRow, Name::InputCol].map(|name| k.param(name)),
            rows,
            cols,
            group_rows,
            groups,
            ranges: k.pointer(Name::Ranges),
        }
    }

    /// The address of an element.
    fn address(&self, row: Reg<'k, u32>, col: Reg<'k, u32>) -> Reg<'k, u64> {
        let [of_row, of_col] = self.strides;
        let number = row.wide() * of_row + col.wide() * of_col;
        self.input + number * u64::from(self.element.size())
    }

    /// An element, or 0 where there is none.
    fn load(&self, from: Reg<'k, u64>, exists: Reg<'k, bool>) -> Reg<'k, f32> {
        let k = self.k;
        match self.element {
            Element::F32 => {
                let [x] = k.when(exists, || k.ld_global_nc::<f32, 1>(from));
                k.select(exists, x, 0f32)
            }
            Element::Half(half) => {
                let [x] = k.when(exists, || k.ld_global_nc::<u16, 1>(from));
                k.widen(half, k.select(exists, x, 0u16))
            }
        }
    }

    /// The largest magnitudes in a group, of numbers below 0 and of others.
    fn range(&self, group: Reg<'k, u32>, exists: Reg<'k, bool>) -> [Reg<'k, f32>; 2] {
        self.k.when(exists, || self.k.ld_global_nc::<f32, 2>(self.ranges.element(group, 8)))
    }
}

/// A thread has some rows of a column.
fn ranges(element: Element, wide: bool) -> Source {
    let k = &Kernel::new("encode_ranges", Target::Sm80, THREADS);
    let weight = Weight::new(k, element);
    let col = k.block_y() * THREADS + k.thread();
    let first = k.block_x() * STRIP;
    let exists = col.lt(weight.cols);
    let step = weight.strides[0] * u64::from(element.size());
    let from = weight.address(first, col);
    let none = k.var(0u32);
    let [mut below, mut above] = [none, none];
    for i in 0..STRIP {
        if i > 0 {
            from.increase(step);
        }
        let x = weight.load(from, exists & (first + i).lt(weight.rows));
        let (bits, magnitude) = (x.cast::<u32>(), x.abs().cast::<u32>());
        let negative = (bits >> 31).ne(0);
        below = below.max(k.select(negative, magnitude, 0));
        above = above.max(k.select(negative, none, magnitude));
    }
    let mut group = first / weight.group_rows * weight.groups;
    let mut writes = exists;
    if wide {
        [below, above] = [below, above].map(|bits| largest(bits, WARP));
        group = group + col / k.param::<u32>(Name::GroupCols);
        // All lanes are of one group.
        writes = writes & (k.thread() % WARP).eq(0);
    } else {
        group = group + col;
    }
    let to = weight.ranges.element(group, 8);
    k.when(writes & below.gt(0), || k.red_max(to, below));
    k.when(writes & above.gt(0), || k.red_max(to.at(4), above));
    k.finish()
}
