//! Operands of products, of which a block at a time is made f32: a weight of many megabytes passes
//! through a core's cache once, and is never whole in memory in another form.

use std::ops::Range;

use candle_core::{CpuStorage, Result};
use half::f16;

use super::gemm::Mat;
use super::simd;
use super::widen::unexpected;
use crate::check::INT4_GROUP;
use crate::op::View;
use crate::stack::Stack;

/// A stack of matrices.
pub(super) trait Operand: Sync {
    /// Rows and columns of `matrix` in f32, in `scratch` unless they are so in memory.
    fn block<'a>(
        &'a self,
        matrix: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a>;

    /// Whether columns, rather than rows, lie in one piece: blocks should be long that way.
    fn by_columns(&self) -> bool;

    /// Blocks begin at multiples of so many rows.
    fn row_step(&self) -> usize {
        1
    }
}

/// A view of elements that become f32 one by one.
struct Elements<'a, T> {
    data: &'a [T],
    stack: &'a Stack,
    /// A run of them.
    widen: fn(&[T], &mut [f32]),
}

/// f16, bf16 or f32, or bytes read as int8.
pub(super) fn operand<'a>(
    storage: &'a CpuStorage,
    stack: &'a Stack,
) -> Result<Box<dyn Operand + 'a>> {
    Ok(match storage {
        CpuStorage::F32(data) => Box::new(Floats { data, stack }),
        CpuStorage::F16(data) => Box::new(Elements { data, stack, widen: simd::widen_f16 }),
        CpuStorage::BF16(data) => Box::new(Elements { data, stack, widen: simd::widen_bf16 }),
        CpuStorage::U8(data) => Box::new(Elements { data, stack, widen: simd::widen_int8 }),
        _ => return unexpected(storage),
    })
}

impl<T: Copy + Sync> Operand for Elements<'_, T> {
    fn block<'a>(
        &'a self,
        matrix: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a> {
        widened(self.data, self.stack, matrix, rows, cols, self.widen, scratch)
    }

    fn by_columns(&self) -> bool {
        by_columns(self.stack)
    }
}

/// f32, which is taken as it is.
struct Floats<'a> {
    data: &'a [f32],
    stack: &'a Stack,
}

impl Operand for Floats<'_> {
    fn block<'a>(
        &'a self,
        matrix: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        _: &'a mut Vec<f32>,
    ) -> Mat<'a> {
        let Stack { row_stride, col_stride, .. } = *self.stack;
        Mat { data: &self.data[begin(self.stack, matrix, &rows, &cols)..], row_stride, col_stride }
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
        let step = |row: usize, col: usize| {
            by_group.data[row / INT4_GROUP * by_group.row_stride + col * by_group.col_stride]
        };
        let (height, width) = (rows.len(), cols.len());
        let lines = rows.start / NIBBLES..rows.end / NIBBLES;
        let at = begin(stack, 0, &lines, &cols);
        let out = room(scratch, height * width);
        if self.by_columns() {
            for (col, out) in out.chunks_exact_mut(height).enumerate() {
                let words = &words[at + col * stack.col_stride..][..lines.len()];
                let groups = words.chunks(INT4_GROUP / NIBBLES).zip(out.chunks_mut(INT4_GROUP));
                for (i, (words, out)) in groups.enumerate() {
                    simd::widen_int4(words, step(i * INT4_GROUP, col), out);
                }
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
                line_steps.iter_mut().enumerate().for_each(|(j, x)| *x = step(i * NIBBLES, j));
            }
            for (nibble, out) in (0..).zip(out.chunks_exact_mut(width)) {
                simd::widen_nibbles(line, nibble, &line_steps, out);
            }
        }
        Mat::rows(out, width)
    }

    fn by_columns(&self) -> bool {
        self.words.1.row_stride == 1
    }

    fn row_step(&self) -> usize {
        INT4_GROUP
    }
}

/// A block of elements in f32, in the order in which they lie.
fn widened<'a, T: Copy>(
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
fn by_columns(stack: &Stack) -> bool {
    stack.row_stride == 1 && (stack.col_stride != 1 || stack.rows > stack.cols)
}

/// Where a block begins.
fn begin(stack: &Stack, matrix: usize, rows: &Range<usize>, cols: &Range<usize>) -> usize {
    // A stack of one serves all.
    let matrix = if stack.count() == 1 { 0 } else { matrix };
    stack.matrix_offset(matrix) + rows.start * stack.row_stride + cols.start * stack.col_stride
}

fn room(scratch: &mut Vec<f32>, len: usize) -> &mut [f32] {
    if scratch.len() < len {
        scratch.resize(len, 0.0);
    }
    &mut scratch[..len]
}
