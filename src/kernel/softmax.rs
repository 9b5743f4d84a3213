//! Softmax of rows, `e^(x − max) / Σ e^(x − max)`, and its gradient, `y · (dy − Σ y·dy)`: one pass over memory where a row
//! fits the registers of a team of threads.

use super::name::given;
use super::params::{self, Argument, names};
use super::plan::{Step, count};
use super::rows::{self, Loaded, Room, Slots, Team, Tile, Unit, Walk, begin};
use super::{Device, Element};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Threads of a block, unless a team has more.
const THREADS: u32 = 128;

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of all operands, at least 1, whose elements are contiguous.
    pub rows: u64,
    /// Elements of a row, at least 1.
    pub cols: u64,
    /// The type of all operands and of the result.
    pub element: Element,
    /// Whether the gradient is computed, of the result and its gradient.
    pub backward: bool,
    /// Whether all rows of the operands begin at multiples of 16 bytes.
    pub aligned: bool,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The type of all operands and of the result.
    pub element: Element,
    /// Whether the gradient is computed.
    pub backward: bool,
    /// How a team holds a row.
    pub tile: Tile,
    /// Whether rows are longer than that: they are read several times.
    pub long: bool,
}

impl Config {
    /// `softmax team256 x2·8 backward, bf16`
    pub fn name(&self) -> String {
        let Self { element, backward, tile, long } = *self;
        let (long, backward) = (given(long, " long"), given(backward, " backward"));
        format!("softmax {}{long}{backward}, {}", tile.name(), element.name())
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        self.tile.team.max(THREADS)
    }

    /// Blocks that have the registers that they want, at least.
    pub fn blocks_per_sm(&self) -> u32 {
        512 / self.threads()
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    config: Config,
    units: u32,
    blocks: u32,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let Problem { rows, cols, element, backward, aligned } = *problem;
        let whole = aligned && cols.is_multiple_of(element.per_chunk().into());
        let room = Room { threads: 512, chunks: 4, elements: 16 };
        let (tile, fits) = Tile::new(cols, element, whole, room);
        let config = Config { element, backward, tile, long: !fits };
        let of_block = config.threads() / tile.team;
        let units = count(cols / u64::from(tile.unit));
        Self { config, units, blocks: count(rows.div_ceil(of_block.into())) }
    }

    fn steps(&self) -> Vec<Step> {
        vec![Step { kernel: self.config.into(), grid: [self.blocks, 1, 1] }]
    }
}

impl Problem {
    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self) -> Option<(String, u32)> {
        rows::limit(self.rows, self.cols)
    }
}

names! {
    /// The parameters. Strides are in elements.
    pub enum Name {
        /// The address of the rows or, backward, of the result.
        X "x",
        /// From row to row.
        XRow "x_row",
        /// Backward: the address of the result's gradient.
        Grad "grad",
        /// From row to row.
        GradRow "grad_row",
        /// The address of the result, or of the rows' gradient, without gaps.
        Out "out",
        /// Rows.
        Rows "rows",
        /// Elements of a row.
        Cols "cols",
        /// Units of a row.
        Units "units",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// By which kernel.
    pub plan: &'a Plan,
    /// Address of the rows, or of the result, and elements from row to row.
    pub x: (u64, u64),
    /// The same of the result's gradient.
    pub grad: Option<(u64, u64)>,
    /// The address of what is computed.
    pub out: u64,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        match name {
            Name::X => Some(Argument::Pointer(self.x.0)),
            Name::XRow => Some(Argument::U64(self.x.1)),
            Name::Grad => self.grad.map(|(address, _)| Argument::Pointer(address)),
            Name::GradRow => self.grad.map(|(_, stride)| Argument::U64(stride)),
            Name::Out => Some(Argument::Pointer(self.out)),
            Name::Rows => Some(Argument::U32(count(self.problem.rows))),
            Name::Cols => Some(Argument::U64(self.problem.cols)),
            Name::Units => Some(Argument::U32(self.plan.units)),
        }
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("softmax", Target::Sm80, config.threads());
    // Without a bound ptxas takes 32 or 40 registers for some, and spills.
    k.blocks_per_sm(config.blocks_per_sm());
    write(k, config);
    k.finish()
}

/// Units of one or two operands.
type Units<'k> = [Vec<Loaded<'k>>; 2];

