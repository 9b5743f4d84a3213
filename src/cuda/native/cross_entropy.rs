//! Cross-entropy.

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::empty::full;
use super::super::fit::is_aligned;
use super::limit::{SPLIT, countable};
use super::operand::{ALIGN, element, rows};
use super::plan::Plans;
use crate::kernel::cross_entropy::{Arguments, Pass, Plan, Problem, Reduced};
use crate::op::{RowLoss, RowLosses, Upstream, View};
use crate::options::Reduction;
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// The losses of all rows, of which there are some, reduced. Targets are without gaps.
pub(crate) fn cross_entropy(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    (storage, stack): Operand,
    targets: View<CudaStorage>,
) -> Result<RowLosses<CudaStorage>> {
    let device = storage.device().clone();
    let logits = rows(op, (storage, stack))?;
    let reduced = reduced(reduction);
    let facts = facts(row_loss, (storage.dtype(), &logits.stack), targets, Some(Pass::Losses));
    let facts = Problem { reduced, ..facts };
    let order = Order::new(op, device.cuda_stream(), [storage, targets.0]);
    let f32s = |len: usize| uninit(&device, &Shape::from(len), DType::F32);
    let count = logits.stack.rows;
    let (mut losses, mut stats) = (f32s(count)?, f32s(2 * count)?);
    let mut reduced = match reduced {
        None => None,
        Some(_) => Some([f32s(1)?, f32s(1)?]),
    };
    {
        let from = Memory::of(logits.storage(), &device);
        let of_targets = Memory::of(targets.0, &device);
        let [to_losses, to_stats] =
            [&mut losses, &mut stats].map(|storage| Memory::of_mut(storage, &device));
        let to = reduced.as_mut().map(|both| both.each_mut().map(|s| Memory::of_mut(s, &device)));
        let arguments = Arguments {
            losses: Some(to_losses.address()),
            stats: Some(to_stats.address()),
            total: to.as_ref().map(|[total, _]| total.address()),
            share: to.as_ref().map(|[_, share]| share.address()),
            ..arguments(
                &facts,
                row_loss,
                (from.at(logits.offset(0)), logits.stack.row_stride),
                of_targets.at(targets.1.start_offset()),
            )
        };
        launch(op, &device, &order, &arguments)?;
    }
    Ok(match reduced {
        Some([loss, share]) => RowLosses { loss, stats, share },
        None => RowLosses { loss: losses, stats, share: full(storage, 1, 1.0)? },
    })
}

/// The gradient of logits, of which there are some, packed.
pub(crate) fn cross_entropy_backward(
    op: &'static str,
    row_loss: RowLoss,
    (storage, stack): Operand,
    targets: View<CudaStorage>,
    upstream: &Upstream<CudaStorage>,
) -> Result<CudaStorage> {
    let (device, dtype) = (storage.device().clone(), storage.dtype());
    let logits = rows(op, (storage, stack))?;
    let facts = facts(row_loss, (dtype, &logits.stack), targets, Some(Pass::Gradient));
    let kept = [upstream.stats, upstream.share, upstream.grad];
    let inputs = kept.map(|(storage, _)| storage).into_iter().chain([storage, targets.0]);
    let order = Order::new(op, device.cuda_stream(), inputs);
    let mut out = uninit(&device, &Shape::from(logits.stack.elements()), dtype)?;
    {
        let from = Memory::of(logits.storage(), &device);
        let of_targets = Memory::of(targets.0, &device);
        let memories = kept.map(|(storage, _)| Memory::of(storage, &device));
        let at = |i: usize| memories[i].at(kept[i].1.start_offset());
        let to = Memory::of_mut(&mut out, &device);
        let each = upstream.grad.1.shape().elem_count() > 1;
        let arguments = Arguments {
            stats: Some(at(0)),
            share: Some(at(1)),
            upstream: Some((at(2), each.into())),
            out: Some(to.address()),
            ..arguments(
                &facts,
                row_loss,
                (from.at(logits.offset(0)), logits.stack.row_stride),
                of_targets.at(targets.1.start_offset()),
            )
        };
        launch(op, &device, &order, &arguments)?;
    }
    Ok(out)
}

