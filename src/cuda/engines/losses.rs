//! Cross-entropy.

use candle_core::{CudaStorage, Result};

use super::super::Operand;
use crate::op::{RowLoss, RowLosses, Upstream, View};
use crate::options::Reduction;
use crate::stack::Stack;

#[cfg(feature = "cuda")]
use {
    super::super::{empty, native},
    candle_core::DType,
};

/// The losses of rows of logits with targets without gaps, and what their gradient begins with.
pub(crate) fn cross_entropy(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    (logits, stack): Operand,
    targets: View<CudaStorage>,
) -> Result<RowLosses<CudaStorage>> {
    on_gpu!({
        if targets.1.shape().elem_count() > 0 {
            return native::cross_entropy(op, row_loss, reduction, (logits, stack), targets);
        }
        let [losses, stats] = [0; 2].map(|len| empty::zeros(logits, len, DType::F32));
        let [loss, share] = reduce_losses(op, row_loss, reduction, losses?, targets)?;
        Ok(RowLosses { loss, stats: stats?, share })
    })
}

/// The losses of all rows reduced, and what the gradient of each counted row is multiplied with.
pub(crate) fn reduce_losses(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    losses: CudaStorage,
    targets: View<CudaStorage>,
) -> Result<[CudaStorage; 2]> {
    on_gpu!({
        let one = empty::full(&losses, 1, 1.0)?;
        match reduction {
            Reduction::None => Ok([losses, one]),
            _ if targets.1.shape().elem_count() > 0 => {
                native::reduce_losses(op, row_loss, reduction, &losses, targets)
            }
            Reduction::Sum => Ok([empty::full(&losses, 1, 0.0)?, one]),
            Reduction::Mean => Ok([empty::full(&losses, 1, f32::NAN)?, one]),
        }
    })
}

/// The losses of the rows of a matrix without gaps, from an element of all losses on; with `upstream` gradients and what
/// these are multiplied with, their gradients in its place.
pub(crate) fn cross_entropy_in_place(
    op: &'static str,
    row_loss: RowLoss,
    logits: (&mut CudaStorage, &Stack),
    targets: View<CudaStorage>,
    upstream: Option<[View<CudaStorage>; 2]>,
    losses: (&mut CudaStorage, usize),
) -> Result<()> {
    on_gpu!(native::cross_entropy_in_place(op, row_loss, logits, targets, upstream, losses))
}

/// The gradient of logits, of which there are some, in their dtype, packed.
pub(crate) fn cross_entropy_backward(
    op: &'static str,
    row_loss: RowLoss,
    logits: Operand,
    targets: View<CudaStorage>,
    upstream: &Upstream<CudaStorage>,
) -> Result<CudaStorage> {
    on_gpu!(native::cross_entropy_backward(op, row_loss, logits, targets, upstream))
}
