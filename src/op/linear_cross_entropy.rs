//! Cross-entropy of the logits `x·Wᵀ`, of which only some rows are in memory at a time. Gradients are made with the losses,
//! while a chunk's logits are there (as Liger Kernel does: Hsu et al., 2024): a scalar loss multiplies them later.

use std::ops::Range;

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::cross_entropy::{RowLoss, check_targets, packed_targets};
use super::{Computed, Differentiable, MatmulProblem, Op, View, apply, cast, eval_all};
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
    check::dtype(op, x, &[DType::F16, DType::BF16])?;
    check::same_dtype(op, w, x)?;
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
        workspace,
    };
    let x = hidden.reshape((targets.elem_count(), depth))?;
    let [loss] = apply(call, &[&x, weight, &packed_targets(targets)?])?;
    Ok(loss)
}

/// Inputs: hidden states `[N, H]`, weight and targets. Results: the loss; saved, unless each row has a loss of its own:
/// the share of each, and sums of gradients in f32.
#[derive(Clone)]
struct Linear {
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    out: Shape,
    /// Whether there are gradients of the hidden states and of the weight.
    wants: [bool; 2],
    workspace: usize,
}

/// The losses of rows, and the gradients of hidden states and weight in f32.
struct Parts<S> {
    losses: S,
    grads: [Option<S>; 2],
}

/// What a device computes of a chunk.
trait Chunks {
    type Storage;

    fn zeros(&self, len: usize) -> Result<Self::Storage>;

    /// `a·b` in the operands' dtype, or one that is as good.
    fn product(&self, a: View<Self::Storage>, b: View<Self::Storage>) -> Result<Self::Storage>;

    /// `sums += a·b`, from an element on.
    fn add_product(
        &self,
        a: View<Self::Storage>,
        b: View<Self::Storage>,
        sums: (&mut Self::Storage, usize),
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
        let wanted = |wanted: bool, len| wanted.then(|| on.zeros(len)).transpose();
        let mut grads = [wanted(wants[0], rows * depth)?, wanted(wants[1], classes * depth)?];
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
            let [of_x, of_w] = &mut grads;
            if let Some(sums) = of_x {
                on.add_product((&z, &z_is), w, (sums, start * depth))?;
            }
            if let Some(sums) = of_w {
                on.add_product((&z, &z_is.transpose(0, 1)?), x_part, (sums, 0))?;
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

    /// Gradients in the dtypes of the inputs, and `None` of those without one, from sums that are multiplied with a
    /// factor.
    fn finish(
        &self,
        inputs: &[&Tensor],
        sums: &[Tensor],
        factor: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut sums = sums.iter();
        let grad = |i: usize| match self.wants[i] {
            false => Ok(None),
            true => sums.next().map(|sums| scaled(sums, factor, inputs[i].dtype())).transpose(),
        };
        let grads = [0, 1].map(grad);
        let [of_x, of_w] = grads;
        Ok(vec![of_x?, of_w?, None])
    }
}

fn pair(layout: &Layout) -> [usize; 2] {
    [layout.dims()[0], layout.dims()[1]]
}

fn narrow(layout: &Layout, dim: usize, range: &Range<usize>) -> Result<Layout> {
    layout.narrow(dim, range.start, range.len())
}

/// `sums · factor` in a dtype, some rows at a time: no more than that is in memory twice.
fn scaled(sums: &Tensor, factor: &Tensor, dtype: DType) -> Result<Tensor> {
    const ELEMENTS: usize = 1 << 25;
    let (rows, cols) = sums.dims2()?;
    let step = (ELEMENTS / cols.max(1)).max(1);
    let piece = |start: usize| {
        let some = sums.narrow(0, start, step.min(rows - start))?;
        cast(&some.broadcast_mul(factor)?, dtype)
    };
    if sums.elem_count() == 0 || rows <= step {
        return if rows == 0 || cols == 0 { cast(sums, dtype) } else { piece(0) };
    }
    let out = Tensor::zeros((rows, cols), dtype, sums.device())?;
    for start in (0..rows).step_by(step) {
        out.slice_set(&piece(start)?, 0, start)?;
    }
    Ok(out)
}

impl Op for Linear {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [x, w, targets] = *inputs else { unreachable!("hidden states, a weight and targets") };
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
        let [x, w, targets] = *inputs else { unreachable!("hidden states, a weight and targets") };
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
    fn differentiates(&self, input: usize) -> bool {
        input < 2
    }

    /// For gradients that are computed again.
    fn reads(&self, _: usize, _: &[&Tensor]) -> bool {
        self.reduction == Reduction::None
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
        let [Some(grad)] = grads else { return Ok(vec![None; 3]) };
        let [_, share, sums @ ..] = results else { unreachable!("a loss and what is saved") };
        if self.reduction != Reduction::None {
            return self.finish(inputs, sums, &(grad.reshape(1)? * share)?);
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
        let sums = eval_all(&Again(self.clone()), &[inputs[0], inputs[1], inputs[2], &grad])?;
        self.finish(inputs, &sums, &factor)
    }
}

/// Inputs: those of [`Linear`], and the upstream gradient of each row. Results: the gradients that are wanted, in f32.
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

    fn one(&self) -> Result<CpuStorage> {
        Ok(CpuStorage::F32(vec![1.0]))
    }

    fn product(&self, a: View<CpuStorage>, b: View<CpuStorage>) -> Result<CpuStorage> {
        let problem = MatmulProblem::new(self.op, a.1, b.1)?;
        check::memory(self.op, "logits", problem.out.dims(), DType::F32)?;
        Ok(CpuStorage::F32(cpu::matmul(&problem, a.0, b.0)?))
    }

    fn add_product(
        &self,
        a: View<CpuStorage>,
        b: View<CpuStorage>,
        (sums, first): (&mut CpuStorage, usize),
    ) -> Result<()> {
        let more = cpu::matmul(&MatmulProblem::new(self.op, a.1, b.1)?, a.0, b.0)?;
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

    fn one(&self) -> Result<CudaStorage> {
        cuda::full(self.like, 1, 1.0)
    }

    fn product(&self, a: View<CudaStorage>, b: View<CudaStorage>) -> Result<CudaStorage> {
        cuda::product(self.op, &MatmulProblem::new(self.op, a.1, b.1)?, [a.0, b.0])
    }

    fn add_product(
        &self,
        a: View<CudaStorage>,
        b: View<CudaStorage>,
        sums: (&mut CudaStorage, usize),
    ) -> Result<()> {
        let problem = MatmulProblem::new(self.op, a.1, b.1)?;
        cuda::add_matmul(self.op, &problem, [a.0, b.0], sums)
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
