//! What is done to sums before they are stored, and what is read for it: scales, zero points, a bias.

use super::{Epilogue, Name};
use crate::kernel::Element;
use crate::kernel::epilogue::Scale;
use crate::ptx::{Address, Kernel, Number, Reg, Scalar};

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
pub(in crate::kernel) fn add<'k, S: Sum>(
    parts: impl IntoIterator<Item = Vec<Reg<'k, S>>>,
) -> Option<Vec<Reg<'k, S>>> {
    let add =
        |a: Vec<Reg<'k, S>>, b| a.into_iter().zip(b).map(|(a, b): (_, Reg<'k, S>)| a + b).collect();
    parts.into_iter().reduce(add)
}

/// Where a kernel finds what it does with a sum.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Terms<'k> {
    pub epilogue: Epilogue,
    /// A scale for all sums.
    one: Option<Reg<'k, f32>>,
    zero_point: Option<Reg<'k, i32>>,
    rows: Vectors<'k>,
    cols: Vectors<'k>,
}

/// Lines of a result: its rows, of all products, or its columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernel) enum Lines {
    Rows,
    Columns,
}

/// What lines have each, as vectors in memory.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Vectors<'k>([Option<Vector<'k>>; 3]);

#[derive(Clone, Copy)]
struct Vector<'k> {
    what: What,
    address: Reg<'k, u64>,
    /// 1, or 0 if there is one element for all lines.
    step: Option<Reg<'k, u32>>,
}

#[derive(Clone, Copy)]
enum What {
    Scale,
    /// The sum of the right operand's column.
    Sum,
    Bias(Element),
}

/// What a line adds to the terms of its sums.
#[derive(Clone, Copy, Default)]
pub(in crate::kernel) struct Line<'k> {
    scale: Option<Reg<'k, f32>>,
    sum: Option<Reg<'k, i32>>,
    bias: Option<Reg<'k, f32>>,
}

/// Where elements side by side are loaded from.
#[derive(Clone, Copy)]
enum From<'k> {
    /// If it is valid.
    Global(Reg<'k, u64>, Reg<'k, bool>),
    Shared(Address<'k, u32>),
}

impl<'k> From<'k> {
    fn load<T: Scalar, const N: usize>(self, k: &'k Kernel) -> [Reg<'k, T>; N] {
        match self {
            Self::Global(from, valid) => k.when(valid, || k.ld_global_nc::<T, N>(from)),
            Self::Shared(from) => k.ld_shared::<T, N>(from),
        }
    }
}

impl What {
    fn size(self) -> u32 {
        match self {
            Self::Scale | Self::Sum => WORD,
            Self::Bias(element) => element.size(),
        }
    }

    /// Adds those of `N` lines to what is known of them.
    fn add<'k, const N: usize>(self, k: &'k Kernel, lines: &mut [Line<'k>; N], from: From<'k>) {
        match self {
            Self::Scale => {
                let scales = from.load::<f32, N>(k);
                let times = |scale: Option<Reg<'k, f32>>, x| Some(scale.map_or(x, |one| one * x));
                lines.iter_mut().zip(scales).for_each(|(l, x)| l.scale = times(l.scale, x));
            }
            Self::Sum => {
                let sums = from.load::<i32, N>(k);
                lines.iter_mut().zip(sums).for_each(|(line, x)| line.sum = Some(x));
            }
            Self::Bias(element) => {
                let bias = match element {
                    Element::F32 => from.load::<f32, N>(k),
                    Element::Half(half) => from.load::<u16, N>(k).map(|x| k.widen(half, x)),
                };
                lines.iter_mut().zip(bias).for_each(|(line, x)| line.bias = Some(x));
            }
        }
    }
}