/// The losses of the rows of a matrix without gaps, from `first` on of all losses; and in its place what these, each times
/// its upstream gradient, have for gradients, if there is one.
pub(crate) fn cross_entropy_in_place(
    op: &'static str,
    row_loss: RowLoss,
    (storage, stack): (&mut CudaStorage, &Stack),
    targets: View<CudaStorage>,
    upstream: Option<[View<CudaStorage>; 2]>,
    (losses, first): (&mut CudaStorage, usize),
) -> Result<()> {
    let device = storage.device().clone();
    let pass = if upstream.is_some() { Pass::Both } else { Pass::Losses };
    let facts = facts(row_loss, (storage.dtype(), stack), targets, Some(pass));
    let inputs = [&*storage, targets.0].into_iter();
    let inputs = inputs.chain(upstream.iter().flatten().map(|(storage, _)| *storage));
    let order = Order::new(op, device.cuda_stream(), inputs);
    // Nobody asks what normalises rows whose gradients are there.
    let mut stats = match pass {
        Pass::Losses => Some(uninit(&device, &Shape::from(2 * stack.rows), DType::F32)?),
        Pass::Gradient | Pass::Both => None,
    };
    let logits = Memory::of_mut(storage, &device);
    let of_targets = Memory::of(targets.0, &device);
    let to_losses = Memory::of_mut(losses, &device);
    let to_stats = stats.as_mut().map(|stats| Memory::of_mut(stats, &device));
    let upstream = upstream.map(|both| both.map(|(s, at)| (Memory::of(s, &device), at)));
    let at = |(memory, layout): &(Memory, &Layout)| memory.at(layout.start_offset());
    let each = |layout: &Layout| u32::from(layout.shape().elem_count() > 1);
    let arguments = Arguments {
        losses: Some(to_losses.at(first)),
        stats: to_stats.as_ref().map(Memory::address),
        upstream: upstream.as_ref().map(|[rows, _]| (at(rows), each(rows.1))),
        share: upstream.as_ref().map(|[_, share]| at(share)),
        ..arguments(
            &facts,
            row_loss,
            (logits.address(), stack.cols),
            of_targets.at(targets.1.start_offset()),
        )
    };
    launch(op, &device, &order, &arguments)
}

/// All rows' losses reduced, and what the gradient of each counted row is multiplied with.
pub(crate) fn reduce_losses(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    losses: &CudaStorage,
    targets: View<CudaStorage>,
) -> Result<[CudaStorage; 2]> {
    let device = losses.device().clone();
    let rows = targets.1.shape().elem_count();
    let stack = Stack::row_major(rows, 1);
    let facts = Problem {
        reduced: reduced(reduction),
        ..facts(row_loss, (DType::F32, &stack), targets, None)
    };
    let order = Order::new(op, device.cuda_stream(), [losses, targets.0]);
    let one = || uninit(&device, &Shape::from(1), DType::F32);
    let mut both = [one()?, one()?];
    {
        let [from, of_targets] = [losses, targets.0].map(|s| Memory::of(s, &device));
        let [total, share] = both.each_mut().map(|storage| Memory::of_mut(storage, &device));
        let arguments = Arguments {
            losses: Some(from.address()),
            total: Some(total.address()),
            share: Some(share.address()),
            ..arguments(&facts, row_loss, (0, 1), of_targets.at(targets.1.start_offset()))
        };
        launch(op, &device, &order, &arguments)?;
    }
    Ok(both)
}

fn reduced(reduction: Reduction) -> Option<Reduced> {
    match reduction {
        Reduction::Mean => Some(Reduced::Mean),
        Reduction::Sum => Some(Reduced::Sum),
        Reduction::None => None,
    }
}

fn facts(
    row_loss: RowLoss,
    (dtype, logits): (DType, &Stack),
    targets: View<CudaStorage>,
    pass: Option<Pass>,
) -> Problem {
    // The gradient has no gaps, and begins at a multiple of all that a kernel reads.
    let whole = |elements: usize| (elements * dtype.size_in_bytes()).is_multiple_of(ALIGN);
    let strides = logits.rows == 1 || whole(logits.row_stride.abs_diff(logits.cols));
    Problem {
        rows: logits.rows as u64,
        cols: logits.cols as u64,
        element: element(dtype),
        wide: targets.0.dtype() == DType::I64,
        pass,
        reduced: None,
        softcap: row_loss.softcap.is_some(),
        smoothing: row_loss.smoothing > 0.0,
        aligned: is_aligned(logits, dtype, ALIGN),
        congruent: pass != Some(Pass::Gradient) || strides && whole(logits.matrix_offset(0)),
    }
}

/// Without what only some passes have.
fn arguments(
    problem: &Problem,
    row_loss: RowLoss,
    (address, row): (u64, usize),
    targets: u64,
) -> Arguments<'_> {
    Arguments {
        problem,
        logits: (address, row as u64),
        targets,
        ignored: row_loss.ignore_index,
        cap: row_loss.softcap.unwrap_or(1.0),
        smoothing: row_loss.smoothing,
        z_loss: row_loss.z_loss,
        losses: None,
        stats: None,
        upstream: None,
        share: None,
        out: None,
        total: None,
    }
}

fn launch(
    op: &'static str,
    device: &CudaDevice,
    order: &Order,
    arguments: &Arguments,
) -> Result<()> {
    let gpu = Gpu::of(op, device)?;
    countable(op, ["this crate", "take"], arguments.problem.limit(), SPLIT)?;
    let compiled = PLANS.get(op, &gpu, arguments.problem)?;
    order.run(|| Ok(compiled.launch(op, device, arguments)?))
}
