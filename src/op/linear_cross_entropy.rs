//! Cross-entropy of the logits `x·Wᵀ`, of which only some rows are in memory at a time. Gradients are made with the losses,
//! while a chunk's logits are there (as Liger Kernel does: Hsu et al., 2024): a scalar loss multiplies them later.

use std::ops::Range;

use candle_core::{CpuStorage, CudaStorage, DType, Device, Layout, Result, Shape, Tensor};

use super::cross_entropy::{RowLoss, check_targets, packed};
use super::{Computed, Differentiable, MatmulProblem, Op, View, apply, cast, casts, eval_all};
use crate::options::{CrossEntropyOptions, Reduction};
use crate::stack::Stack;
use crate::{check, cpu, cuda};

/// The most bytes of logits at a time.
const WORKSPACE: usize = 1 << 30;

/// The cross-entropy of `hidden [.., H]` times `weight [V, H]` with `targets [..]`.
pub(crate) fn linear_cross_entropy(
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    opts: &CrossEntropyOptions,
) -> Result<Tensor> {
    linear_cross_entropy_within(WORKSPACE, hidden, weight, targets, opts)
}

/// The same in chunks of so many bytes of logits. Public for tests and benches.
pub fn linear_cross_entropy_within(
    workspace: usize,
    hidden: &Tensor,
    weight: &Tensor,
    targets: &Tensor,
    opts: &CrossEntropyOptions,
) -> Result<Tensor> {
    let op = "kaio_linear_cross_entropy";
    let args @ [x, w, _] = [("hidden", hidden), ("weight", weight), ("targets", targets)];
    check::tensors(op, &args)?;
    let dtype = casts::multiplied_in(op, [x, w], opts.compute_dtype)?;
    check::rank(op, x, 1..=usize::MAX, "[.., H]", "give a vector for each target")?;
    check::rank(op, w, 2..=2, "[V, H]", "a weight is one matrix")?;
    let depth = hidden.dims()[hidden.rank() - 1];
    let why = format_args!("the H of `hidden` {:?}", hidden.dims());
    let fix = "transpose it with `.t()?`";
    check::dim(op, "weight", ("H", weight.dims()[1]), (depth, why), fix)?;
    check_targets(op, targets, x)?;
    let row_loss = RowLoss::new(op, opts)?;
    let out = match opts.reduction {
        Reduction::None => targets.shape().clone(),
        Reduction::Mean | Reduction::Sum => Shape::from(()),
    };
    let call = Linear {
        op,
        row_loss,
        reduction: opts.reduction,
        out,
        wants: [hidden.track_op(), weight.track_op()],
        dtypes: [hidden.dtype(), weight.dtype()],
        workspace,
    };
    if !hidden.is_contiguous() {
        check::made(op, x, hidden.dims())?;
    }
    let x = hidden.reshape((targets.elem_count(), depth))?;
    let cast = casts::operands([&x, weight], dtype)?;
    let [a, b] = [(&cast[0], &x), (&cast[1], weight)];
    let [multiplied, sources] = [
        [a, b].map(|(cast, t)| Some(cast.as_ref().unwrap_or(t))),
        [a, b].map(|(cast, t)| cast.as_ref().and(Some(t))),
    ];
    let targets = packed(op, ("targets", targets))?;
    let inputs = multiplied.into_iter().chain([Some(&targets)]).chain(sources);
    let [loss] = apply(call, &inputs.flatten().collect::<Vec<_>>())?;
    Ok(loss)
}

/// Inputs: hidden states `[N, H]`, weight and targets, and what the first two were cast from, if they were: those have the
/// gradients then. Results: the loss; saved, unless each row has a loss of its own:
/// the share of each, and the gradients of the sum of all.
#[derive(Clone)]
struct Linear {
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    out: Shape,
    /// Whether there are gradients of the hidden states and of the weight.
    wants: [bool; 2],
    /// Of these gradients.
    dtypes: [DType; 2],
    workspace: usize,
}

/// The losses of rows, and the gradients of hidden states and weight, before a factor and a rounding to the inputs' dtype.
struct Parts<S> {
    losses: S,
    grads: [Option<S>; 2],
}

/// What a device computes of a chunk.
trait Chunks {
    type Storage;

    /// In f32.
    fn zeros(&self, len: usize) -> Result<Self::Storage>;

    /// What products are written to, in f32 or in another dtype.
    fn gradient(&self, len: usize, dtype: DType) -> Result<Self::Storage>;

    /// `a·b` in the operands' dtype, or one that is as good.
    fn product(&self, a: View<Self::Storage>, b: View<Self::Storage>) -> Result<Self::Storage>;