impl<'k> Vectors<'k> {
    fn all(&self) -> impl Iterator<Item = Vector<'k>> {
        self.0.into_iter().flatten()
    }

    /// Adds those of `N` lines side by side. Undefined and not loaded where they are not `valid`.
    fn add<const N: usize>(
        &self,
        lines: &mut [Line<'k>; N],
        first: Reg<'k, u32>,
        valid: impl Fn() -> Reg<'k, bool>,
    ) {
        for Vector { what, address, step } in self.all() {
            let line = step.map_or(first, |step| first * step);
            let from = From::Global(address.element(line, what.size()), valid());
            what.add(first.kernel(), lines, from);
        }
    }

    /// Begins to copy those of `count` lines to shared memory, one vector after the other from `to` on; a thread
    /// of `threads` takes some. `line` gives a line's place in the vectors, and whether it has one. Where
    /// elements have 16 bits there is an even number of lines.
    pub fn copy(
        &self,
        count: u32,
        (thread, threads): (Reg<'k, u32>, u32),
        to: Reg<'k, u32>,
        line: impl Fn(Reg<'k, u32>) -> (Reg<'k, u32>, Reg<'k, bool>),
    ) {
        let (k, mut before) = (thread.kernel(), 0);
        for Vector { what, address, step } in self.all() {
            let lines_of_word = WORD / what.size();
            let words = count / lines_of_word;
            for start in (0..words).step_by(threads as usize) {
                let word = thread + start;
                let (place, valid) = line(word * lines_of_word);
                let place = step.map_or(place, |step| place * step);
                let inside = start + threads <= words;
                let valid = if inside { valid } else { valid & word.lt(words) };
                let (from, to) = (address.element(place, what.size()), to + word * WORD);
                k.when(valid, || k.cp_async_4(to.at(before.into()), from, WORD));
            }
            before += words * WORD;
        }
    }

    /// Adds what [`copy`](Self::copy) brought of `N` lines: line number `first` of `count`, of those from `from`
    /// on, and those after it.
    pub fn add_copied<const N: usize>(
        &self,
        lines: &mut [Line<'k>; N],
        from: Reg<'k, u32>,
        (first, further): (Reg<'k, u32>, u32),
        count: u32,
    ) {
        let mut before = 0;
        for Vector { what, .. } in self.all() {
            let size = what.size();
            let at = (from + first * size).at((before + further * size).into());
            what.add(from.kernel(), lines, From::Shared(at));
            before += count * size;
        }
    }
}

/// Bytes of a scale, of a sum, of the least that is copied.
const WORD: u32 = 4;

impl Epilogue {
    /// Bytes of the vectors of a row and of a column, if they have any but a bias.
    pub(super) fn vector_bytes(&self) -> Option<[u32; 2]> {
        let of_column = match self.scale {
            Scale::None | Scale::Exact | Scale::Blocks => return None,
            Scale::Lines => WORD,
            Scale::ZeroPoint => 2 * WORD,
        };
        Some([WORD, of_column + self.bias.map_or(0, Element::size)])
    }
}

impl<'k> Terms<'k> {
    /// Declares their parameters.
    pub fn params(k: &'k Kernel, epilogue: Epilogue) -> Self {
        let of_row = |what, address, step| {
            Some(Vector { what, address: k.pointer(address), step: Some(k.param(step)) })
        };
        let of_column =
            |what, address| Some(Vector { what, address: k.pointer(address), step: None });
        let bias = epilogue.bias.and_then(|bias| of_column(What::Bias(bias), Name::Bias));
        let lines = matches!(epilogue.scale, Scale::Lines | Scale::ZeroPoint);
        let zero = epilogue.scale == Scale::ZeroPoint;
        let one = lines.then(|| k.param(Name::Scale));
        let zero_point = zero.then(|| k.param(Name::ZeroPoint));
        let mut rows = [None; 3];
        let mut cols = [bias, None, None];
        if lines {
            rows[0] = of_row(What::Scale, Name::RowScales, Name::RowScaleStep);
            cols[1] = of_column(What::Scale, Name::ColScales);
        }
        if zero {
            cols[2] = of_column(What::Sum, Name::ColSums);
        }
        Self { epilogue, one, zero_point, rows: Vectors(rows), cols: Vectors(cols) }
    }

    /// The vectors of rows or columns.
    pub fn vectors(&self, lines: Lines) -> Vectors<'k> {
        match lines {
            Lines::Rows => self.rows,
            Lines::Columns => self.cols,
        }
    }

    /// Whether rows have any.
    pub fn has_rows(&self) -> bool {
        self.rows.all().next().is_some()
    }

    /// A line, but for what vectors have of it. The scale of all is the rows'.
    pub fn line(&self, lines: Lines) -> Line<'k> {
        let scale = if lines == Lines::Rows { self.one } else { None };
        Line { scale, ..Line::default() }
    }

    /// `N` lines side by side, columns or rows of all products. Undefined and not loaded where they are not
    /// `valid`.
    pub fn lines<const N: usize>(
        &self,
        lines: Lines,
        first: Reg<'k, u32>,
        valid: impl Fn() -> Reg<'k, bool>,
    ) -> [Line<'k>; N] {
        let mut all = [self.line(lines); N];
        self.vectors(lines).add(&mut all, first, valid);
        all
    }

    /// `act(scale · (sum - zero point · column's sum) + bias)`; an exact sum as the float of the same bits.
    pub fn finish<S: Sum>(&self, sum: Reg<'k, S>, row: Line<'k>, col: Line<'k>) -> Reg<'k, f32> {
        if self.epilogue.scale == Scale::Exact {
            return sum.cast();
        }
        let sum = match (self.zero_point, col.sum) {
            (Some(zero), Some(of)) => S::less(sum, of * zero),
            _ => sum,
        };
        let scales = [row.scale, col.scale].into_iter().flatten();
        let x = scales.fold(S::float(sum), |x, scale| x * scale);
        self.epilogue.finish(x, col.bias)
    }
}
