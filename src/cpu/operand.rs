//! Operands of products, of which a block at a time is made f32: a weight of many megabytes passes
//! through a core's cache once, and is never whole in memory in another form.

use std::ops::Range;

use candle_core::{CpuStorage, Result};
use half::{bf16, f16};

use super::gemm::Mat;
use super::simd;
use super::widen::unexpected;
use crate::check::INT4_GROUP;
use crate::op::View;
use crate::stack::Stack;

/// A stack of matrices.
pub(super) trait Operand: Sync {
    /// Rows and columns of `matrix` in f32, side by side in `scratch`.
    fn block<'a>(
        &'a self,
        matrix: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a>;

    /// Adds `x` times the columns `cols` of `matrix` to `out`, if the operand has a loop for a single row
    /// that beats blocks: one that reads each element once, in the order in which they lie.
    fn add_row(&self, matrix: usize, x: &[f32], cols: Range<usize>, out: &mut [f32]) -> bool;

    /// Whether columns, rather than rows, lie in one piece: blocks should be long that way.
    fn by_columns(&self) -> bool;

    /// Blocks begin at multiples of so many rows and columns.
    fn steps(&self) -> [usize; 2] {
        [1, 1]
    }
}

/// An operand with its matrices transposed.
pub(super) struct Transposed<'a>(pub Box<dyn Operand + 'a>);

impl Operand for Transposed<'_> {
    fn block<'a>(
        &'a self,
        matrix: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a> {
        self.0.block(matrix, cols, rows, scratch).t()
    }

    fn add_row(&self, _: usize, _: &[f32], _: Range<usize>, _: &mut [f32]) -> bool {
        false
    }

    fn by_columns(&self) -> bool {
        !self.0.by_columns()
    }

    fn steps(&self) -> [usize; 2] {
        let [rows, cols] = self.0.steps();
        [cols, rows]
    }
}

/// A view of elements that become f32 one by one.
pub(super) struct Elements<'a, T> {
    pub data: &'a [T],
    pub stack: &'a Stack,
    pub loops: Loops<T>,
}

/// The loops over elements of one type.
#[derive(Clone, Copy)]
pub(super) struct Loops<T> {
    pub widen: fn(&[T], &mut [f32]),
    dot: fn(&[T], &[f32]) -> f32,
    add_rows: fn([&[T]; 4], [f32; 4], &mut [f32]),
}

/// f32 is copied: rows that are a power of two apart would share the few places of a cache's set.
const F32: Loops<f32> = Loops {
    widen: |src, dst| dst.copy_from_slice(src),
    dot: simd::dot_f32,
    add_rows: simd::add_rows_f32,
};
const F16: Loops<f16> =
    Loops { widen: simd::widen_f16, dot: simd::dot_f16, add_rows: simd::add_rows_f16 };
const BF16: Loops<bf16> =
    Loops { widen: simd::widen_bf16, dot: simd::dot_bf16, add_rows: simd::add_rows_bf16 };
/// Bytes read as int8.
pub(super) const INT8: Loops<u8> =
    Loops { widen: simd::widen_int8, dot: simd::dot_int8, add_rows: simd::add_rows_int8 };
/// Bytes read as e4m3.
pub(super) const E4M3: Loops<u8> =
    Loops { widen: simd::widen_e4m3, dot: simd::dot_e4m3, add_rows: simd::add_rows_e4m3 };

/// f16, bf16 or f32, or bytes read as int8.
pub(super) fn operand<'a>(
    storage: &'a CpuStorage,
    stack: &'a Stack,
) -> Result<Box<dyn Operand + 'a>> {
    Ok(match storage {
        CpuStorage::F32(data) => Box::new(Elements { data, stack, loops: F32 }),
        CpuStorage::F16(data) => Box::new(Elements { data, stack, loops: F16 }),
        CpuStorage::BF16(data) => Box::new(Elements { data, stack, loops: BF16 }),
        CpuStorage::U8(data) => Box::new(Elements { data, stack, loops: INT8 }),
        _ => return unexpected(storage),
    })
}

