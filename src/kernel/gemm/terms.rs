//! What is done to sums before they are stored, and what is read for it: scales, zero points, a bias.

use super::{Epilogue, Name};
use crate::kernel::epilogue::Scale;
use crate::ptx::{Address, Kernel, Number, Reg};

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
    Lines([Vectors<'k>; 2]),
}

/// Lines of a result: its rows, of all products, or its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Lines {
    Rows,
    Columns,
}

/// The numbers of lines, of 32 bits: their scales, and the rows' zero points or the sums of the right operand's
/// columns.
#[derive(Clone, Copy)]
pub(super) struct Vectors<'k> {
    scales: Vector<'k>,
    zeros: Option<Vector<'k>>,
}

#[derive(Clone, Copy)]
struct Vector<'k> {
    address: Reg<'k, u64>,
    /// 1, or 0 if there is one for all lines.
    step: Option<Reg<'k, u32>>,
}

/// What a line adds to the terms of its sums.
#[derive(Clone, Copy, Default)]
pub(super) struct Line<'k> {
    scale: Option<Reg<'k, f32>>,
    zero: Option<Reg<'k, i32>>,
    bias: Option<Reg<'k, f32>>,
}

impl<'k> Vector<'k> {
    /// Where the number of a line is.
    fn at(&self, line: Reg<'k, u32>) -> Reg<'k, u64> {
        let line = self.step.map_or(line, |step| line * step);
        self.address.element(line, WORD)
    }
}

impl<'k> Vectors<'k> {
    /// The vectors.
    fn all(&self) -> impl Iterator<Item = Vector<'k>> {
        [self.scales].into_iter().chain(self.zeros)
    }

    /// Adds those of lines side by side, where they are `valid`.
    fn add<const N: usize>(
        &self,
        lines: &mut [Line<'k>; N],
        first: Reg<'k, u32>,
        valid: Reg<'k, bool>,
    ) {
        let k = first.kernel();
        let load = |vector: Vector<'k>| {
            let from = vector.at(first);
            k.when(valid, || k.ld_global_nc::<u32, N>(from))
        };
        set(lines, load(self.scales), self.zeros.map(load));
    }

