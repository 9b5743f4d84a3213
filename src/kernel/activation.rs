//! Activations of products, their gradients, and sums of columns, which are the gradients of biases: one pass over
//! memory, in f32.
//!
//! A block takes some columns of a part of the rows, and each of its threads a unit of every few of these rows.
//! Where columns are summed, the threads add up what they have through shared memory, in the order of the rows,
//! and a second kernel does the same to the sums of the parts: no sum depends on who is first.

use super::params::{self, Argument, names};
use super::plan::{Plan as _, Step, count};
use super::rows::Unit;
use super::{Device, Element};
use crate::Activation;
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block.
const THREADS: u32 = 256;
/// Bytes that a thread loads at once.
const LINE: u32 = 16;
/// The most threads of a row, so that columns are no more than threads.
const ACROSS: u32 = 32;
/// Of sums of parts, where blocks are few: more threads take the rows.
const ACROSS_PARTS: u32 = 8;
/// Rows of a thread that are on their way at once.
const AT_ONCE: u32 = 4;
/// Blocks for each multiprocessor: two share one, and the last ones to end are a fourth of the time.
const BLOCKS: u64 = 8;

/// What becomes of each element.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Work {
    /// `act(x)`, of the result's type as x.
    Apply(Activation, Element),
    /// `grad · act′(x)`, given x and the gradient, of the types x, gradient and result; and its sums.
    Gradient(Activation, [Element; 3], Option<Element>),
    /// Nothing: sums of columns of a type, as another.
    Sums(Element, Element),
}

impl Work {
    /// Of what is read by any strides: the gradient, or x where there is none.
    fn read(self) -> Element {
        match self {
            Self::Apply(_, x) => x,
            Self::Gradient(_, [_, grad, _], _) => grad,
            Self::Sums(grad, _) => grad,
        }
    }

    /// Of the result for each element.
    fn result(self) -> Option<Element> {
        match self {
            Self::Apply(_, x) => Some(x),
            Self::Gradient(_, [.., out], _) => Some(out),
            Self::Sums(..) => None,
        }
    }

    /// Of the sums.
    fn sums(self) -> Option<Element> {
        match self {
            Self::Apply(..) => None,
            Self::Gradient(.., sums) => sums,
            Self::Sums(_, sums) => Some(sums),
        }
    }

    /// The same with sums that another kernel adds up.
    fn in_parts(self) -> Self {
        match self {
            Self::Gradient(act, of, Some(_)) => Self::Gradient(act, of, Some(Element::F32)),
            Self::Sums(grad, _) => Self::Sums(grad, Element::F32),
            _ => self,
        }
    }

    fn name(self) -> String {
        let sums = |sums: Option<Element>| match sums {
            Some(sums) => format!(" sums→{}", sums.name()),
            None => String::new(),
        };
        match self {
            Self::Apply(act, x) => format!("{} {}", act.name(), x.name()),
            Self::Gradient(act, [x, grad, out], to) => {
                let (act, x, grad, out) = (act.name(), x.name(), grad.name(), out.name());
                format!("{act} gradient {grad}·{x}→{out}{}", sums(to))
            }
            Self::Sums(grad, to) => format!("{}{}", grad.name(), sums(Some(to))),
        }
    }

    /// Elements that a thread takes where 16 bytes can be loaded at once.
    fn unit(self) -> u32 {
        let least = match self {
            Self::Apply(_, x) => x.size(),
            Self::Gradient(_, of, _) => of.map(Element::size).into_iter().fold(4, u32::min),
            Self::Sums(grad, _) => grad.size(),
        };
        LINE / least
    }
}

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows, at least 1. Those of x and of the result lie without gaps.
    pub rows: u64,
    /// Elements of a row, at least 1, that are contiguous.
    pub cols: u64,
    /// What is computed.
    pub work: Work,
    /// Whether all rows begin at multiples of 16 bytes.
    pub aligned: bool,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// What is computed.
    pub work: Work,
    /// Elements that a thread takes of a row: one, or as many of the smallest type as 16 bytes hold.
    pub unit: u32,
    /// Threads of a row, a power of two. The others of the block are on the rows after it.
    pub across: u32,
}

impl Config {
    /// `activation x8 across32, gelu_tanh gradient bf16·bf16→bf16 sums→f32`
    pub fn name(&self) -> String {
        format!("activation x{} across{}, {}", self.unit, self.across, self.work.name())
    }
}

/// The kernels and their grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    first: Pass,
    /// The sums of the parts, added up.
    second: Option<Pass>,
}

