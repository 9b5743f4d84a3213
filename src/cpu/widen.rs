//! From storage to f32 and back.

use std::borrow::Cow;

use candle_core::{CpuStorage, DType, Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use crate::stack::Stack;

/// Elements that one thread converts at a time.
const CHUNK: usize = 1 << 14;

/// A view in f32.
pub(super) struct Wide<'a> {
    pub data: Cow<'a, [f32]>,
    /// Where the view's elements are in `data`.
    pub stack: Stack,
}

/// Widens a view. Its order in memory is kept where the view is dense; a sparse one is packed, so
/// that the cost is in proportion to the view, not to the storage around it.
pub(super) fn widen<'a>(storage: &'a CpuStorage, stack: &Stack) -> Result<Wide<'a>> {
    let span = stack.span();
    if let CpuStorage::F32(data) = storage {
        return Ok(Wide { data: Cow::Borrowed(&data[span]), stack: stack.clone().rebased(0) });
    }
    if span.len() > 2 * stack.elements() {
        let data = Cow::Owned(gather(storage, stack)?);
        return Ok(Wide { data, stack: stack.packed() });
    }
    let mut data = vec![0f32; span.len()];
    match storage {
        CpuStorage::F16(s) => convert(&s[span], &mut data, |s, d| s.convert_to_f32_slice(d)),
        CpuStorage::BF16(s) => convert(&s[span], &mut data, |s, d| s.convert_to_f32_slice(d)),
        _ => return unexpected(storage),
    }
    Ok(Wide { data: Cow::Owned(data), stack: stack.clone().rebased(0) })
}

/// The view's elements in f32, row-major without gaps.
pub(super) fn packed<'a>(storage: &'a CpuStorage, stack: &Stack) -> Result<Cow<'a, [f32]>> {
    match stack.contiguous() {
        Some(_) => Ok(widen(storage, stack)?.data),
        None => Ok(Cow::Owned(gather(storage, stack)?)),
    }
}

fn gather(storage: &CpuStorage, stack: &Stack) -> Result<Vec<f32>> {
    Ok(match storage {
        CpuStorage::F32(s) => pick(stack, |i| s[i]),
        CpuStorage::F16(s) => pick(stack, |i| s[i].to_f32()),
        CpuStorage::BF16(s) => pick(stack, |i| s[i].to_f32()),
        _ => return unexpected(storage),
    })
}

/// Row-major elements of a stack, whatever they are.
pub(super) fn pick<T: Send + Copy + Default>(
    stack: &Stack,
    element: impl Fn(usize) -> T + Sync,
) -> Vec<T> {
    let mut out = vec![T::default(); stack.elements()];
    if out.is_empty() {
        return out;
    }
    out.par_chunks_mut(stack.cols).enumerate().for_each(|(i, row)| {
        let start = stack.matrix_offset(i / stack.rows) + i % stack.rows * stack.row_stride;
        for (j, x) in row.iter_mut().enumerate() {
            *x = element(start + j * stack.col_stride);
        }
    });
    out
}

fn convert<T: Sync>(src: &[T], dst: &mut [f32], f: impl Fn(&[T], &mut [f32]) + Sync) {
    let pieces = src.par_chunks(CHUNK).zip(dst.par_chunks_mut(CHUNK));
    pieces.for_each(|(src, dst)| f(src, dst));
}

/// f32 results in the dtype of the inputs.
pub(crate) fn narrow_to(dtype: DType, data: Vec<f32>) -> Result<CpuStorage> {
    match dtype {
        DType::F32 => Ok(CpuStorage::F32(data)),
        DType::F16 => {
            let mut out = vec![f16::ZERO; data.len()];
            let pieces = data.par_chunks(CHUNK).zip(out.par_chunks_mut(CHUNK));
            pieces.for_each(|(src, dst)| dst.convert_from_f32_slice(src));
            Ok(CpuStorage::F16(out))
        }
        DType::BF16 => {
            let mut out = vec![bf16::ZERO; data.len()];
            let pieces = data.par_chunks(CHUNK).zip(out.par_chunks_mut(CHUNK));
            pieces.for_each(|(src, dst)| dst.convert_from_f32_slice(src));
            Ok(CpuStorage::BF16(out))
        }
        _ => bail!("no conversion from f32 to {}", dtype.as_str()),
    }
}

fn unexpected<T>(storage: &CpuStorage) -> Result<T> {
    use candle_core::backend::BackendStorage;
    bail!("the CPU path got {} where it wanted a float", storage.dtype().as_str())
}
