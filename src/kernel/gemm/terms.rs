//! What is done to sums before they are stored, and what is read for it: scales, zero points, a bias.

use super::{Epilogue, Name};
use crate::kernel::epilogue::Scale;
use crate::ptx::{Kernel, Number, Reg};

/// What products are added up in.
pub trait Sum: Number {
    /// No product so far.
    const ZERO: Self;

    /// The sum less a number.
    fn less<'k>(sum: Reg<'k, Self>, by: Reg<'k, i32>) -> Reg<'k, Self>;

    /// The nearest float.
    fn float<'k>(sum: Reg<'k, Self>) -> Reg<'k, f32>;
}

impl Sum for f32 {
    const ZERO: Self = 0.0;

    fn less<'k>(sum: Reg<'k, f32>, by: Reg<'k, i32>) -> Reg<'k, f32> {
        sum - by.to_float()
    }

    fn float<'k>(sum: Reg<'k, f32>) -> Reg<'k, f32> {
        sum
    }
}

impl Sum for i32 {
    const ZERO: Self = 0;

    fn less<'k>(sum: Reg<'k, i32>, by: Reg<'k, i32>) -> Reg<'k, i32> {
        sum - by
    }

    fn float<'k>(sum: Reg<'k, i32>) -> Reg<'k, f32> {
        sum.to_float()
    }
}

/// Sums of parts of the depth, added up in their order.
pub(super) fn add<'k, S: Sum>(
    parts: impl IntoIterator<Item = Vec<Reg<'k, S>>>,
) -> Option<Vec<Reg<'k, S>>> {
    let add =
        |a: Vec<Reg<'k, S>>, b| a.into_iter().zip(b).map(|(a, b): (_, Reg<'k, S>)| a + b).collect();
    parts.into_iter().reduce(add)
}

/// Where a kernel finds what it does with a sum.
#[derive(Clone, Copy)]
pub(super) struct Terms<'k> {
    pub epilogue: Epilogue,
    bias: Option<Reg<'k, u64>>,
    scales: Scales<'k>,
}

/// The parameters of a [`Scale`].
#[derive(Clone, Copy)]
enum Scales<'k> {
    None,
    One(Reg<'k, f32>),
    Lines { rows: PerRow<'k>, cols: Reg<'k, u64>, zero: Option<(PerRow<'k>, Reg<'k, u64>)> },
}

/// A number for each row of all products, or one for all: the address, and 1 or 0.
#[derive(Clone, Copy)]
struct PerRow<'k> {
    address: Reg<'k, u64>,
    step: Reg<'k, u32>,
}

/// What a row adds to the terms of its sums.
#[derive(Clone, Copy, Default)]
pub(super) struct Row<'k> {
    scale: Option<Reg<'k, f32>>,
    zero: Option<Reg<'k, i32>>,
}

/// What a column adds.
#[derive(Clone, Copy, Default)]
pub(super) struct Column<'k> {
    scale: Option<Reg<'k, f32>>,
    /// The sum of the right operand's column.
    sum: Option<Reg<'k, i32>>,
    bias: Option<Reg<'k, f32>>,
}

impl<'k> PerRow<'k> {
    fn load<T: Number>(&self, row: Reg<'k, u32>, valid: Reg<'k, bool>) -> Reg<'k, T> {
        let k = row.kernel();
        let from = self.address.element(row * self.step, 4);
        let [value] = k.when(valid, || k.ld_global::<T, 1>(from));
        value
    }
}

impl<'k> Terms<'k> {
    /// Declares their parameters.
    pub fn params(k: &'k Kernel, epilogue: Epilogue) -> Self {
        let per_row = |at, step| PerRow { address: k.pointer(at), step: k.param(step) };
        let bias = epilogue.bias.map(|_| k.pointer(Name::Bias));
        let lines = |zero: bool| Scales::Lines {
            rows: per_row(Name::RowScales, Name::RowScaleStep),
            cols: k.pointer(Name::ColScales),
            zero: zero.then(|| (per_row(Name::Zeros, Name::ZeroStep), k.pointer(Name::ColSums))),
        };
        let scales = match epilogue.scale {
            Scale::None | Scale::Exact => Scales::None,
            Scale::One => Scales::One(k.param(Name::Scale)),
            Scale::Lines => lines(false),
            Scale::ZeroPoint => lines(true),
        };
        Self { epilogue, bias, scales }
    }

    /// The terms of a row. `place` gives its number, counted over all products, and whether it is valid: else
    /// they are not loaded, and undefined.
    pub fn row(&self, place: impl FnOnce() -> (Reg<'k, u32>, Reg<'k, bool>)) -> Row<'k> {
        match self.scales {
            Scales::None => Row::default(),
            Scales::One(scale) => Row { scale: Some(scale), zero: None },
            Scales::Lines { rows, zero, .. } => {
                let (row, valid) = place();
                Row {
                    scale: Some(rows.load(row, valid)),
                    zero: zero.map(|(zeros, _)| zeros.load(row, valid)),
                }
            }
        }
    }

    /// Those of `N` columns side by side, undefined and not loaded where they are not `valid`.
    pub fn columns<const N: usize>(
        &self,
        col: Reg<'k, u32>,
        valid: impl Fn() -> Reg<'k, bool>,
    ) -> [Column<'k>; N] {
        let k = col.kernel();
        let bias = self.bias.map(|address| {
            let from = address.element(col, self.epilogue.bias_size());
            self.epilogue.load_bias::<N>(k, from, valid())
        });
        // No `.nc`: those of a whole tile would be loaded ahead of all barriers, into more registers than there
        // are.
        let words = |address: Reg<'k, u64>| {
            let from = address.element(col, 4);
            k.when(valid(), || k.ld_global::<u32, N>(from))
        };
        let (scales, sums) = match self.scales {
            Scales::Lines { cols, zero, .. } => {
                (Some(words(cols)), zero.map(|(_, sums)| words(sums)))
            }
            Scales::None | Scales::One(_) => (None, None),
        };
        std::array::from_fn(|i| Column {
            scale: scales.map(|all| all[i].cast()),
            sum: sums.map(|all| all[i].cast()),
            bias: bias.map(|all| all[i]),
        })
    }

    /// `act(scale · (sum - zero · column's sum) + bias)`; an exact sum as the float of the same bits.
    pub fn finish<S: Sum>(&self, sum: Reg<'k, S>, row: Row<'k>, col: Column<'k>) -> Reg<'k, f32> {
        if self.epilogue.scale == Scale::Exact {
            return sum.cast();
        }
        let sum = match (row.zero, col.sum) {
            (Some(zero), Some(of)) => S::less(sum, zero * of),
            _ => sum,
        };
        let scales = row.scale.into_iter().chain(col.scale);
        let x = scales.fold(S::float(sum), |x, scale| x * scale);
        self.epilogue.finish(x, col.bias)
    }
}