/// A kernel over some rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Pass {
    config: Config,
    rows: u32,
    /// Units of a row.
    units: u32,
    /// Blocks across, and parts of the rows.
    grid: [u32; 2],
    /// Rows of a part.
    part: u32,
}

impl Pass {
    /// In as many parts as keep the device busy, unless it is one.
    fn new(problem: &Problem, most_across: u32, busy: Option<&Device>) -> Self {
        let &Problem { rows, cols, work, aligned } = problem;
        let most = work.unit();
        let unit = if aligned && cols.is_multiple_of(most.into()) { most } else { 1 };
        let units = cols / u64::from(unit);
        let across = units.next_power_of_two().min(most_across.into()) as u32;
        let blocks = units.div_ceil(across.into());
        let at_once = u64::from(THREADS / across * AT_ONCE);
        let parts = busy.map_or(1, |device| {
            let wanted = BLOCKS * u64::from(device.multiprocessors);
            wanted.div_ceil(blocks).min(rows.div_ceil(at_once))
        });
        let part = rows.div_ceil(parts).next_multiple_of(at_once);
        Self {
            config: Config { work, unit, across },
            rows: count(rows),
            units: count(units),
            grid: [count(blocks), count(rows.div_ceil(part))],
            part: count(part),
        }
    }

    fn step(&self) -> Step {
        Step { kernel: self.config.into(), grid: [self.grid[0], self.grid[1], 1] }
    }
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        let first = Pass::new(problem, ACROSS, Some(device));
        let Some(sums) = problem.work.sums().filter(|_| first.grid[1] > 1) else {
            return Self { first, second: None };
        };
        let config = Config { work: problem.work.in_parts(), ..first.config };
        let parts = Problem {
            rows: first.grid[1].into(),
            work: Work::Sums(Element::F32, sums),
            aligned: true,
            ..*problem
        };
        Self {
            first: Pass { config, ..first },
            second: Some(Pass::new(&parts, ACROSS_PARTS, None)),
        }
    }

    fn steps(&self) -> Vec<Step> {
        [Some(self.first), self.second].into_iter().flatten().map(|pass| pass.step()).collect()
    }
}

impl Plan {
    /// How many parts of the rows have sums of their own, which need f32 for each column.
    pub fn parts(&self) -> usize {
        self.second.map_or(0, |second| second.rows as usize)
    }
}

impl Problem {
    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self, device: &Device) -> Option<(String, u32)> {
        let most = i32::MAX as u32;
        let Pass { units, part, grid, .. } = Plan::new(self, device).first;
        let over = self.rows > most.into() || [units, part, grid[0]].iter().any(|&n| n > most);
        over.then(|| (format!("{} rows of {} elements", self.rows, self.cols), most))
    }
}

names! {
    /// The parameters. Strides are in elements.
    pub enum Name {
        /// The address of what is read by rows: the gradient, or x where there is none.
        Input "input",
        /// From row to row.
        InputRow "input_row",
        /// The address of x beside a gradient, without gaps.
        Before "before",
        /// The address of the result, without gaps.
        Out "out",
        /// The address of the sums: of each part of the rows, without gaps.
        Sums "sums",
        /// Rows.
        Rows "rows",
        /// Rows of a part.
        Part "part",
        /// Elements of a row.
        Cols "cols",
        /// Units of a row.
        Units "units",
    }
}