    /// Writes `a·b` to a gradient from an element on, or adds it to what was written.
    fn product_to(
        &self,
        a: View<Self::Storage>,
        b: View<Self::Storage>,
        to: (&mut Self::Storage, usize),
        adds: bool,
    ) -> Result<()>;

    /// The losses of rows of logits; with `upstream`, the gradients of these times its own in place of the logits.
    fn rows(
        &self,
        logits: (&mut Self::Storage, &Layout),
        targets: View<Self::Storage>,
        upstream: Option<[View<Self::Storage>; 2]>,
        losses: (&mut Self::Storage, usize),
    ) -> Result<()>;

    /// A number.
    fn one(&self) -> Result<Self::Storage>;
}

impl Linear {
    /// Rows of a chunk: as even as multiples of a tile allow.
    fn chunk(&self, rows: usize, classes: usize) -> usize {
        const TILE: usize = 128;
        let most = (self.workspace / (classes.max(1) * DType::BF16.size_in_bytes())).max(1);
        let most = if most > TILE { most / TILE * TILE } else { most };
        let chunks = rows.div_ceil(most).max(1);
        rows.div_ceil(chunks).next_multiple_of(TILE).clamp(1, most)
    }

    /// Losses, and the gradients that are wanted of them, each times its upstream gradient, or of their sum.
    fn run<C: Chunks>(
        &self,
        on: &C,
        [x, w, targets]: [View<C::Storage>; 3],
        wants: [bool; 2],
        upstream: Option<View<C::Storage>>,
    ) -> Result<Parts<C::Storage>> {
        let ([rows, depth], classes) = (pair(x.1), w.1.dims()[0]);
        let mut losses = on.zeros(rows)?;
        let gradient = |i: usize, len| match (wants[i], rows * depth * classes) {
            (false, _) => Ok(None),
            // No product is written to it.
            (true, 0) => on.zeros(len).map(Some),
            // A row of hidden states has its gradient in one chunk, the weight in all of them. f16 has not the range for what
            // comes before the factor.
            (true, _) => match self.dtypes[i] {
                DType::BF16 if i == 0 => on.gradient(len, DType::BF16).map(Some),
                _ => on.gradient(len, DType::F32).map(Some),
            },
        };
        let mut grads = [gradient(0, rows * depth)?, gradient(1, classes * depth)?];
        let (one, scalar) = (on.one()?, Layout::contiguous(1));
        let chunk = self.chunk(rows, classes);
        for start in (0..rows).step_by(chunk) {
            let some = start..rows.min(start + chunk);
            let part = |(storage, layout), dim| {
                Ok::<_, candle_core::Error>((storage, narrow(layout, dim, &some)?))
            };
            let (x_part, t_part) = (part(x, 0)?, part(targets, 0)?);
            let x_part = (x_part.0, &x_part.1);
            let mut z = on.product(x_part, (w.0, &w.1.transpose(0, 1)?))?;
            let z_is = Layout::contiguous((some.len(), classes));
            let share = (&one, &scalar);
            let of_rows = upstream.map(|all| part(all, 0)).transpose()?;
            let of_rows = of_rows.as_ref().map_or(share, |(storage, layout)| (*storage, layout));
            let upstream = wants.contains(&true).then_some([of_rows, share]);
            on.rows((&mut z, &z_is), (t_part.0, &t_part.1), upstream, (&mut losses, start))?;
            if z_is.shape().elem_count() == 0 {
                continue;
            }
            let [of_x, of_w] = &mut grads;
            if let Some(grad) = of_x {
                on.product_to((&z, &z_is), w, (grad, start * depth), false)?;
            }
            if let Some(sums) = of_w {
                on.product_to((&z, &z_is.transpose(0, 1)?), x_part, (sums, 0), start > 0)?;
            }
        }
        Ok(Parts { losses, grads })
    }

    /// The gradients, with their shapes.
    fn shaped<S>(&self, grads: [Option<S>; 2], inputs: [&Layout; 2]) -> Vec<Computed<S>> {
        let shaped =
            |(grad, layout): (Option<S>, &Layout)| grad.map(|grad| (grad, layout.shape().clone()));
        grads.into_iter().zip(inputs).filter_map(shaped).collect()
    }

    /// The input that has the gradient of operand `i`.
    fn leaf(&self, i: usize, inputs: &[&Tensor]) -> usize {
        casts::leaf(i, [0, 1].map(|i| inputs[i].dtype() != self.dtypes[i]), 3)
    }

