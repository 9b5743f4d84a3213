//! The values of the parameters of a backward pass's kernels.

use super::{Launch, Part, Plan, Problem, Zeroed};
use crate::kernel::attention::{Inputs, Name, Operand};
use crate::kernel::hopper::SLAB;
use crate::kernel::params::{self, Argument};

/// A gradient in memory.
#[derive(Clone, Copy, Debug)]
pub struct Gradient {
    /// The address of its first element.
    pub address: u64,
    /// Elements between rows, heads and sequences.
    pub strides: [u64; 3],
}

/// One launch of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The kernels that compute it.
    pub plan: &'a Plan,
    /// What the forward pass read.
    pub inputs: Inputs,
    /// The result, and its gradient.
    pub out: Operand,
    pub grad: Operand,
    /// The addresses of [`Name::RowMax`] and [`Name::RowLog`].
    pub stats: [u64; 2],
    /// The address of the gradient of the log-sum-exp.
    pub lse_grad: Option<u64>,
    /// The address of [`Name::Delta`].
    pub delta: u64,
    /// The gradients of queries, keys and values.
    pub grads: [Gradient; 3],
    /// The address of that of the bias.
    pub bias_grad: Option<u64>,
    /// The address of what [`Zeroed`] counts, a multiple of 16.
    pub zeroed: u64,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, step: usize, name: Name) -> Option<Argument> {
        if name == Name::TilesTaken {
            let Zeroed { dq_sums, dq_turns, .. } = self.plan.zeroed;
            return Some(Argument::Pointer(self.zeroed + 4 * (dq_sums + dq_turns + step as u64)));
        }
        match self.plan.parts.get(step)? {
            Part::Delta(_, [columns, _]) => match name {
                Name::Columns => Some(Argument::U32(*columns)),
                _ => self.common(name),
            },
            Part::Sm80(_, launch) => {
                let [q, k, v] = &self.inputs.operands;
                match name {
                    Name::Q => Some(Argument::Pointer(q.address)),
                    Name::K => Some(Argument::Pointer(k.address)),
                    Name::V => Some(Argument::Pointer(v.address)),
                    _ => self.of_launch(launch, name),
                }
            }
            Part::Keys(config, launch) => {
                let map = match name {
                    Name::Q => self.operand(0, config.queries),
                    Name::K => self.operand(1, config.keys()),
                    Name::V => self.operand(2, config.keys()),
                    Name::Grad => self.map(&self.grad, config.queries),
                    Name::Dk => self.gradient(1),
                    Name::Dv => self.gradient(2),
                    _ => return self.of_launch(launch, name),
                };
                Some(map)
            }
            Part::Queries(config, launch) => {
                let map = match name {
                    Name::Q => self.operand(0, config.queries()),
                    Name::K => self.operand(1, config.keys),
                    Name::V => self.operand(2, config.keys),
                    Name::Grad => self.map(&self.grad, config.queries()),
                    Name::Dq => self.gradient(0),
                    _ => return self.of_launch(launch, name),
                };
                Some(map)
            }
            Part::Dq(_, launch) => self.of_launch(launch, name),
        }
    }
}

impl Arguments<'_> {
    /// A descriptor with boxes of 64 columns and some rows.
    fn map(&self, operand: &Operand, rows: u32) -> Argument {
        Argument::TensorMap(operand.map(self.problem.attention.element, [SLAB, rows]))
    }

    /// That of queries, keys or values.
    fn operand(&self, which: usize, rows: u32) -> Argument {
        self.map(&self.inputs.operands[which], rows)
    }

    /// That of the gradient of queries, keys or values.
    fn gradient(&self, which: usize) -> Argument {
        let Gradient { address, strides } = self.grads[which];
        let Operand { cols, lens, .. } = self.inputs.operands[which];
        self.map(&Operand { address, cols: cols.next_multiple_of(8), lens, strides }, SLAB)
    }

    /// What depends on a launch, and what does not.
    fn of_launch(&self, launch: &Launch, name: Name) -> Option<Argument> {
        match name {
            Name::Right => Some(Argument::U32(launch.right.cast_unsigned())),
            Name::Left => Some(Argument::U32(launch.left.cast_unsigned())),
            _ => launch.order.argument(name).or_else(|| self.common(name)),
        }
    }

    /// What is the same for all kernels.
    fn common(&self, name: Name) -> Option<Argument> {
        let attention = &self.problem.attention;
        let [dq, dk, dv] = &self.grads;
        let number = |n: u64| Argument::U32(n as u32);
        Some(match name {
            Name::Out => Argument::Pointer(self.out.address),
            Name::OutRow => self.out.stride(0),
            Name::OutHead => self.out.stride(1),
            Name::OutBatch => self.out.stride(2),
            Name::Grad => Argument::Pointer(self.grad.address),
            Name::GradRow => self.grad.stride(0),
            Name::GradHead => self.grad.stride(1),
            Name::GradBatch => self.grad.stride(2),
            Name::LseGrad => Argument::Pointer(self.lse_grad?),
            Name::RowMax => Argument::Pointer(self.stats[0]),
            Name::RowLog => Argument::Pointer(self.stats[1]),
            Name::Delta => Argument::Pointer(self.delta),
            Name::DqAt => Argument::Pointer(dq.address),
            Name::DqRow => Argument::U64(dq.strides[0]),
            Name::DqHead => Argument::U64(dq.strides[1]),
            Name::DqBatch => Argument::U64(dq.strides[2]),
            Name::DkAt => Argument::Pointer(dk.address),
            Name::DkRow => Argument::U64(dk.strides[0]),
            Name::DkHead => Argument::U64(dk.strides[1]),
            Name::DkBatch => Argument::U64(dk.strides[2]),
            Name::DvAt => Argument::Pointer(dv.address),
            Name::DvRow => Argument::U64(dv.strides[0]),
            Name::DvHead => Argument::U64(dv.strides[1]),
            Name::DvBatch => Argument::U64(dv.strides[2]),
            Name::GradScale => Argument::F32(self.inputs.scale),
            Name::DqSums | Name::Zeroed => Argument::Pointer(self.zeroed),
            Name::DqTurns => Argument::Pointer(self.zeroed + 4 * self.plan.zeroed.dq_sums),
            Name::ZeroedUnits => number(self.plan.zeroed.units()),
            Name::DbiasAt => Argument::Pointer(self.bias_grad?),
            Name::BiasHeads => number(attention.heads / self.problem.bias_grad?.repeated[1]),
            Name::RepeatBatch => number(self.problem.bias_grad?.repeated[0]),
            Name::RepeatHeads => number(self.problem.bias_grad?.repeated[1]),
            _ => return self.inputs.argument(attention, name),
        })
    }
}
