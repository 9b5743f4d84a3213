//! Cross-entropy and its gradient, in f32, row by row.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::exp::{exp, exp_minus, tanh};
use super::operand::{Operand, operand};
use super::widen::narrow_to;
use crate::error::Error;
use crate::op::{RowLoss, RowLosses, Upstream, View, span};
use crate::options::Reduction;
use crate::stack::Stack;

/// The losses of all rows, reduced.
pub(crate) fn cross_entropy(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    logits: View<CpuStorage>,
    targets: View<CpuStorage>,
) -> Result<RowLosses<CpuStorage>> {
    let stack = Stack::new(logits.1);
    let targets = classes(op, row_loss, targets, stack.cols)?;
    let rows = Rows { elements: operand(logits.0, &stack)?, stack: &stack };
    let of_rows = targets.par_iter().enumerate().map_init(Vec::new, |scratch, (row, target)| {
        target.map_or((0.0, [0.0; 2]), |target| {
            let z = rows.capped(row, row_loss.softcap, scratch);
            let at_target = z[target];
            let mean = (row_loss.smoothing > 0.0)
                .then(|| z.iter().map(|&z| f64::from(z)).sum::<f64>() / stack.cols as f64);
            let stats = normalizer(z);
            (row_loss.of(stats, at_target, mean), stats)
        })
    });
    let (losses, stats): (Vec<f32>, Vec<[f32; 2]>) = of_rows.unzip();
    let counted = targets.iter().flatten().count();
    let (loss, share) = reduced(reduction, losses, counted);
    Ok(RowLosses { loss, stats: CpuStorage::F32(stats.concat()), share })
}

/// All rows' losses reduced, and what the gradient of each counted row is multiplied with.
pub(crate) fn reduce_losses(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    losses: CpuStorage,
    targets: View<CpuStorage>,
    count: usize,
) -> Result<[CpuStorage; 2]> {
    let counted = classes(op, row_loss, targets, count)?.iter().flatten().count();
    Ok(reduced(reduction, losses.as_slice::<f32>()?.to_vec(), counted).into())
}

fn reduced(reduction: Reduction, losses: Vec<f32>, counted: usize) -> (CpuStorage, CpuStorage) {
    let sum = || losses.iter().map(|&loss| f64::from(loss)).sum::<f64>();
    let (loss, share) = match reduction {
        Reduction::Sum => (vec![sum() as f32], 1.0),
        Reduction::Mean => {
            // Of none the gradient is 0, and the loss NaN.
            let share = if counted == 0 { 0.0 } else { 1.0 / counted as f32 };
            (vec![(sum() / counted as f64) as f32], share)
        }
        Reduction::None => (losses, 1.0),
    };
    (CpuStorage::F32(loss), CpuStorage::F32(vec![share]))
}

/// Adds f32 to those from `first` on.
pub(crate) fn add_part(sums: &mut CpuStorage, first: usize, more: &[f32]) -> Result<()> {
    let CpuStorage::F32(sums) = sums else { candle_core::bail!("sums are f32") };
    sums[first..].par_iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    Ok(())
}

/// The gradient of the logits, in their dtype, without gaps.
pub(crate) fn cross_entropy_backward(
    op: &'static str,
    row_loss: RowLoss,
    logits: View<CpuStorage>,
    targets: View<CpuStorage>,
    upstream: &Upstream<CpuStorage>,
) -> Result<CpuStorage> {
    let stack = Stack::new(logits.1);
    let targets = classes(op, row_loss, targets, stack.cols)?;
    let rows = Rows { elements: operand(logits.0, &stack)?, stack: &stack };
    let [stats, share, grad] = [&upstream.stats, &upstream.share, &upstream.grad]
        .map(|(storage, layout)| storage.as_slice::<f32>().map(|elements| &elements[span(layout)]));
    let (stats, share, grad) = (stats?.as_chunks::<2>().0, share?[0], grad?);
    let mut out = vec![0f32; stack.elements()];
    let results = out.par_chunks_mut(stack.cols).zip(&targets).enumerate();
    results.for_each_init(Vec::new, |scratch, (row, (out, target))| {
        let Some(target) = *target else { return };
        let factor = share * grad[if grad.len() == 1 { 0 } else { row }];
        let z = rows.capped(row, row_loss.softcap, scratch);
        row_loss.slopes(z, stats[row], target, factor, out);
    });
    narrow_to(logits.0.dtype(), out)
}

