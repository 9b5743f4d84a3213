//! Words of four-bit codes as checkpoints have them, regrouped: eight rows of a column in a word, the first one lowest.
//!
//! A thread makes a word: of one where eight rows of a column are in a word already and stay in order, else of the eight that
//! have its codes. And the sums of the codes of columns.

use super::name::given;
use super::params::{self, Argument, names};
use super::plan::{Step, count, weight_limit};
use super::{Config as Kernels, Device};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block.
const THREADS: u32 = 128;
/// Codes of a word.
const CODES: u32 = 8;
/// Words of a column that a thread adds up.
const STRIP: u32 = 32;

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of the weight, at least 1.
    pub rows: u64,
    /// Columns, at least 1.
    pub cols: u64,
    /// What is done.
    pub config: Config,
}

impl Problem {
    /// What is beyond what threads count, and the most that they do.
    pub fn limit(&self) -> Option<(String, u32)> {
        const MOST: u32 = i32::MAX as u32;
        weight_limit([self.rows, self.cols], THREADS, MOST)
    }
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Config {
    /// Words along rows.
    Words {
        /// Whether a word is of eight columns of a row, not of eight rows of a column.
        across: bool,
        /// Whether rows are taken in another order.
        ordered: bool,
    },
    /// The sums of the codes of each column, of words of eight rows.
    Sums,
}

impl Config {
    /// `regroup words across, in order`
    pub fn name(&self) -> String {
        match *self {
            Self::Words { across, ordered } => {
                let rows = if ordered { "by an order" } else { "in order" };
                format!("regroup words{}, {rows}", given(across, " across"))
            }
            Self::Sums => "regroup sums, columns".into(),
        }
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    kernel: Config,
    grid: [u32; 3],
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let Problem { rows, cols, config } = *problem;
        let words = rows.div_ceil(CODES.into());
        let below = match config {
            Config::Words { .. } => words,
            Config::Sums => words.div_ceil(STRIP.into()),
        };
        let grid = [count(below), count(cols.div_ceil(THREADS.into())), 1];
        Self { kernel: config, grid }
    }

