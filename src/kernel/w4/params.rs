//! The values of the parameters of the products' kernels.

use super::{BLOCK, MOST_WEIGHTS, Plan, Problem};
use crate::kernel::Copied;
use crate::kernel::gemm::{self, Name};
use crate::kernel::params::{self, Argument, Arguments as _, TensorMap};
use crate::kernel::plan::count;

/// The names of what a weight brings of its own.
pub(in crate::kernel) struct WeightNames {
    pub codes: Name,
    pub codes_line: Name,
    pub scale_step: Name,
    pub scales: [Name; 2],
    pub zeros: [Name; 2],
    pub n: Name,
    pub out: Name,
}

/// Those of the weights that a kernel multiplies with.
pub(super) const WEIGHTS: [WeightNames; MOST_WEIGHTS] = [
    WeightNames {
        codes: Name::Codes,
        codes_line: Name::CodesLine,
        scale_step: Name::ScaleStep,
        scales: [Name::Scales, Name::ScaleLine],
        zeros: [Name::Zeros, Name::ZeroLine],
        n: Name::N,
        out: Name::Out,
    },
    WeightNames {
        codes: Name::Codes1,
        codes_line: Name::CodesLine1,
        scale_step: Name::ScaleStep1,
        scales: [Name::Scales1, Name::ScaleLine1],
        zeros: [Name::Zeros1, Name::ZeroLine1],
        n: Name::N1,
        out: Name::Out1,
    },
    WeightNames {
        codes: Name::Codes2,
        codes_line: Name::CodesLine2,
        scale_step: Name::ScaleStep2,
        scales: [Name::Scales2, Name::ScaleLine2],
        zeros: [Name::Zeros2, Name::ZeroLine2],
        n: Name::N2,
        out: Name::Out2,
    },
];

/// A weight of a launch, and where its product goes.
#[derive(Clone, Copy, Debug)]
pub struct Weight {
    /// The address of the codes, a multiple of 16.
    pub codes: u64,
    /// Of codes of eight bits: bytes from column to column, a multiple of 16.
    pub codes_line: u64,
    /// The address of the scales and elements from row to row: bytes of both are multiples of 16.
    pub scales: (u64, u64),
    /// Whether each column has its own, of codes of eight bits that have no groups.
    pub scale_each: bool,
    /// The zero points', likewise, in the order of [the packed form](super).
    pub zeros: Option<(u64, u64)>,
    /// The address of the result.
    pub out: u64,
}

/// One launch of a plan.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The kernels that compute it.
    pub plan: &'a Plan,
    /// The address of `x`, a multiple of 16, and elements from row to row, a multiple of 8.
    pub x: (u64, u64),
    /// As many weights as the problem has.
    pub weights: &'a [Weight],
    /// What sums are multiplied with, besides the weight's scales.
    pub sum_scales: gemm::Scales,
    /// The address of the bias.
    pub bias: Option<u64>,
    /// The address of [`Plan::panel_elements`].
    pub panel: Option<u64>,
    /// The address of [`Plan::partial_sums`].
    pub partial: Option<u64>,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, step: usize, name: Name) -> Option<Argument> {
        match (self.plan, step) {
            (Plan::Stream(..), 0) => self.product(self.first()?.out, name),
            (Plan::Split(..), 0) if name == Name::Bias || self.sum_scales.has(name) => None,
            (Plan::Split(..), 0) => self.product(self.partial?, name),
            (Plan::Split(..), 1) => self.reduce(name),
            (Plan::Tiles(plan), step) => self.tiles(plan, step, name),
            (Plan::Panel(..), 0) => self.elements(name),
            (Plan::Panel(_, plan), step) => {
                let (address, line) = (self.panel?, self.problem.panel_line());
                let weight = gemm::Operand { address, line, batch: [(1, 0); 2] };
                self.matrices(plan, step - 1, weight, 0, name)
            }
            _ => None,
        }
    }
}