/// One launch of each of the plan's kernels.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// By which kernels.
    pub plan: &'a Plan,
    /// The address of the gradient, or of x where there is none, and elements from row to row.
    pub input: (u64, u64),
    /// The address of x beside a gradient.
    pub before: Option<u64>,
    /// The address of the result.
    pub out: Option<u64>,
    /// The address of the sums.
    pub sums: Option<u64>,
    /// The address of the sums of the parts, if there are some.
    pub parts: Option<u64>,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, step: usize, name: Name) -> Option<Argument> {
        let Plan { first, second } = self.plan;
        let (pass, input, sums) = match step {
            0 => (first, self.input, self.parts.or(self.sums)),
            _ => (second.as_ref()?, (self.parts?, self.problem.cols), self.sums),
        };
        match name {
            Name::Input => Some(Argument::Pointer(input.0)),
            Name::InputRow => Some(Argument::U64(input.1)),
            Name::Before => self.before.map(Argument::Pointer),
            Name::Out => self.out.map(Argument::Pointer),
            Name::Sums => sums.map(Argument::Pointer),
            Name::Rows => Some(Argument::U32(pass.rows)),
            Name::Part => Some(Argument::U32(pass.part)),
            Name::Cols => Some(Argument::U64(self.problem.cols)),
            Name::Units => Some(Argument::U32(pass.units)),
        }
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let &Config { work, unit, across } = config;
    let k = &Kernel::new("activation", Target::Sm80, THREADS);
    k.blocks_per_sm(2);
    let input =
        Rows { element: work.read(), at: k.pointer(Name::Input), row: k.param(Name::InputRow) };
    let (rows, part) = (k.param::<u32>(Name::Rows), k.param::<u32>(Name::Part));
    let (cols, units) = (k.param::<u64>(Name::Cols), k.param::<u32>(Name::Units));
    let packed = |name, element| Rows { element, at: k.pointer(name), row: cols };
    let before = match work {
        Work::Gradient(_, [x, ..], _) => Some(packed(Name::Before, x)),
        Work::Apply(..) | Work::Sums(..) => None,
    };
    let out = work.result().map(|element| packed(Name::Out, element));
    let sums = work.sums().map(|element| packed(Name::Sums, element));

    let (thread, down) = (k.thread(), THREADS / across);
    let (line, lane) = (thread / across, thread % across);
    let at = k.block_x() * across + lane;
    let exists = at.lt(units);
    // Past the end the last one is loaded again.
    let col = at.min(units - 1).wide() * u64::from(unit);
    let first = k.block_y() * part;
    let end = (first + part).min(rows);
    let totals: Vec<_> = (0..unit).map(|_| k.var(0f32)).collect();
    k.for_(first + line, end, down * AT_ONCE, |row| {
        let rows: Vec<_> = (0..AT_ONCE)
            .map(|i| {
                let row = if i == 0 { row } else { row + i * down };
                (row.lt(end), row.min(end - 1).wide())
            })
            .collect();
        let loaded: Vec<_> = rows
            .iter()
            .map(|&(_, row)| {
                (input.load(unit, row, col), before.map(|before| before.load(unit, row, col)))
            })
            .collect();
        for (&(valid, row), (inputs, before)) in rows.iter().zip(loaded) {
            let results: Vec<_> = match (work, before) {
                (Work::Apply(act, _), _) => inputs.into_iter().map(|x| act.apply(x)).collect(),
                (Work::Gradient(act, ..), Some(before)) => {
                    inputs.into_iter().zip(before).map(|(grad, x)| grad * act.slope(x)).collect()
                }
                _ => inputs,
            };
            if let Some(out) = out {
                k.if_(valid & exists, || {
                    out.unit(unit).store(out.address(row, col), &results);
                });
            }
            if sums.is_some() {
                for (total, &result) in totals.iter().zip(&results) {
                    total.set(*total + k.select(valid, result, 0.0));
                }
            }
        }
    });
    if let Some(sums) = sums {
        let width = across * unit;
        let shared = k.shared(THREADS * unit * 4);
        for (total, i) in totals.into_iter().zip(0..) {
            k.st_shared((shared + thread * (unit * 4)).at(i * 4), [total]);
        }
        k.sync_block();
        let col = k.block_x() * width + thread;
        k.if_(thread.lt(width), || {
            k.if_((col / unit).lt(units), || {
                let from = shared + thread * 4;
                let total = (0..down)
                    .map(|line| {
                        let [share] = k.ld_shared::<f32, 1>(from.at((line * width * 4).into()));
                        share
                    })
                    .reduce(|sum, share| sum + share)
                    .expect("a block has lines");
                let to = sums.address(k.block_y().wide(), col.wide());
                sums.unit(1).store(to, &[total]);
            });
        });
    }
    k.finish()
}

/// Rows of contiguous elements.
#[derive(Clone, Copy)]
struct Rows<'k> {
    element: Element,
    at: Reg<'k, u64>,
    /// Elements from row to row.
    row: Reg<'k, u64>,
}

impl<'k> Rows<'k> {
    fn unit(self, count: u32) -> Unit {
        Unit { element: self.element, count }
    }

    fn address(self, row: Reg<'k, u64>, col: Reg<'k, u64>) -> Reg<'k, u64> {
        self.at + (row * self.row + col) * u64::from(self.element.size())
    }

    fn load(self, unit: u32, row: Reg<'k, u64>, col: Reg<'k, u64>) -> Vec<Reg<'k, f32>> {
        self.unit(unit).load(self.at.kernel(), self.address(row, col)).floats()
    }
}
