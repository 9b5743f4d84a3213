//! The parameters of the family's kernels, and their values.

use super::{Pass, Plan, Problem};
use crate::kernel::params::{self, Argument, names};
use crate::kernel::plan::count;

names! {
    /// The parameters. Strides are in elements; results lie without gaps.
    pub enum Name {
        /// The address of the rows, or of the sums that were normed.
        X "x",
        /// From row to row.
        XRow "x_row",
        /// The address of what is added to them.
        Residual "residual",
        /// From row to row.
        ResidualRow "residual_row",
        /// The address of the weight, of which each column has one.
        Weight "weight",
        /// That of the bias.
        Bias "bias",
        /// That of the normed rows.
        Out "out",
        /// That of the sums of rows and residual.
        Sum "sum",
        /// That of the reciprocal standard deviation of each row, in f32.
        Rstd "rstd",
        /// That of the mean of each row, in f32.
        Mean "mean",
        /// That of the normed rows' gradient.
        Grad "grad",
        /// From row to row.
        GradRow "grad_row",
        /// That of the sums' gradient.
        SumGrad "sum_grad",
        /// From row to row.
        SumGradRow "sum_grad_row",
        /// That of the rows' gradient.
        XGrad "x_grad",
        /// That of two means of each row, in f32.
        Moments "moments",
        /// That of a sum of each column by each block, in f32: of the weight's gradient, then of the bias's.
        Parts "parts",
        /// How many blocks have sums.
        Count "count",
        /// The address of the first gradient that is a sum of parts.
        FirstSums "first_sums",
        /// That of the second one.
        SecondSums "second_sums",
        /// Rows.
        Rows "rows",
        /// Elements of a row.
        Cols "cols",
        /// Units of a row.
        Units "units",
        /// 1 over the elements of a row.
        Inverse "inverse",
        /// What is added to the variance.
        Eps "eps",
    }
}

/// Addresses of what a call computes.
#[derive(Clone, Copy, Debug, Default)]
pub struct Results<'a> {
    /// Of the normed rows, or the rows' gradient.
    pub rows: Option<u64>,
    /// Of the sums of rows and residual.
    pub sum: Option<u64>,
    /// Of the gradients of weight and bias, those that are wanted.
    pub columns: &'a [u64],
    /// Of [`Plan::parts`] floats.
    pub parts: Option<u64>,
    /// Of [`Plan::moments`] floats.
    pub moments: Option<u64>,
}

/// One call.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// By which kernels.
    pub plan: &'a Plan,
    /// Address of the rows, or of the sums that were normed, and elements from row to row.
    pub x: (u64, u64),
    /// The same of the residual or, backward, of the sums' gradient.
    pub other: Option<(u64, u64)>,
    /// The same of the normed rows' gradient.
    pub grad: Option<(u64, u64)>,
    /// Addresses of the weight and, forward, of the bias.
    pub weight: u64,
    /// See above.
    pub bias: Option<u64>,
    /// Addresses of what each row has saved: the reciprocal standard deviation, and the mean.
    pub stats: [Option<u64>; 2],
    /// Results.
    pub results: Results<'a>,
    /// What is added to the variance.
    pub eps: f32,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        let Self { problem, plan, results, .. } = self;
        let forward = matches!(problem.pass, Pass::Forward { .. });
        let address = |at: Option<u64>| at.map(Argument::Pointer);
        let at = |rows: Option<(u64, u64)>| rows.map(|(address, _)| Argument::Pointer(address));
        let stride = |rows: Option<(u64, u64)>| rows.map(|(_, stride)| Argument::U64(stride));
        let [residual, sum_grad] = if forward { [self.other, None] } else { [None, self.other] };
        match name {
            Name::X => at(Some(self.x)),
            Name::XRow => stride(Some(self.x)),
            Name::Residual => at(residual),
            Name::ResidualRow => stride(residual),
            Name::SumGrad => at(sum_grad),
            Name::SumGradRow => stride(sum_grad),
            Name::Grad => at(self.grad),
            Name::GradRow => stride(self.grad),
            Name::Weight => address(Some(self.weight)),
            Name::Bias => address(self.bias),
            Name::Out => address(results.rows.filter(|_| forward)),
            Name::XGrad => address(results.rows.filter(|_| !forward)),
            Name::Sum => address(results.sum),
            Name::Rstd => address(self.stats[0]),
            Name::Mean => address(self.stats[1]),
            Name::Moments => address(results.moments),
            Name::Parts => address(results.parts),
            Name::FirstSums => address(results.columns.first().copied()),
            Name::SecondSums => address(results.columns.get(1).copied()),
            Name::Count => Some(Argument::U32(plan.blocks())),
            Name::Rows => Some(Argument::U32(count(problem.rows))),
            Name::Cols => Some(Argument::U64(problem.cols)),
            Name::Units => Some(Argument::U32(plan.units())),
            Name::Inverse => Some(Argument::F32((1.0 / problem.cols as f64) as f32)),
            Name::Eps => Some(Argument::F32(self.eps)),
        }
    }
}
