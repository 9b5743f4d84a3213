//! From storage to f32 and back.

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{CpuStorage, DType, Result, bail};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};
use rayon::prelude::*;

use super::simd;
use crate::stack::Stack;

/// Elements that one thread converts at a time.
const CHUNK: usize = 1 << 14;

/// The view's elements in f32, row-major without gaps.
pub(super) fn packed<'a>(storage: &'a CpuStorage, stack: &Stack) -> Result<Cow<'a, [f32]>> {
    let Some(offset) = stack.contiguous() else {
        return Ok(Cow::Owned(gather(storage, stack)?));
    };
    let span = offset..offset + stack.elements();
    let convert = |widen: &(dyn Fn(Range<usize>, &mut [f32]) + Sync)| {
        let mut out = vec![0f32; span.len()];
        out.par_chunks_mut(CHUNK).enumerate().for_each(|(i, out)| {
            let start = span.start + i * CHUNK;
            widen(start..start + out.len(), out);
        });
        Ok(Cow::Owned(out))
    };
    match storage {
        CpuStorage::F32(s) => Ok(Cow::Borrowed(&s[span])),
        CpuStorage::F16(s) => convert(&|at, out| simd::widen_f16(&s[at], out)),
        CpuStorage::BF16(s) => convert(&|at, out| simd::widen_bf16(&s[at], out)),
        _ => unexpected(storage),
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

pub(super) fn unexpected<T>(storage: &CpuStorage) -> Result<T> {
    use candle_core::backend::BackendStorage;
    bail!("the CPU path got {} where it wanted a float", storage.dtype().as_str())
}