    /// The gradients of as many inputs, from those before the factor.
    fn finish(
        &self,
        inputs: &[&Tensor],
        grads: &[Tensor],
        factor: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut all = vec![None; inputs.len()];
        for (i, grad) in (0..2).filter(|&i| self.wants[i]).zip(grads) {
            all[self.leaf(i, inputs)] = Some(scaled(self.op, grad, factor, self.dtypes[i])?);
        }
        Ok(all)
    }
}

fn pair(layout: &Layout) -> [usize; 2] {
    [layout.dims()[0], layout.dims()[1]]
}

fn narrow(layout: &Layout, dim: usize, range: &Range<usize>) -> Result<Layout> {
    layout.narrow(dim, range.start, range.len())
}

/// A tensor times a factor `[1]`, in a dtype.
fn scaled(op: &'static str, t: &Tensor, factor: &Tensor, dtype: DType) -> Result<Tensor> {
    match (t.elem_count(), t.device()) {
        (0, _) => cast(t, dtype),
        (_, Device::Cpu) => cast(&t.broadcast_mul(factor)?, dtype),
        _ => {
            // The second of two numbers is read.
            let factor = factor.broadcast_as(2)?.contiguous()?;
            let to = Some(dtype).filter(|&dtype| dtype != DType::F32);
            Ok(cuda::scale_grads(op, &[t], &factor, to)?.swap_remove(0))
        }
    }
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [x, w, targets, ..] = *inputs else {
            unreachable!("hidden states, a weight and targets")
        };
        let on = OnCpu { op: self.op, row_loss: self.row_loss };
        let wants = self.wants.map(|wanted| wanted && self.reduction != Reduction::None);
        let Parts { losses, grads } = self.run(&on, [x, w, targets], wants, None)?;
        let [loss, share] = cpu::reduce_losses(
            self.op,
            self.row_loss,
            self.reduction,
            losses,
            targets,
            w.1.dims()[0],
        )?;
        let grads = self.shaped(grads, [x.1, w.1]);
        Ok([vec![(loss, self.out.clone()), (share, 1.into())], grads].concat())
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [x, w, targets, ..] = *inputs else {
            unreachable!("hidden states, a weight and targets")
        };
        let on = OnCuda { op: self.op, row_loss: self.row_loss, like: x.0 };
        let wants = self.wants.map(|wanted| wanted && self.reduction != Reduction::None);
        let Parts { losses, grads } = self.run(&on, [x, w, targets], wants, None)?;
        let [loss, share] =
            cuda::reduce_losses(self.op, self.row_loss, self.reduction, losses, targets)?;
        let mut results = vec![(loss, self.out.clone()), (share, 1.into())];
        results.extend(self.shaped(grads, [x.1, w.1]));
        Ok(results)
    }
}

impl Differentiable for Linear {
    /// All but the targets.
    fn differentiates(&self, input: usize) -> bool {
        input != 2
    }

    /// For gradients that are computed again.
    fn reads(&self, input: usize, _: &[&Tensor]) -> bool {
        self.reduction == Reduction::None && input < 3
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None; inputs.len()]) };
        let [_, share, before @ ..] = results else { unreachable!("a loss and what is saved") };
        if self.reduction != Reduction::None {
            return self.finish(inputs, before, &(grad.reshape(1)? * share)?);
        }
        // Each row's gradient has a factor of its own: logits are computed again.
        let grad = match grad.elem_count() {
            0 => Tensor::zeros(0, DType::F32, grad.device())?,
            _ => grad.flatten_all()?.contiguous()?,
        };
        let (grad, factor) = match inputs[0].dtype() == DType::F16 && grad.elem_count() > 0 {
            // f16 ends at 6e-8: it holds them relative to the largest.
            true => {
                let peak = grad.abs()?.max_keepdim(0)?.clamp(1e-30f32, f32::MAX)?;
                (grad.broadcast_div(&peak)?, peak)
            }
            false => (grad, share.clone()),
        };
        let before = eval_all(&Again(self.clone()), &[inputs[0], inputs[1], inputs[2], &grad])?;
        self.finish(inputs, &before, &factor)
    }
}

/// Inputs: those of [`Linear`], and the upstream gradient of each row. Results: the gradients that are wanted, before a factor.
struct Again(Linear);

