//! Products with quantised weights, and their activations.

use std::ops::Range;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Layout, Result};
use rayon::prelude::*;

use super::gemm::Mat;
use super::operand::{E4M3, Elements, INT8, Int4, Operand, Transposed, operand};
use super::operand::{begin, by_columns, room, widened};
use super::product::{exact_products, products};
use super::simd;
use super::widen::{narrow_to, unexpected};
use crate::op::View;
use crate::quant::planes::{Facts, Weight};
use crate::quant::quantize::{E4M3_MAX, round_up};
use crate::quant::scheme::QuantScheme;
use crate::stack::Stack;

/// A weight on the CPU.
pub(crate) type CpuWeight<'a> = Weight<View<'a, CpuStorage>>;

/// `x·W`, or `x·Wᵀ`, of f16, bf16 or f32 activations, block by block: the weight is never whole in floats.
pub(crate) fn matmul_quant(
    (x, stack): (&CpuStorage, &Stack),
    weight: &CpuWeight,
    transposed: bool,
) -> Result<Vec<f32>> {
    let tensors = Tensors::of(weight);
    let (w, [k, n]) = (tensors.operand(weight)?, weight.facts.dims);
    let x = operand(x, stack)?;
    Ok(match transposed {
        true => products(&*x, stack, &Transposed(w), k),
        false => products(&*x, stack, &*w, n),
    })
}

/// Activations of eight bits, and the scale of each row or each block of a row.
pub(crate) struct Activations<'a> {
    pub codes: (&'a CpuStorage, &'a Stack),
    /// Of rows, or of groups in rows, side by side; or one for all.
    pub scales: Option<View<'a, CpuStorage>>,
}

/// Rows of the result are times `scale` and a row's own scale, the activations `zero_point` less than their codes. Sums
/// are exact.
pub(crate) fn matmul_int8(
    x: &Activations,
    (scale, zero_point): (f32, i32),
    weight: &CpuWeight,
) -> Result<Vec<f32>> {
    let rhs = Stack::new(weight.codes.1);
    let rows = x.scales.map(floats).transpose()?;
    let cols = if weight.facts.unit { vec![1.0] } else { floats(weight.scales)? };
    // Σ (x − z)·w = Σ x·w − z·Σ w.
    let sums = if zero_point == 0 { Vec::new() } else { column_sums(weight.codes.0, &rhs)? };
    let finish = |[row, first]: [usize; 2], exact: &[i32], out: &mut [f32]| {
        let at = |row: usize, of: &[f32]| of[if of.len() == 1 { 0 } else { row }];
        let factor = rows.as_ref().map_or(scale, |rows| scale * at(row, rows));
        for (i, (out, &sum)) in out.iter_mut().zip(exact).enumerate() {
            let sum = match sums.get(first + i) {
                None => sum as f32,
                Some(column) => (i64::from(sum) - i64::from(zero_point) * column) as f32,
            };
            *out = factor * sum * at(first + i, &cols);
        }
    };
    exact_products(x.codes, (weight.codes.0, &rhs), &finish)
}

/// Sums of each column of bytes read as int8.
fn column_sums(bytes: &CpuStorage, stack: &Stack) -> Result<Vec<i64>> {
    let CpuStorage::U8(bytes) = bytes else { return unexpected(bytes) };
    let sum = |col: usize| {
        let at =
            |row: usize| stack.matrix_offset(0) + row * stack.row_stride + col * stack.col_stride;
        (0..stack.rows).map(|row| i64::from(bytes[at(row)] as i8)).sum()
    };
    Ok((0..stack.cols).into_par_iter().map(sum).collect())
}

/// The product of activations and a weight in e4m3, each by its own scales. Those of the activations are of groups of
/// `width` in a row, or of all if there is one.
pub(crate) fn matmul_fp8(x: &Activations, width: usize, weight: &CpuWeight) -> Result<Vec<f32>> {
    let (codes, stack) = x.codes;
    let scales = x.scales.map(|(storage, layout)| (storage, Stack::new(layout)));
    let lhs = Bytes {
        elements: Elements { data: bytes(codes)?, stack, loops: E4M3 },
        scales: scales.as_ref().map(|(storage, stack)| operand(storage, stack)).transpose()?,
        group: match &scales {
            Some((_, scales)) if scales.rows == 1 => [stack.rows.max(1), width],
            _ => [1, width],
        },
    };
    let tensors = Tensors::of(weight);
    let w = tensors.operand(weight)?;
    Ok(products(&lhs, stack, &*w, weight.facts.dims[1]))
}