    fn steps(&self) -> Vec<Step> {
        vec![Step { kernel: Kernels::from(self.kernel), grid: self.grid }]
    }
}

names! {
    /// The parameters.
    pub enum Name {
        /// The address of the words.
        Input "input",
        /// Words from one of rows to that of the next rows.
        InputRow "input_row",
        /// Words from one of columns to that of the next columns.
        InputCol "input_col",
        /// Where a word has each of its eight codes, in four bits each, the first lowest.
        Places "places",
        /// The address of the row that each row is to be.
        Order "order",
        /// Rows.
        Rows "rows",
        /// Columns.
        Cols "cols",
        /// The code of rows past the last.
        Fill "fill",
        /// The address of the result: words, or f32 sums, zeros before.
        Out "out",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is done.
    pub problem: &'a Problem,
    /// The address of the words, and how many lie from one to the next below and beside it.
    pub input: (u64, [u64; 2]),
    /// Where a word has its codes.
    pub places: [u8; CODES as usize],
    /// The address of the order.
    pub order: Option<u64>,
    /// The code of rows past the last.
    pub fill: u32,
    /// The address of the result.
    pub out: u64,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        Some(match name {
            Name::Input => Argument::Pointer(self.input.0),
            Name::InputRow => Argument::U64(self.input.1[0]),
            Name::InputCol => Argument::U64(self.input.1[1]),
            Name::Places => {
                let all = self.places.iter().rev();
                Argument::U32(all.fold(0, |all, &place| (all << 4) | u32::from(place)))
            }
            Name::Order => Argument::Pointer(self.order?),
            Name::Rows => Argument::U32(count(self.problem.rows)),
            Name::Cols => Argument::U32(count(self.problem.cols)),
            Name::Fill => Argument::U32(self.fill),
            Name::Out => Argument::Pointer(self.out),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    match *config {
        Config::Words { across, ordered } => words(across, ordered),
        Config::Sums => sums(),
    }
}

/// Where a word has the code of number `code`, in bits.
fn shift<'k>(places: Reg<'k, u32>, code: Reg<'k, u32>) -> Reg<'k, u32> {
    ((places >> (code * 4)) & 15) * 4
}

/// The word that lies so many times two strides from the first one, if it is there.
fn load<'k>(
    k: &'k Kernel,
    input: Reg<'k, u64>,
    steps: [(Reg<'k, u32>, Reg<'k, u64>); 2],
    there: Reg<'k, bool>,
) -> Reg<'k, u32> {
    let [below, beside] = steps.map(|(count, stride)| count.wide() * stride);
    let from = input + (below + beside) * 4;
    let [found] = k.when(there, || k.ld_global_nc::<u32, 1>(from));
    found
}

fn words(across: bool, ordered: bool) -> Source {
    let k = &Kernel::new("regroup_words", Target::Sm80, THREADS);
    let (input, out) = (k.pointer(Name::Input), k.pointer(Name::Out));
    let [below, beside] = [Name::InputRow, Name::InputCol].map(|name| k.param::<u64>(name));
    let [places, rows, cols, fill] =
        [Name::Places, Name::Rows, Name::Cols, Name::Fill].map(|name| k.param::<u32>(name));
    let order = ordered.then(|| k.pointer(Name::Order));
    let (word, col) = (k.block_x(), k.block_y() * THREADS + k.thread());
    k.if_(col.lt(cols), || {
        let column = if across { col / CODES } else { col };
        let load = |line, there| load(k, input, [(line, below), (column, beside)], there);
        // The one word whose codes these are, if there is one.
        let one = (!across && !ordered).then(|| load(word, col.lt(cols)));
        let of_column = across.then(|| shift(places, col % CODES));
        let packed = (0..CODES)
            .map(|i| {
                let row = word * CODES + i;
                let there = row.lt(rows);
                let source = match order {
                    Some(order) => {
                        let [source] =
                            k.when(there, || k.ld_global_nc::<u32, 1>(order.element(row, 4)));
                        source
                    }
                    None => row,
                };
                let found = match one {
                    Some(word) => word,
                    None => load(if across { source } else { source / CODES }, there),
                };
                let at = of_column.unwrap_or_else(|| shift(places, source % CODES));
                k.select(there, (found >> at) & 15, fill) << (4 * i)
            })
            .reduce(|all, one| all | one)
            .expect("there are eight");
        k.st_global(out.element(word * cols + col, 4), [packed]);
    });
    k.finish()
}

fn sums() -> Source {
    /// Two codes of the four in a word that are in the lower half of a byte.
    const LOWER: u32 = 0x0f0f_0f0f;
    /// Adds up the bytes of a word in the topmost.
    const ADD_BYTES: u32 = 0x0101_0101;
    let k = &Kernel::new("regroup_sums", Target::Sm80, THREADS);
    let (input, out) = (k.pointer(Name::Input), k.pointer(Name::Out));
    let [below, beside] = [Name::InputRow, Name::InputCol].map(|name| k.param::<u64>(name));
    let [rows, cols] = [Name::Rows, Name::Cols].map(|name| k.param::<u32>(name));
    let (first, col) = (k.block_x() * STRIP, k.block_y() * THREADS + k.thread());
    k.if_(col.lt(cols), || {
        let sum = (0..STRIP)
            .map(|i| {
                let word = first + i;
                let there = (word * CODES).lt(rows);
                let codes = load(k, input, [(word, below), (col, beside)], there);
                // A shift by a whole word leaves none, and 1 less is all.
                let used = (rows - word * CODES).min(CODES) * 4;
                let codes = codes & ((k.var(1u32) << used) - 1);
                let pairs = (codes & LOWER) + ((codes >> 4) & LOWER);
                k.select(there, (pairs * ADD_BYTES) >> 24, 0)
            })
            .reduce(|sum, one| sum + one)
            .expect("there are some");
        k.red_add(out.element(col, 4), sum.cast::<i32>().to_float());
    });
    k.finish()
}
