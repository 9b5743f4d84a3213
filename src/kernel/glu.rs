//! Gated linear units, `act(gate) · up`, and their gradients: one pass over memory, in f32.

use super::params::{self, Argument, names};
use super::plan::{Plan as _, Step, count};
use super::rows::{Place, Unit};
use super::{Device, Element};
use crate::Activation;
pub use crate::options::Gate;
use crate::ptx::{Kernel, Source, Target};

/// Threads of a block.
const THREADS: u32 = 256;

impl Gate {
    fn name(self) -> &'static str {
        match self {
            Self::Silu => "silu",
            Self::GeluTanh => "gelu",
        }
    }

    fn activation(self) -> Activation {
        match self {
            Self::Silu => Activation::Silu,
            Self::GeluTanh => Activation::GeluTanh,
        }
    }
}

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of all operands, at least 1, whose elements are contiguous.
    pub rows: u64,
    /// Elements of a row, at least 1.
    pub cols: u64,
    /// The type of all operands and results.
    pub element: Element,
    /// What the gate goes through.
    pub gate: Gate,
    /// Whether the gradients of both operands are computed, and not the result.
    pub backward: bool,
    /// Whether all rows of the operands begin at multiples of 16 bytes.
    pub aligned: bool,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The type of all operands and results.
    pub element: Element,
    /// What the gate goes through.
    pub gate: Gate,
    /// Whether the gradients of both operands are computed, and not the result.
    pub backward: bool,
    /// Elements that a thread takes: one, or as many as 16 bytes hold.
    pub unit: u32,
    /// Threads of a row, a power of two. The others of the block are on the rows after it.
    pub across: u32,
}

impl Config {
    /// `glu silu x8 across256, bf16 backward`
    pub fn name(&self) -> String {
        let (gate, element) = (self.gate.name(), self.element.name());
        let backward = if self.backward { " backward" } else { "" };
        format!("glu {gate} x{} across{}, {element}{backward}", self.unit, self.across)
    }
}

/// The kernel and its grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    config: Config,
    /// Units of a row.
    units: u32,
    /// Blocks of a row.
    across: u32,
    blocks: u32,
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let Problem { rows, cols, element, gate, backward, aligned } = *problem;
        let whole = aligned && cols.is_multiple_of(element.per_chunk().into());
        let unit = Unit::of(element, whole).count;
        let units = cols / u64::from(unit);
        let across = units.next_power_of_two().min(THREADS.into()) as u32;
        let blocks = [units.div_ceil(across.into()), rows.div_ceil((THREADS / across).into())];
        Self {
            config: Config { element, gate, backward, unit, across },
            units: count(units),
            across: count(blocks[0]),
            blocks: count(blocks[0].saturating_mul(blocks[1])),
        }
    }

    fn steps(&self) -> Vec<Step> {
        vec![Step { kernel: self.config.into(), grid: [self.blocks, 1, 1] }]
    }
}

impl Problem {
    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self, device: &Device) -> Option<(String, u32)> {
        let most = i32::MAX as u32;
        let Plan { units, blocks, .. } = Plan::new(self, device);
        let over = self.rows > most.into() || units > most || blocks > most;
        over.then(|| (format!("{} rows of {} elements", self.rows, self.cols), most))
    }
}

names! {
    /// The parameters. Strides are in elements.
    pub enum Name {
        /// The address of the gate.
        Gate "gate",
        /// From row to row.
        GateRow "gate_row",
        /// The address of what is gated.
        Up "up",
        /// From row to row.
        UpRow "up_row",
        /// Backward: the address of the result's gradient.
        Grad "grad",
        /// From row to row.
        GradRow "grad_row",
        /// The address of the result, or of the gate's gradient, without gaps.
        Out "out",
        /// Backward: the address of the other operand's gradient, without gaps.
        OutUp "out_up",
        /// Rows.
        Rows "rows",
        /// Elements of a row.
        Cols "cols",
        /// Units of a row.
        Units "units",
        /// Blocks of a row.
        Across "across",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// By which kernel.
    pub plan: &'a Plan,
    /// Addresses of the gate, of what is gated and, backward, of the gradient; and elements from row to row.
    pub operands: &'a [(u64, u64)],
    /// Addresses of the result or, backward, of both gradients.
    pub results: &'a [u64],
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let operand = |i: usize| self.operands.get(i).copied();
        let address = |i: usize| operand(i).map(|(address, _)| Argument::Pointer(address));
        let row = |i: usize| operand(i).map(|(_, row)| Argument::U64(row));
        let result = |i: usize| self.results.get(i).copied().map(Argument::Pointer);
        match name {
            Name::Gate => address(0),
            Name::GateRow => row(0),
            Name::Up => address(1),
            Name::UpRow => row(1),
            Name::Grad => address(2),
            Name::GradRow => row(2),
            Name::Out => result(0),
            Name::OutUp => result(1),
            Name::Rows => Some(Argument::U32(count(self.problem.rows))),
            Name::Cols => Some(Argument::U64(self.problem.cols)),
            Name::Units => Some(Argument::U32(self.plan.units)),
            Name::Across => Some(Argument::U32(self.plan.across)),
        }
    }
}

/// The kernel. Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let &Config { element, gate, backward, unit, across } = config;
    let act = gate.activation();
    let k = &Kernel::new("glu", Target::Sm80, THREADS);
    let operand = |at, row| (k.pointer(at), k.param::<u64>(row));
    let gates = operand(Name::Gate, Name::GateRow);
    let ups = operand(Name::Up, Name::UpRow);
    let grads = backward.then(|| operand(Name::Grad, Name::GradRow));
    let out = k.pointer(Name::Out);
    let out_up = backward.then(|| k.pointer(Name::OutUp));
    let (rows, cols) = (k.param::<u32>(Name::Rows), k.param::<u64>(Name::Cols));
    let (units, blocks) = (k.param::<u32>(Name::Units), k.param::<u32>(Name::Across));

    let (thread, block) = (k.thread(), k.block_x());
    let row = block / blocks * (THREADS / across) + thread / across;
    let at = block % blocks * across + thread % across;
    k.if_(row.lt(rows), || {
        k.if_(at.lt(units), || {
            let lane = Place { row: row.wide(), col: at.wide() * u64::from(unit), element };
            let unit = Unit { element, count: unit };
            let load = |(from, stride)| unit.load(k, lane.in_rows(from, stride)).floats();
            let store = |to, values: Vec<_>| unit.round(k, &values).store(k, to);
            let (gates, ups) = (load(gates), load(ups));
            let Some((grads, out_up)) = grads.map(load).zip(out_up) else {
                let results = gates.iter().zip(&ups).map(|(&x, &up)| act.apply(x) * up);
                return store(lane.in_rows(out, cols), results.collect());
            };
            let of_gate = gates.iter().zip(&ups).zip(&grads);
            let of_gate = of_gate.map(|((&x, &up), &grad)| grad * up * act.slope(x));
            store(lane.in_rows(out, cols), of_gate.collect());
            let of_up = gates.iter().zip(&grads).map(|(&x, &grad)| grad * act.apply(x));
            store(lane.in_rows(out_up, cols), of_up.collect());
        });
    });
    k.finish()
}