impl RowLoss {
    /// The loss of a row, given what normalises it, the target's logit and, with smoothing, the mean of all.
    fn of(&self, [max, log]: [f32; 2], at_target: f32, mean: Option<f64>) -> f32 {
        let hot = max - at_target + log;
        let smoothed = match mean {
            None => hot,
            Some(mean) => {
                let even = (f64::from(max) - mean) as f32 + log;
                // 0 · ∞ would be NaN.
                let hot = if self.smoothing < 1.0 { (1.0 - self.smoothing) * hot } else { 0.0 };
                hot + self.smoothing * even
            }
        };
        let lse = max + log;
        if self.z_loss > 0.0 { smoothed + self.z_loss * lse * lse } else { smoothed }
    }

    /// `factor` times the slopes of the loss by the logits, given these under their cap.
    fn slopes(&self, z: &[f32], [max, log]: [f32; 2], target: usize, factor: f32, out: &mut [f32]) {
        let scale = factor * (1.0 + 2.0 * self.z_loss * (max + log));
        let even = factor * self.smoothing / z.len() as f32;
        for (out, &z) in out.iter_mut().zip(z) {
            *out = exp(z - max - log) * scale - even;
        }
        out[target] -= factor * (1.0 - self.smoothing);
        if let Some(cap) = self.softcap {
            for (out, &z) in out.iter_mut().zip(z) {
                let tanh = z / cap;
                *out *= 1.0 - tanh * tanh;
            }
        }
    }
}

/// The largest logit, and the logarithm of the sum of all exponentials over its own: the log-sum-exp is their sum, which
/// alone would have lost the digits that tell logits near a large one apart. NaN if a logit is NaN or +∞, or if all are
/// −∞.
fn normalizer(z: &mut [f32]) -> [f32; 2] {
    let max = z.iter().fold(f32::NEG_INFINITY, |max, &z| max.max(z));
    if max.is_infinite() {
        return [f32::NAN; 2];
    }
    [max, exp_minus(z, max).ln()]
}

/// The rows of logits.
struct Rows<'a> {
    elements: Box<dyn Operand + 'a>,
    stack: &'a Stack,
}

impl Rows<'_> {
    /// A row in f32, under its cap.
    fn capped<'s>(&self, row: usize, cap: Option<f32>, scratch: &'s mut Vec<f32>) -> &'s mut [f32] {
        let (matrix, row, cols) = (row / self.stack.rows, row % self.stack.rows, self.stack.cols);
        // One row lies side by side, whichever way the block was read.
        self.elements.block(matrix, row..row + 1, 0..cols, scratch);
        let z = &mut scratch[..cols];
        if let Some(cap) = cap {
            z.iter_mut().for_each(|z| *z = cap * tanh(*z / cap));
        }
        z
    }
}

/// The class of each row, `None` of one that is ignored.
fn classes(
    op: &'static str,
    row_loss: RowLoss,
    (storage, layout): View<CpuStorage>,
    count: usize,
) -> Result<Vec<Option<usize>>> {
    let ignored = row_loss.ignore_index;
    let class = |(i, target): (usize, i64)| match usize::try_from(target) {
        _ if target == ignored => Ok(None),
        Ok(class) if class < count => Ok(Some(class)),
        _ => Err(Error::Value {
            op,
            name: "targets",
            got: format!("{target} in row {i}"),
            want: format!("0 to V − 1 with V = {count}, or the ignore_index {ignored}"),
            fix: "check the vocabulary's size and what fills up batches",
        }
        .into()),
    };
    match storage {
        CpuStorage::U32(targets) => {
            targets[span(layout)].iter().map(|&t| t.into()).enumerate().map(class).collect()
        }
        _ => storage.as_slice::<i64>()?[span(layout)]
            .iter()
            .copied()
            .enumerate()
            .map(class)
            .collect(),
    }
}
