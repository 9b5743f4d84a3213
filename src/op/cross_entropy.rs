//! Cross-entropy of logits with the indices of classes, with a gradient.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::{Computed, Differentiable, Op, View, apply, eval};
use crate::error::Error;
use crate::options::{CrossEntropyOptions, Reduction};
use crate::stack::Stack;
use crate::{check, cpu, cuda};

/// What is computed of each row, checked.
#[derive(Clone, Copy, Debug)]
pub(crate) struct RowLoss {
    pub ignore_index: i64,
    pub smoothing: f32,
    pub z_loss: f32,
    pub softcap: Option<f32>,
}

impl RowLoss {
    pub(super) fn new(op: &'static str, opts: &CrossEntropyOptions) -> Result<Self> {
        let &CrossEntropyOptions { ignore_index, label_smoothing, z_loss, softcap, .. } = opts;
        let refuse = |name, got: f32, want: &str, fix| {
            let (got, want) = (got.to_string(), want.into());
            Err(Error::Value { op, name, got, want, fix }.into())
        };
        if !(0.0..=1.0).contains(&label_smoothing) {
            return refuse("label_smoothing", label_smoothing, "0 to 1", "it is a probability");
        }
        if !(z_loss.is_finite() && z_loss >= 0.0) {
            let want = "a finite number of at least 0";
            return refuse("z_loss", z_loss, want, "leave it out for none");
        }
        if let Some(cap) = softcap.filter(|cap| !(cap.is_finite() && *cap > 0.0)) {
            return refuse("softcap", cap, "a finite number above 0", "leave it out for none");
        }
        Ok(Self { ignore_index, smoothing: label_smoothing, z_loss, softcap })
    }
}

/// The rows' losses, and what the gradient of all of them begins with.
pub(crate) struct RowLosses<S> {
    /// f32, one for each row, or what they were reduced to.
    pub loss: S,
    /// Of each row its largest logit and the logarithm of the sum of all exponentials over that one's, f32.
    pub stats: S,
    /// What the gradient of each counted row is multiplied with, f32: of a mean, 1 over their number.
    pub share: S,
}

/// Targets of the rows of logits or hidden states: u32 or i64, of their shape without the last dimension.
pub(super) fn check_targets(
    op: &'static str,
    targets: &Tensor,
    (arg, rows): check::Arg,
) -> Result<()> {
    let t = ("targets", targets);
    check::untracked(op, &[t])?;
    check::dtype(op, t, &[DType::U32, DType::I64])?;
    let (got, want) = (targets.dims(), &rows.dims()[..rows.rank() - 1]);
    let why = format_args!("one less than the rank of `{arg}` {:?}", rows.dims());
    let fix = "give one target for each row";
    check::dim(op, "targets", ("rank", got.len()), (want.len(), why), fix)?;
    match std::iter::zip(got, want).find(|(got, want)| got != want) {
        None => Ok(()),
        Some((&dim, &want)) => {
            let why = format_args!("in {got:?}, as `{arg}` {:?}", rows.dims());
            Ok(check::dim(op, "targets", ("a dimension", dim), (want, why), fix)?)
        }
    }
}

/// Indices without gaps, one after the other.
pub(super) fn packed(op: &'static str, (arg, t): check::Arg) -> Result<Tensor> {
    if t.elem_count() == 0 {
        return Tensor::zeros(0, t.dtype(), t.device());
    }
    if !t.is_contiguous() {
        check::made(op, (arg, t), t.dims())?;
    }
    t.flatten_all()?.contiguous()
}

/// The cross-entropy of `logits [.., V]` with `targets [..]`.
pub(crate) fn cross_entropy(
    logits: &Tensor,
    targets: &Tensor,
    opts: &CrossEntropyOptions,
) -> Result<Tensor> {
    let op = "kaio_cross_entropy";
    let args @ [l, _] = [("logits", logits), ("targets", targets)];
    check::tensors(op, &args)?;
    check::dtype(op, l, &check::FLOATS)?;
    check::rank(op, l, 1..=usize::MAX, "[.., V]", "give a score for each class")?;
    check_targets(op, targets, l)?;
    let row_loss = RowLoss::new(op, opts)?;
    if let Some(dtype) = opts.compute_dtype {
        let (got, want) = (dtype.as_str().into(), "none, for nothing is multiplied".into());
        let fix = "see `kaio_linear_cross_entropy`";
        return Err(Error::Value { op, name: "compute_dtype", got, want, fix }.into());
    }
    if logits.device().is_cpu() {
        check::memory(op, "`logits`", logits.dims(), DType::F32)?;
    }
    // As matrices, of which a vector is one row.
    let rows = if logits.rank() == 1 { logits.unsqueeze(0)? } else { logits.clone() };
    let out = match opts.reduction {
        Reduction::None => targets.shape().clone(),
        Reduction::Mean | Reduction::Sum => Shape::from(()),
    };
    let call = CrossEntropy { op, row_loss, reduction: opts.reduction, out };
    let [loss] = apply(call, &[&rows, &packed(op, ("targets", targets))?])?;
    Ok(loss)
}