/// Rounds each row of activations to eight bits: to int8, or to e4m3 in groups of `width` elements. Gives codes and
/// the scale of each group.
pub(crate) fn quantize_rows(
    (x, stack): (&CpuStorage, &Stack),
    dtype: DType,
    width: usize,
) -> Result<(CpuStorage, Vec<f32>)> {
    let x = super::widen::packed(x, stack)?;
    let k = stack.cols;
    let most = if dtype == DType::U8 { 127.0 } else { E4M3_MAX };
    let groups = k.div_ceil(width.max(1));
    let mut scales = vec![1f32; x.len().checked_div(k).unwrap_or(0) * groups];
    let mut scaled = vec![0f32; x.len()];
    if !x.is_empty() {
        let rows = scaled.par_chunks_mut(k).zip(x.par_chunks(k)).zip(scales.par_chunks_mut(groups));
        rows.for_each(|((scaled, x), scales)| {
            let parts = scaled.chunks_mut(width).zip(x.chunks(width)).zip(scales);
            for ((scaled, x), scale) in parts {
                let peak = peak(x);
                if peak != 0.0 {
                    // One that is infinite or NaN makes all results of its row NaN.
                    let finite = peak.is_finite().then(|| round_up(DType::F32, peak / most));
                    *scale = finite.unwrap_or(f32::NAN);
                }
                scaled.iter_mut().zip(x).for_each(|(out, x)| *out = x / *scale);
            }
        });
    }
    let codes = match dtype {
        DType::U8 => {
            let code = |x: &f32| x.round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
            CpuStorage::U8(scaled.par_iter().map(code).collect())
        }
        _ => {
            let layout = Layout::contiguous(scaled.len());
            CpuStorage::F32(scaled).to_dtype(&layout, dtype)?
        }
    };
    Ok((codes, scales))
}

/// The largest magnitude, or NaN if there is one: it is then every element's.
fn peak(x: &[f32]) -> f32 {
    x.iter().fold(0.0, |peak, x| if x.abs() > peak || x.is_nan() { x.abs() } else { peak })
}

/// The weight in a float dtype, row-major.
pub(crate) fn dequantize(weight: &CpuWeight, dtype: DType) -> Result<CpuStorage> {
    let tensors = Tensors::of(weight);
    let (w, [k, n]) = (tensors.operand(weight)?, weight.facts.dims);
    let mut out = vec![0f32; k * n];
    if !out.is_empty() {
        let height = w.steps()[0].max(8);
        out.par_chunks_mut(height * n).enumerate().for_each_init(Vec::new, |scratch, (i, out)| {
            let rows = i * height..i * height + out.len() / n;
            let block = w.block(0, rows, 0..n, scratch);
            for (row, out) in out.chunks_mut(n).enumerate() {
                let row = &block.data[row * block.row_stride..];
                out.iter_mut().enumerate().for_each(|(j, x)| *x = row[j * block.col_stride]);
            }
        });
    }
    narrow_to(dtype, out)
}

/// All elements of a view, in f32.
fn floats((storage, layout): View<CpuStorage>) -> Result<Vec<f32>> {
    Ok(super::widen::packed(storage, &Stack::new(layout))?.into_owned())
}

/// Where the matrices of a weight are.
struct Tensors {
    codes: Stack,
    scales: Stack,
    zeros: Option<Stack>,
}

impl Tensors {
    fn of(weight: &CpuWeight) -> Self {
        let stack = |(_, layout): View<CpuStorage>| Stack::new(layout);
        let Weight { codes, scales, zeros, .. } = *weight;
        Self { codes: stack(codes), scales: stack(scales), zeros: zeros.map(stack) }
    }