impl<T: Copy> Elements<'_, T> {
    /// [`Operand::add_row`] with the rows from `first` on.
    pub fn add_part(
        &self,
        matrix: usize,
        first: usize,
        x: &[f32],
        cols: Range<usize>,
        out: &mut [f32],
    ) -> bool {
        let Stack { row_stride, col_stride, .. } = *self.stack;
        let (depth, width) = (x.len(), cols.len());
        let data = &self.data[begin(self.stack, matrix, &(first..first + depth), &cols)..];
        if by_columns(self.stack) {
            for (col, out) in out.iter_mut().enumerate() {
                *out += (self.loops.dot)(&data[col * col_stride..][..depth], x);
            }
            return true;
        }
        if col_stride != 1 {
            return false;
        }
        let row = |k: usize| &data[k * row_stride..][..width];
        let (fours, rest) = x.as_chunks::<4>();
        for (i, &four) in fours.iter().enumerate() {
            let rows = std::array::from_fn(|r| row(4 * i + r));
            (self.loops.add_rows)(rows, four, out);
        }
        for (k, &x) in (4 * fours.len()..).zip(rest) {
            let mut line = vec![0.0; width];
            (self.loops.widen)(row(k), &mut line);
            out.iter_mut().zip(line).for_each(|(out, w)| *out += x * w);
        }
        true
    }
}

impl<T: Copy + Sync> Operand for Elements<'_, T> {
    fn block<'a>(
        &'a self,
        matrix: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a> {
        widened(self.data, self.stack, matrix, rows, cols, self.loops.widen, scratch)
    }

    fn add_row(&self, matrix: usize, x: &[f32], cols: Range<usize>, out: &mut [f32]) -> bool {
        self.add_part(matrix, 0, x, cols, out)
    }

    fn by_columns(&self) -> bool {
        by_columns(self.stack)
    }
}

/// An int4 weight: words `[K/8, N]` and steps `[K/128, N]`.
pub(super) struct Int4<'a> {
    words: (&'a [u32], Stack),
    steps: (&'a [f16], Stack),
}

impl<'a> Int4<'a> {
    pub fn new(packed: View<'a, CpuStorage>, scales: View<'a, CpuStorage>) -> Result<Self> {
        let (words, steps) = (Stack::new(packed.1), Stack::new(scales.1));
        Ok(Self { words: (packed.0.as_slice()?, words), steps: (scales.0.as_slice()?, steps) })
    }
}

/// Values of one word.
const NIBBLES: usize = 8;

impl Operand for Int4<'_> {
    fn block<'a>(
        &'a self,
        _: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a> {
        let ((words, stack), (steps, step_stack)) = (&self.words, &self.steps);
        let groups = rows.start / INT4_GROUP..rows.end.div_ceil(INT4_GROUP);
        let mut held = Vec::new();
        let by_group =
            widened(steps, step_stack, 0, groups, cols.clone(), simd::widen_f16, &mut held);
        let step = |group: usize, col: usize| {
            by_group.data[group * by_group.row_stride + col * by_group.col_stride]
        };
        let (height, width) = (rows.len(), cols.len());
        let lines = rows.start / NIBBLES..rows.end / NIBBLES;
        let at = begin(stack, 0, &lines, &cols);
        let out = room(scratch, height * width);
        if self.by_columns() {
            let mut line_steps = vec![0.0; height.div_ceil(INT4_GROUP)];
            for (col, out) in out.chunks_exact_mut(height).enumerate() {
                let words = &words[at + col * stack.col_stride..][..lines.len()];
                line_steps.iter_mut().enumerate().for_each(|(i, x)| *x = step(i, col));
                simd::widen_int4(words, &line_steps, out);
            }
            return Mat { data: out, row_stride: 1, col_stride: height };
        }
        let (mut line, mut line_steps) = (vec![0; width], vec![0.0; width]);
        for (i, out) in out.chunks_exact_mut(NIBBLES * width).enumerate() {
            let at = at + i * stack.row_stride;
            let line = match stack.col_stride {
                1 => &words[at..][..width],
                stride => {
                    line.iter_mut().enumerate().for_each(|(j, x)| *x = words[at + j * stride]);
                    &line
                }
            };
            if (i * NIBBLES).is_multiple_of(INT4_GROUP) {
                let group = i * NIBBLES / INT4_GROUP;
                line_steps.iter_mut().enumerate().for_each(|(j, x)| *x = step(group, j));
            }
            for (nibble, out) in (0..).zip(out.chunks_exact_mut(width)) {
                simd::widen_nibbles(line, nibble, &line_steps, out);
            }
        }
        Mat::rows(out, width)
    }

    fn add_row(&self, _: usize, x: &[f32], cols: Range<usize>, out: &mut [f32]) -> bool {
        const COLUMNS: usize = 16;
        let ((words, stack), (steps, step_stack)) = (&self.words, &self.steps);
        if !self.by_columns() {
            return false;
        }
        let (lines, groups) = (0..x.len() / NIBBLES, 0..x.len() / INT4_GROUP);
        let at = begin(stack, 0, &lines, &cols);
        let (mut held, mut column) = (Vec::new(), vec![0.0; groups.len()]);
        // Steps lie side by side: those of a few columns are turned in the first cache.
        for (i, out) in out.chunks_mut(COLUMNS).enumerate() {
            let first = cols.start + i * COLUMNS;
            let cols = first..first + out.len();
            let by_group =
                widened(steps, step_stack, 0, groups.clone(), cols, simd::widen_f16, &mut held);
            for (col, out) in out.iter_mut().enumerate() {
                let begin = at + (i * COLUMNS + col) * stack.col_stride;
                for (group, step) in column.iter_mut().enumerate() {
                    *step = by_group.data[group * by_group.row_stride + col * by_group.col_stride];
                }
                *out += simd::dot_int4(&words[begin..][..lines.len()], &column, x);
            }
        }
        true
    }

    fn by_columns(&self) -> bool {
        self.words.1.row_stride == 1
    }

    fn steps(&self) -> [usize; 2] {
        [INT4_GROUP, 1]
    }
}

