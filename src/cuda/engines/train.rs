//! Optimizers, and memory in use.

use candle_core::{CudaDevice, DType, Result, Tensor};

use crate::train::{AdamWCall, AdamWTables, Sum, Update};

#[cfg(feature = "cuda")]
use {super::super::driver::pool::Pool, super::super::native};

/// The most bytes that were in use on a GPU at one time.
pub(crate) fn peak_memory(op: &'static str, device: &CudaDevice) -> Result<u64> {
    on_gpu!(Ok(Pool::of(op, device)?.peak()?))
}

/// The count of these begins anew.
pub(crate) fn reset_peak_memory(op: &'static str, device: &CudaDevice) -> Result<()> {
    on_gpu!(Ok(Pool::of(op, device)?.forget()?))
}

/// A step of AdamW of tensors on one GPU, none of them empty, at least one.
pub(crate) fn adamw(
    op: &'static str,
    updates: &[Update],
    call: &AdamWCall,
    tables: &mut AdamWTables,
) -> Result<()> {
    on_gpu!(native::adamw(op, updates, call, tables))
}

/// The norm of all gradients together times `scale`, and the factor (with the scale) that makes it at most `max_norm`:
/// f32 `[2]`. The gradients are on one GPU, none of them empty, at least one, and without gaps.
pub(crate) fn grad_norm(
    op: &'static str,
    grads: &[&Tensor],
    scale: f32,
    max_norm: f32,
) -> Result<Tensor> {
    on_gpu!(native::grad_norm(op, grads, scale, max_norm))
}

/// The same gradients times the second of two numbers, the factor of [`grad_norm`]: in their dtypes, or in f16 or bf16.
pub(crate) fn scale_grads(
    op: &'static str,
    grads: &[&Tensor],
    clip: &Tensor,
    to: Option<DType>,
) -> Result<Vec<Tensor>> {
    on_gpu!(native::scale_grads(op, grads, clip, to))
}

/// Adds gradients, such as those of [`grad_norm`], to sums.
pub(crate) fn accumulate(op: &'static str, sums: &[Sum]) -> Result<()> {
    on_gpu!(native::accumulate(op, sums))
}
