//! Softmax of rows, in f32.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::widen::{narrow_to, packed};
use crate::op::View;
use crate::stack::Stack;

/// `e^(x − max) / Σ e^(x − max)` of each row, packed, in the operand's dtype.
pub(crate) fn softmax((storage, at): View<CpuStorage>) -> Result<CpuStorage> {
    let stack = Stack::new(at);
    let mut out = packed(storage, &stack)?.into_owned();
    out.par_chunks_mut(stack.cols.max(1)).for_each(|row| {
        let max = row.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        row.iter_mut().for_each(|x| *x = (*x - max).exp());
        let sum = row.iter().sum::<f32>();
        row.iter_mut().for_each(|x| *x /= sum);
    });
    narrow_to(storage.dtype(), out)
}

/// `y · (dy − Σ y·dy)` of each row, likewise.
pub(crate) fn softmax_backward(
    (y, at): View<CpuStorage>,
    (grad, grad_at): View<CpuStorage>,
) -> Result<CpuStorage> {
    let stack = Stack::new(at);
    let y_rows = packed(y, &stack)?;
    let mut out = packed(grad, &Stack::new(grad_at))?.into_owned();
    let cols = stack.cols.max(1);
    out.par_chunks_mut(cols).zip(y_rows.par_chunks(cols)).for_each(|(grad, y)| {
        let sum = grad.iter().zip(y).map(|(dy, y)| dy * y).sum::<f32>();
        grad.iter_mut().zip(y).for_each(|(dy, y)| *dy = y * (*dy - sum));
    });
    narrow_to(y.dtype(), out)
}