    /// The weight in f32.
    fn operand<'a>(&'a self, weight: &CpuWeight<'a>) -> Result<Box<dyn Operand + 'a>> {
        let Facts { scheme, dims, signed, unit, .. } = weight.facts;
        if signed {
            return Ok(Box::new(Int4::new(weight.codes, weight.scales)?));
        }
        let scales = || operand(weight.scales.0, &self.scales);
        let group = scheme.group(dims);
        let loops = match scheme {
            QuantScheme::Int8 { .. } => INT8,
            QuantScheme::Fp8 { .. } => E4M3,
            QuantScheme::Int4 { .. } | QuantScheme::Nf4 { .. } => {
                let zeros = match (weight.zeros, &self.zeros) {
                    // Up to 16, they are the same as int8.
                    (Some((zeros, _)), Some(stack)) => Zeros::Each(operand(zeros, stack)?),
                    _ => Zeros::Table(scheme.table()),
                };
                let words = weight.codes.0.as_slice()?;
                return Ok(Box::new(Nibbles {
                    words,
                    stack: &self.codes,
                    scales: scales()?,
                    zeros,
                    height: group[0],
                }));
            }
        };
        let elements = Elements { data: bytes(weight.codes.0)?, stack: &self.codes, loops };
        let scales = if unit { None } else { Some(scales()?) };
        Ok(Box::new(Bytes { elements, scales, group }))
    }
}

/// Codes of eight bits.
fn bytes(codes: &CpuStorage) -> Result<&[u8]> {
    match codes {
        CpuStorage::U8(codes) => Ok(codes),
        CpuStorage::F8E4M3(codes) => Ok(simd::bytes(codes)),
        _ => unexpected(codes),
    }
}

/// Codes of eight bits and the scales of their groups; without any they are 1.
struct Bytes<'a> {
    elements: Elements<'a, u8>,
    scales: Option<Box<dyn Operand + 'a>>,
    /// Rows and columns that share a scale.
    group: [usize; 2],
}

impl Bytes<'_> {
    /// The scales of one row of groups, one for each of the columns.
    fn line<'a>(&self, row: usize, cols: Range<usize>, held: &'a mut [Vec<f32>; 2]) -> &'a [f32] {
        let [block, line] = held;
        let line = room(line, cols.len());
        match &self.scales {
            None => line.fill(1.0),
            Some(scales) => {
                let width = self.group[1];
                let first = cols.start / width;
                let block = scales.block(0, row..row + 1, first..cols.end.div_ceil(width), block);
                let scale = |col: usize| block.data[(col / width - first) * block.col_stride];
                line.iter_mut().zip(cols).for_each(|(x, col)| *x = scale(col));
            }
        }
        line
    }
}

/// The parts of some rows that share their scales, which `height` rows do.
fn parts(rows: Range<usize>, height: usize) -> impl Iterator<Item = (usize, Range<usize>)> {
    (rows.start / height..rows.end.div_ceil(height)).map(move |group| {
        let first = group * height;
        (group, first.max(rows.start)..first.saturating_add(height).min(rows.end))
    })
}

impl Operand for Bytes<'_> {
    fn block<'a>(
        &'a self,
        matrix: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a> {
        let Elements { data, stack, loops } = self.elements;
        let (first, width) = (rows.start, cols.len());
        let len = rows.len() * width;
        let at = |block: Mat| (block.row_stride, block.col_stride);
        let (row_stride, col_stride) =
            at(widened(data, stack, matrix, rows.clone(), cols.clone(), loops.widen, scratch));
        let mut held = Default::default();
        for (group, rows) in parts(rows, self.group[0]) {
            let line = self.line(group, cols.clone(), &mut held);
            let (start, height) = (rows.start - first, rows.len());
            match row_stride {
                // Columns lie in one piece.
                1 if col_stride != 1 => {
                    let columns = scratch[..len].chunks_exact_mut(col_stride);
                    for (column, scale) in columns.zip(line) {
                        column[start..start + height].iter_mut().for_each(|x| *x *= scale);
                    }
                }
                _ => {
                    for row in scratch[start * width..][..height * width].chunks_exact_mut(width) {
                        row.iter_mut().zip(line).for_each(|(x, scale)| *x *= scale);
                    }
                }
            }
        }
        Mat { data: &scratch[..len], row_stride, col_stride }
    }

    fn add_row(&self, matrix: usize, x: &[f32], cols: Range<usize>, out: &mut [f32]) -> bool {
        let (mut held, mut sums) = (Default::default(), vec![0.0; out.len()]);
        for (group, rows) in parts(0..x.len(), self.group[0]) {
            sums.fill(0.0);
            if !self.elements.add_part(matrix, rows.start, &x[rows], cols.clone(), &mut sums) {
                return false;
            }
            let line = self.line(group, cols.clone(), &mut held);
            for ((out, sum), scale) in out.iter_mut().zip(&sums).zip(line) {
                *out += sum * scale;
            }
        }
        true
    }

    fn by_columns(&self) -> bool {
        by_columns(self.elements.stack)
    }
}