    /// Begins to copy the numbers of `count` lines to shared memory, of which a thread among `threads` takes
    /// some: the scales from `to` on, the others after them. `line` gives a line's index in the vectors, and
    /// whether there is one.
    pub fn copy(
        &self,
        count: u32,
        (thread, threads): (Reg<'k, u32>, u32),
        to: Reg<'k, u32>,
        line: impl Fn(Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, bool>),
    ) {
        let k = thread.kernel();
        for start in (0..count).step_by(threads as usize) {
            let at = thread + start;
            let (index, valid) = line(at);
            let valid = if start + threads > count { valid & at.lt(count) } else { valid };
            for (i, vector) in (0..).zip(self.all()) {
                let (from, to) = (vector.at(index), to + at * WORD);
                let to = to.at((i * count * WORD).into());
                k.when(valid, || k.cp_async_4(to, from, WORD));
            }
        }
    }

    /// Adds what [`copy`](Self::copy) brought of `N` lines, the first of which is at `from`, of `count`.
    pub fn add_copied<const N: usize>(
        &self,
        lines: &mut [Line<'k>; N],
        from: Address<'k, u32>,
        count: u32,
    ) {
        let (k, after) = (self.scales.address.kernel(), from.at((count * WORD).into()));
        set(lines, k.ld_shared(from), self.zeros.map(|_| k.ld_shared(after)));
    }
}

/// Bytes of a number.
pub(super) const WORD: u32 = 4;

fn set<'k, const N: usize>(
    lines: &mut [Line<'k>; N],
    scales: [Reg<'k, u32>; N],
    zeros: Option<[Reg<'k, u32>; N]>,
) {
    for (i, line) in lines.iter_mut().enumerate() {
        line.scale = Some(scales[i].cast());
        line.zero = zeros.map(|zeros| zeros[i].cast());
    }
}

impl<'k> Terms<'k> {
    /// Declares their parameters.
    pub fn params(k: &'k Kernel, epilogue: Epilogue) -> Self {
        let per_row = |at, step| Vector { address: k.pointer(at), step: Some(k.param(step)) };
        let per_column = |at| Vector { address: k.pointer(at), step: None };
        let bias = epilogue.bias.map(|_| k.pointer(Name::Bias));
        let scales = match epilogue.scale {
            Scale::None | Scale::Exact => Scales::None,
            Scale::One => Scales::One(k.param(Name::Scale)),
            Scale::Lines | Scale::ZeroPoint => {
                let zero = epilogue.scale == Scale::ZeroPoint;
                let rows = per_row(Name::RowScales, Name::RowScaleStep);
                let cols = per_column(Name::ColScales);
                let zeros = zero.then(|| per_row(Name::Zeros, Name::ZeroStep));
                let sums = zero.then(|| per_column(Name::ColSums));
                Scales::Lines([
                    Vectors { scales: rows, zeros },
                    Vectors { scales: cols, zeros: sums },
                ])
            }
        };
        Self { epilogue, bias, scales }
    }

    /// The vectors of rows or columns, if there are any.
    pub fn vectors(&self, lines: Lines) -> Option<Vectors<'k>> {
        match self.scales {
            Scales::Lines([rows, cols]) => Some(if lines == Lines::Rows { rows } else { cols }),
            Scales::None | Scales::One(_) => None,
        }
    }

    /// A row, but for what vectors have of it.
    pub fn plain_row(&self) -> Line<'k> {
        match self.scales {
            Scales::One(scale) => Line { scale: Some(scale), ..Line::default() },
            Scales::None | Scales::Lines(_) => Line::default(),
        }
    }

    /// `N` columns side by side, but for what vectors have of them; undefined and not loaded where they are not
    /// `valid`.
    pub fn plain_columns<const N: usize>(
        &self,
        col: Reg<'k, u32>,
        valid: impl FnOnce() -> Reg<'k, bool>,
    ) -> [Line<'k>; N] {
        let bias = self.bias.map(|address| {
            let from = address.element(col, self.epilogue.bias_size());
            self.epilogue.load_bias::<N>(col.kernel(), from, valid())
        });
        std::array::from_fn(|i| Line { bias: bias.map(|all| all[i]), ..Line::default() })
    }

    /// A row. `index` gives its number, counted over all products.
    pub fn row(&self, index: impl FnOnce() -> Reg<'k, u32>, valid: Reg<'k, bool>) -> Line<'k> {
        let mut row = [self.plain_row()];
        if let Some(vectors) = self.vectors(Lines::Rows) {
            vectors.add(&mut row, index(), valid);
        }
        row[0]
    }

    /// `N` columns side by side.
    pub fn columns<const N: usize>(
        &self,
        col: Reg<'k, u32>,
        valid: Reg<'k, bool>,
    ) -> [Line<'k>; N] {
        let mut columns = self.plain_columns(col, || valid);
        if let Some(vectors) = self.vectors(Lines::Columns) {
            vectors.add(&mut columns, col, valid);
        }
        columns
    }

    /// `act(scale · (sum - zero · column's sum) + bias)`; an exact sum as the float of the same bits.
    pub fn finish<S: Sum>(&self, sum: Reg<'k, S>, row: Line<'k>, col: Line<'k>) -> Reg<'k, f32> {
        if self.epilogue.scale == Scale::Exact {
            return sum.cast();
        }
        let sum = match (row.zero, col.zero) {
            (Some(zero), Some(of)) => S::less(sum, zero * of),
            _ => sum,
        };
        let scales = row.scale.into_iter().chain(col.scale);
        let x = scales.fold(S::float(sum), |x, scale| x * scale);
        self.epilogue.finish(x, col.bias)
    }
}