/// A block of elements in f32, in the order in which they lie.
pub(super) fn widened<'a, T: Copy>(
    data: &[T],
    stack: &Stack,
    matrix: usize,
    rows: Range<usize>,
    cols: Range<usize>,
    widen: fn(&[T], &mut [f32]),
    scratch: &'a mut Vec<f32>,
) -> Mat<'a> {
    let at = begin(stack, matrix, &rows, &cols);
    let (height, width) = (rows.len(), cols.len());
    let out = room(scratch, height * width);
    if by_columns(stack) {
        runs(&data[at..], [width, height], stack.col_stride, widen, out);
        return Mat { data: out, row_stride: 1, col_stride: height };
    }
    if stack.col_stride == 1 || width == 1 {
        runs(&data[at..], [height, width], stack.row_stride, widen, out);
    } else {
        let mut row = Vec::with_capacity(width);
        for (r, out) in out.chunks_exact_mut(width).enumerate() {
            let at = at + r * stack.row_stride;
            row.clear();
            row.extend((0..width).map(|c| data[at + c * stack.col_stride]));
            widen(&row, out);
        }
    }
    Mat::rows(out, width)
}

/// `count` runs of `len` elements each, `stride` apart.
fn runs<T>(
    data: &[T],
    [count, len]: [usize; 2],
    stride: usize,
    widen: fn(&[T], &mut [f32]),
    out: &mut [f32],
) {
    if stride == len || count == 1 {
        return widen(&data[..count * len], out);
    }
    for (i, out) in out.chunks_exact_mut(len).enumerate() {
        widen(&data[i * stride..][..len], out);
    }
}

/// Whether runs along columns are longer than along rows.
pub(super) fn by_columns(stack: &Stack) -> bool {
    stack.row_stride == 1 && (stack.col_stride != 1 || stack.rows > stack.cols)
}

/// Where a block begins.
pub(super) fn begin(
    stack: &Stack,
    matrix: usize,
    rows: &Range<usize>,
    cols: &Range<usize>,
) -> usize {
    // A stack of one serves all.
    let matrix = if stack.count() == 1 { 0 } else { matrix };
    stack.matrix_offset(matrix) + rows.start * stack.row_stride + cols.start * stack.col_stride
}

pub(super) fn room(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}