impl Op for Again {
    fn name(&self) -> &'static str {
        self.0.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [x, w, targets, upstream] = *inputs else { unreachable!("with a gradient") };
        let on = OnCpu { op: self.0.op, row_loss: self.0.row_loss };
        let parts = self.0.run(&on, [x, w, targets], self.0.wants, Some(upstream))?;
        Ok(self.0.shaped(parts.grads, [x.1, w.1]))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [x, w, targets, upstream] = *inputs else { unreachable!("with a gradient") };
        let on = OnCuda { op: self.0.op, row_loss: self.0.row_loss, like: x.0 };
        let parts = self.0.run(&on, [x, w, targets], self.0.wants, Some(upstream))?;
        Ok(self.0.shaped(parts.grads, [x.1, w.1]))
    }
}

struct OnCpu {
    op: &'static str,
    row_loss: RowLoss,
}

impl Chunks for OnCpu {
    type Storage = CpuStorage;

    fn zeros(&self, len: usize) -> Result<CpuStorage> {
        check::memory(self.op, "a gradient", &[len], DType::F32)?;
        Ok(CpuStorage::F32(vec![0.0; len]))
    }

    fn gradient(&self, len: usize, _: DType) -> Result<CpuStorage> {
        self.zeros(len)
    }

    fn one(&self) -> Result<CpuStorage> {
        Ok(CpuStorage::F32(vec![1.0]))
    }

    fn product(&self, a: View<CpuStorage>, b: View<CpuStorage>) -> Result<CpuStorage> {
        let problem = MatmulProblem::new(self.op, a.1, b.1)?;
        check::memory(self.op, "logits", problem.out.dims(), DType::F32)?;
        Ok(CpuStorage::F32(cpu::matmul(&problem, a.0, b.0)?))
    }

    fn product_to(
        &self,
        a: View<CpuStorage>,
        b: View<CpuStorage>,
        (sums, first): (&mut CpuStorage, usize),
        _: bool,
    ) -> Result<()> {
        let more = cpu::matmul(&MatmulProblem::new(self.op, a.1, b.1)?, a.0, b.0)?;
        // To zeros, if it is the first.
        cpu::add_part(sums, first, &more)
    }

    fn rows(
        &self,
        (logits, layout): (&mut CpuStorage, &Layout),
        targets: View<CpuStorage>,
        upstream: Option<[View<CpuStorage>; 2]>,
        (losses, first): (&mut CpuStorage, usize),
    ) -> Result<()> {
        let (op, row_loss) = (self.op, self.row_loss);
        let of = cpu::cross_entropy(op, row_loss, Reduction::None, (logits, layout), targets)?;
        cpu::add_part(losses, first, of.loss.as_slice::<f32>()?)?;
        if let Some([grad, share]) = upstream.filter(|_| layout.shape().elem_count() > 0) {
            let stats = Layout::contiguous((layout.dims()[0], 2));
            let upstream = super::Upstream { stats: (&of.stats, &stats), share, grad };
            *logits =
                cpu::cross_entropy_backward(op, row_loss, (logits, layout), targets, &upstream)?;
        }
        Ok(())
    }
}

struct OnCuda<'a> {
    op: &'static str,
    row_loss: RowLoss,
    /// On the device.
    like: &'a CudaStorage,
}

impl Chunks for OnCuda<'_> {
    type Storage = CudaStorage;

    fn zeros(&self, len: usize) -> Result<CudaStorage> {
        cuda::full(self.like, len, 0.0)
    }

    fn gradient(&self, len: usize, dtype: DType) -> Result<CudaStorage> {
        cuda::unwritten(self.like, len, dtype)
    }

    fn one(&self) -> Result<CudaStorage> {
        cuda::full(self.like, 1, 1.0)
    }

    fn product(&self, a: View<CudaStorage>, b: View<CudaStorage>) -> Result<CudaStorage> {
        cuda::product(self.op, &MatmulProblem::new(self.op, a.1, b.1)?, [a.0, b.0])
    }

    fn product_to(
        &self,
        a: View<CudaStorage>,
        b: View<CudaStorage>,
        to: (&mut CudaStorage, usize),
        adds: bool,
    ) -> Result<()> {
        let problem = MatmulProblem::new(self.op, a.1, b.1)?;
        cuda::product_to(self.op, &problem, [a.0, b.0], to, adds)
    }

    fn rows(
        &self,
        (logits, layout): (&mut CudaStorage, &Layout),
        targets: View<CudaStorage>,
        upstream: Option<[View<CudaStorage>; 2]>,
        losses: (&mut CudaStorage, usize),
    ) -> Result<()> {
        let stack = Stack::new(layout);
        let logits = (logits, &stack);
        cuda::cross_entropy_in_place(self.op, self.row_loss, logits, targets, upstream, losses)
    }
}