impl Arguments<'_> {
    fn first(&self) -> Option<&Weight> {
        self.weights.first()
    }

    /// Of a kernel that stores the first product at `out`.
    fn product(&self, out: u64, name: Name) -> Option<Argument> {
        let Problem { m, k, .. } = *self.problem;
        Some(match name {
            Name::Lhs => Argument::Pointer(self.x.0),
            Name::LhsLine => Argument::U64(self.x.1),
            Name::Out => Argument::Pointer(out),
            Name::Bias => Argument::Pointer(self.bias?),
            Name::M => Argument::U32(count(m)),
            Name::K => Argument::U32(count(k)),
            _ => return self.of_weight(name).or_else(|| self.sum_scales.argument(name)),
        })
    }

    /// What one of the weights brings.
    fn of_weight(&self, name: Name) -> Option<Argument> {
        let widths = self.problem.widths();
        self.weights.iter().zip(&WEIGHTS).zip(widths).find_map(|((weight, names), n)| {
            let &Weight { codes, codes_line, scale_each, scales, zeros, out } = weight;
            let lines = |names: [Name; 2], (address, line)| match name {
                _ if name == names[0] => Some(Argument::Pointer(address)),
                _ if name == names[1] => Some(Argument::U64(line)),
                _ => None,
            };
            match name {
                _ if name == names.codes => Some(Argument::Pointer(codes)),
                _ if name == names.codes_line => Some(Argument::U64(codes_line)),
                _ if name == names.scale_step => Some(Argument::U32(scale_each.into())),
                _ if name == names.n => Some(Argument::U32(count(n))),
                _ if name == names.out => Some(Argument::Pointer(out)),
                _ => lines(names.scales, scales).or_else(|| lines(names.zeros, zeros?)),
            }
        })
    }

    fn tiles(&self, plan: &gemm::Plan, step: usize, name: Name) -> Option<Argument> {
        // Results may have descriptors.
        let result = WEIGHTS.iter().position(|names| names.out == name);
        let bytes = self.problem.scheme.codes.are_bytes();
        let codes = WEIGHTS.iter().position(|names| bytes && names.codes == name);
        if let Some(of) = codes {
            return self.code_lines(of).map(Argument::TensorMap);
        }
        if result.is_none()
            && let Some(own) = self.of_weight(name)
        {
            return Some(own);
        }
        let (of, name) = result.map_or((0, name), |of| (of, Name::Out));
        // In place of the weight, of which nothing else is asked.
        let address = self.weights.get(of)?.codes;
        let weight = gemm::Operand { address, line: 0, batch: [(1, 0); 2] };
        self.matrices(plan, step, weight, of, name)
    }

    /// Codes of eight bits as TMA finds them: boxes of 64 by 64.
    fn code_lines(&self, of: usize) -> Option<TensorMap> {
        let &Weight { codes, codes_line, .. } = self.weights.get(of)?;
        let dims = [self.problem.k, self.problem.widths()[of]];
        Some(TensorMap::new(Copied::Byte, codes, dims, [codes_line], [BLOCK; 2]))
    }

    /// Of a product of matrices, with the weight number `of`.
    fn matrices(
        &self,
        plan: &gemm::Plan,
        step: usize,
        weight: gemm::Operand,
        of: usize,
        name: Name,
    ) -> Option<Argument> {
        let (address, line) = self.x;
        let x = gemm::Operand { address, line, batch: [(1, 0); 2] };
        let problem = gemm::Problem { n: self.problem.widths()[of], ..self.problem.product() };
        let arguments = gemm::Arguments {
            problem: &problem,
            plan,
            operands: [x, weight],
            scales: self.sum_scales,
            bias: self.bias,
            out: self.weights.get(of)?.out,
            partial: self.partial,
        };
        arguments.argument(step, name)
    }

    fn elements(&self, name: Name) -> Option<Argument> {
        match name {
            Name::OutLine => Some(Argument::U64(self.problem.panel_line())),
            _ => self.product(self.panel?, name),
        }
    }

    fn reduce(&self, name: Name) -> Option<Argument> {
        let Problem { m, n, .. } = *self.problem;
        Some(match name {
            Name::Partial => Argument::Pointer(self.partial?),
            Name::Out => Argument::Pointer(self.first()?.out),
            Name::Rows => Argument::U32(count(m)),
            Name::Cols => Argument::U32(count(n)),
            Name::Bias => Argument::Pointer(self.bias?),
            other => return self.sum_scales.argument(other),
        })
    }
}