/// What codes of four bits stand for.
enum Zeros<'a> {
    Table([f32; 16]),
    /// Integers, less the zero points of their groups.
    Each(Box<dyn Operand + 'a>),
}

/// Words of codes of four bits, whose lines lie in one piece.
struct Nibbles<'a> {
    words: &'a [u32],
    stack: &'a Stack,
    scales: Box<dyn Operand + 'a>,
    zeros: Zeros<'a>,
    /// Rows that share a scale: all, or a multiple of those of a word.
    height: usize,
}

/// Codes of one word.
const CODES: usize = 8;
/// Columns that go through all rows of a group at a time, so that their sums stay in the first cache.
const STRIP: usize = 2048;

impl Nibbles<'_> {
    fn words(&self, row: usize, cols: &Range<usize>) -> &[u32] {
        let at = begin(self.stack, 0, &(row / CODES..row / CODES + 1), cols);
        &self.words[at..][..cols.len()]
    }

    /// The zero points of a group, if there are any.
    fn zeros<'a>(&'a self, group: usize, cols: &Range<usize>, held: &'a mut Vec<f32>) -> &'a [f32] {
        match &self.zeros {
            Zeros::Table(_) => &[],
            Zeros::Each(zeros) => line(&**zeros, group, cols, held),
        }
    }
}

/// One row of a small matrix, whose columns lie in one piece.
fn line<'a>(
    of: &'a dyn Operand,
    row: usize,
    cols: &Range<usize>,
    scratch: &'a mut Vec<f32>,
) -> &'a [f32] {
    &of.block(0, row..row + 1, cols.clone(), scratch).data[..cols.len()]
}

impl Operand for Nibbles<'_> {
    fn block<'a>(
        &'a self,
        _: usize,
        rows: Range<usize>,
        cols: Range<usize>,
        scratch: &'a mut Vec<f32>,
    ) -> Mat<'a> {
        let (first, width) = (rows.start, cols.len());
        let out = room(scratch, rows.len() * width);
        let (mut steps, mut held) = (Vec::new(), Vec::new());
        for (group, rows) in parts(rows, self.height) {
            let scales = line(&*self.scales, group, &cols, &mut steps);
            let zeros = self.zeros(group, &cols, &mut held);
            for row in rows {
                let (words, i) = (self.words(row, &cols), (row % CODES) as u32);
                let out = &mut out[(row - first) * width..][..width];
                match &self.zeros {
                    Zeros::Table(table) => simd::widen_by_table(words, i, table, scales, out),
                    Zeros::Each(_) => simd::widen_from_zeros(words, i, zeros, scales, out),
                }
            }
        }
        Mat::rows(out, width)
    }

    fn add_row(&self, _: usize, x: &[f32], cols: Range<usize>, out: &mut [f32]) -> bool {
        let (mut steps, mut held, mut sums) = (Vec::new(), Vec::new(), vec![0.0; STRIP]);
        for (i, out) in out.chunks_mut(STRIP).enumerate() {
            let first = cols.start + i * STRIP;
            let cols = first..first + out.len();
            let sums = &mut sums[..out.len()];
            for (group, x) in x.chunks(self.height).enumerate() {
                sums.fill(0.0);
                let zeros = self.zeros(group, &cols, &mut held);
                for (j, x) in x.chunks(CODES).enumerate() {
                    // Codes past the last row are times 0.
                    let x = std::array::from_fn(|i| x.get(i).copied().unwrap_or(0.0));
                    let words = self.words(group * self.height + j * CODES, &cols);
                    match &self.zeros {
                        Zeros::Table(table) => simd::add_by_table(words, &x, table, sums),
                        Zeros::Each(_) => simd::add_from_zeros(words, &x, zeros, sums),
                    }
                }
                let scales = line(&*self.scales, group, &cols, &mut steps);
                for ((out, sum), scale) in out.iter_mut().zip(&*sums).zip(scales) {
                    *out += sum * scale;
                }
            }
        }
        true
    }

    fn by_columns(&self) -> bool {
        false
    }

    fn steps(&self) -> [usize; 2] {
        [CODES, 1]
    }
}