fn write<'k>(k: &'k Kernel, config: &Config) {
    let &Config { element, backward, tile, long } = config;
    let operand = |at, row| (k.pointer(at), k.param::<u64>(row));
    let x = operand(Name::X, Name::XRow);
    let grad = backward.then(|| operand(Name::Grad, Name::GradRow));
    let out = k.pointer(Name::Out);
    let [rows, units] = [Name::Rows, Name::Units].map(|name| k.param::<u32>(name));
    let cols = k.param::<u64>(Name::Cols);
    let region = Team::shared(tile.team, config.threads(), 1);
    let shared = (region > 0).then(|| k.shared(2 * region));

    let walk = Walk::new(k, tile, config.threads(), rows);
    k.if_(walk.first.lt(rows), || {
        let row = walk.row(walk.first);
        let of_row = |rows| begin(rows, row.number, element);
        let (x, grad, out) = (of_row(x), grad.map(of_row), of_row((out, cols)));
        let load = |slots: &Slots<'k>| -> Units<'k> {
            let grad = grad.map(|grad| slots.load(element, grad));
            [slots.load(element, x), grad.unwrap_or_default()]
        };
        let held = (!long).then(|| {
            let slots = walk.slots(None, units).of(row.exists);
            let held = load(&slots);
            (slots, held)
        });
        let pass = |f: &dyn Fn(&Slots<'k>, &Units<'k>)| match &held {
            Some((slots, held)) => f(slots, held),
            None => k.for_(0u32, units, tile.units(), |before| {
                let slots = walk.slots(Some(before), units);
                f(&slots, &load(&slots));
            }),
        };
        let across = |number: u32, x: Reg<'k, f32>, larger: bool| {
            // Those before may still be read.
            let at = shared.map(|shared| shared + number * region);
            let combine = |a: Reg<'k, f32>, b| if larger { a.max(b) } else { a + b };
            let [x] = walk.team.combine(at, [x], combine);
            x
        };
        let unit = Unit { element, count: tile.unit };
        if backward {
            let sum = k.var(0f32);
            pass(&|_, [y, grad]| {
                let pairs =
                    y.iter().zip(grad).flat_map(|(y, dy)| y.floats().into_iter().zip(dy.floats()));
                pairs.for_each(|(y, dy)| sum.set(y.fma(dy, sum)));
            });
            let sum = across(0, sum, false);
            return pass(&|slots, [y, grad]| {
                let of_unit = |(y, dy): (&Loaded<'k>, &Loaded<'k>)| {
                    let pairs = y.floats().into_iter().zip(dy.floats());
                    unit.round(k, &pairs.map(|(y, dy)| y * (dy - sum)).collect::<Vec<_>>())
                };
                let of_x: Vec<_> = y.iter().zip(grad).map(of_unit).collect();
                slots.store(out, element, &of_x);
            });
        }
        // Past the end of a row all is −∞, of which the power is 0.
        let numbers = |slots: &Slots<'k>, x: &[Loaded<'k>]| {
            let ends = slots.or(k.var(0f32), f32::NEG_INFINITY);
            let of_unit = |(x, end): (&Loaded<'k>, Option<Reg<'k, f32>>)| {
                x.floats().into_iter().map(|x| end.map_or(x, |end| x + end)).collect::<Vec<_>>()
            };
            x.iter().zip(ends).map(of_unit).collect::<Vec<_>>()
        };
        let max = k.var(f32::NEG_INFINITY);
        // The maximum skips NaN: the sum does not.
        pass(&|slots, [x, _]| {
            numbers(slots, x).into_iter().flatten().for_each(|x| max.set(max.max(x)));
        });
        let max = across(1, max, true);
        let power = |x: Reg<'k, f32>| ((x - max) * std::f32::consts::LOG2_E).exp2();
        let sum = k.var(0f32);
        pass(&|slots, [x, _]| {
            numbers(slots, x).into_iter().flatten().for_each(|x| sum.set(sum + power(x)));
        });
        let inverse = k.var(1f32) / across(0, sum, false);
        pass(&|slots, [x, _]| {
            let of_unit = |x: Vec<Reg<'k, f32>>| {
                unit.round(k, &x.into_iter().map(|x| power(x) * inverse).collect::<Vec<_>>())
            };
            let results: Vec<_> = numbers(slots, x).into_iter().map(of_unit).collect();
            slots.store(out, element, &results);
        });
    });
}