/// Inputs: logits and targets. Results: the loss; saved: what normalises each row, and the share.
struct CrossEntropy {
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    out: Shape,
}

impl CrossEntropy {
    fn results<S>(&self, rows: usize, of: RowLosses<S>) -> Vec<Computed<S>> {
        let RowLosses { loss, stats, share } = of;
        vec![(loss, self.out.clone()), (stats, (rows, 2).into()), (share, 1.into())]
    }
}

impl Op for CrossEntropy {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [logits, targets] = *inputs else { unreachable!("logits and targets") };
        let Self { op, row_loss, reduction, .. } = *self;
        let of = cpu::cross_entropy(op, row_loss, reduction, logits, targets)?;
        Ok(self.results(targets.1.shape().elem_count(), of))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(logits, at), targets] = *inputs else { unreachable!("logits and targets") };
        let Self { op, row_loss, reduction, .. } = *self;
        let stack = Stack::new(at);
        let of = cuda::cross_entropy(op, row_loss, reduction, (logits, &stack), targets)?;
        Ok(self.results(targets.1.shape().elem_count(), of))
    }
}

impl Differentiable for CrossEntropy {
    fn differentiates(&self, input: usize) -> bool {
        input == 0
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// `(softmax(z) · (1 + 2 · z_loss · lse) − smoothed one-hot) · dz/dlogit · upstream`, from the logits and what
    /// was saved of each row.
    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None; 2]) };
        let [logits, targets] = *inputs else { unreachable!("logits and targets") };
        if logits.elem_count() == 0 {
            return Ok(vec![Some(logits.zeros_like()?), None]);
        }
        let [_, stats, share] = results else { unreachable!("a loss and what is saved") };
        let grad = grad.flatten_all()?.contiguous()?;
        let gradient = Gradient { op: self.op, row_loss: self.row_loss };
        let [of_logits] = eval(&gradient, &[logits, targets, stats, share, &grad])?;
        Ok(vec![Some(of_logits), None])
    }
}

/// Inputs: logits, targets, what was saved, and the upstream gradient of each row or of all. Result: the gradient
/// of the logits.
struct Gradient {
    op: &'static str,
    row_loss: RowLoss,
}

/// What the gradient of logits is made of, beside them.
pub(crate) struct Upstream<'a, S> {
    pub stats: View<'a, S>,
    pub share: View<'a, S>,
    /// One for each row, or one for all.
    pub grad: View<'a, S>,
}

fn upstream<'a, S>(inputs: &[View<'a, S>]) -> Upstream<'a, S> {
    let [stats, share, grad] = *inputs else { unreachable!("what was saved and a gradient") };
    Upstream { stats, share, grad }
}

impl Op for Gradient {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [logits, targets] = [inputs[0], inputs[1]];
        let upstream = upstream(&inputs[2..]);
        let out = cpu::cross_entropy_backward(self.op, self.row_loss, logits, targets, &upstream)?;
        Ok(vec![(out, logits.1.shape().clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(logits, at), targets] = [inputs[0], inputs[1]];
        let (stack, upstream) = (Stack::new(at), upstream(&inputs[2..]));
        let logits = (logits, &stack);
        let out = cuda::cross_entropy_backward(self.op, self.row_loss, logits, targets, &upstream)?;
        Ok(vec![(out, at.shape().clone())])
    }
}

/// Where the elements of a view without gaps are.
pub(crate) fn span(layout: &Layout) -> std::ops::Range<usize> {
    match layout.shape().elem_count() {
        0 => 0..0,
        len => layout.start_offset()..layout.start_offset() + len,
    }
}
