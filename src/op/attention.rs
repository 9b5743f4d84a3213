//! `softmax(q·kᵀ·scale + mask)·v`: flash attention with gradients, and the f32 output variant.

use std::sync::OnceLock;

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::{Differentiable, Node, Op, View, check, eval};
use crate::{
    FlashAttnOptions, cpu, cuda,
    error::Error,
    stack::{Stack, batch_dims, broadcast_batch},
};

/// Attention in the dtype of the inputs, `[S, D]`, `[H, S, D]` or `[B, H, S, D]`.
pub(crate) fn flash_attn(
    op: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    opts: &FlashAttnOptions,
) -> Result<Tensor> {
    let args = [("q", q), ("k", k), ("v", v)];
    check::one_device(op, &args)?;
    check::dtype(op, args[0], &[DType::F16, DType::BF16, DType::F32])?;
    for arg in args {
        check::same_dtype(op, arg, args[0])?;
        let fix = "reshape it, or use `.unsqueeze(..)?`";
        check::rank(op, arg, 2..=4, "[S, D], [H, S, D] or [B, H, S, D]", fix)?;
    }
    for arg in &args[1..] {
        check::dim(
            op,
            arg.0,
            ("rank", arg.1.rank()),
            (q.rank(), "the rank of `q`"),
            "add the missing dimensions with `.unsqueeze(..)?`",
        )?;
    }
    check_matrices(op, args)?;
    if q.rank() == 4 {
        for (arg, t) in &args[1..] {
            let why = "the batch of `q`";
            check::dim(
                op,
                arg,
                ("B", t.dims()[0]),
                (q.dims()[0], why),
                "expand a batch of 1 with `.broadcast_as(..)?`",
            )?;
        }
    }
    if q.rank() > 2 {
        let heads = |t: &Tensor| t.dims()[t.rank() - 3];
        let (hq, hkv) = (heads(q), heads(k));
        check::dim(
            op,
            "v",
            ("heads", heads(v)),
            (hkv, "the heads of `k`"),
            "give `v` as many heads as `k`",
        )?;
        if hq != 0 && (hkv == 0 || hq % hkv != 0) {
            return Err(Error::Dimension {
                op,
                arg: "k",
                dim: "heads",
                got: hkv,
                want: format!("a divisor of {hq}, the heads of `q`"),
                fix: "equally many query heads share a key head: repeat or drop key heads".into(),
            }
            .into());
        }
    }
    if let Some(scale) = opts.softmax_scale {
        check::finite(op, "softmax_scale", scale)?;
    }
    check::engine(op, opts.engine)?;
    let flash = FlashAttention {
        name: op,
        causal: opts.causal,
        scale: opts.softmax_scale,
        keep_lse: args.iter().any(|(_, t)| t.track_op()),
        lse: OnceLock::new(),
    };
    q.apply_op3(k, v, Node(flash))
}

/// Attention from f16 to f32 over any broadcast batch dimensions. No gradient.
pub(crate) fn attention_tc(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
    const OP: &str = "kaio_attention_tc";
    let args = [("q", q), ("k", k), ("v", v)];
    check::one_device(OP, &args)?;
    for arg in args {
        check::dtype(OP, arg, &[DType::F16])?;
        check::rank(
            OP,
            arg,
            2..=usize::MAX,
            "[.., S, D]",
            "add a dimension with `.unsqueeze(0)?`",
        )?;
    }
    check_matrices(OP, args)?;
    check::batch(OP, args[1], args[0])?;
    check::batch(OP, args[2], args[1])?;
    check::batch(OP, args[2], args[0])?;
    check::untracked(OP, &args)?;
    eval(&AttentionTc { causal }, &[q, k, v])
}

/// `q [.., Sq, D]`, `k [.., Sk, D]`, `v [.., Sk, Dv]` belong together.
fn check_matrices(op: &'static str, [q, k, v]: [check::Arg; 3]) -> Result<()> {
    let dims = |(_, t): check::Arg| (t.dims()[t.rank() - 2], t.dims()[t.rank() - 1]);
    let ((_, d), (sk, dk), (sv, _)) = (dims(q), dims(k), dims(v));
    let fix = "give heads a dimension of their own with `.reshape(..)?` and `.transpose(..)?`";
    check::dim(op, "k", ("D", dk), (d, "the head dimension of `q`"), fix)?;
    check::dim(op, "v", ("Sk", sv), (sk, "the keys of `k`"), "give `v` one row for each key")?;
    if d == 0 {
        return Err(Error::Dimension {
            op,
            arg: "q",
            dim: "D",
            got: 0,
            want: "at least 1".into(),
            fix: "give `q` and `k` at least one column".into(),
        }
        .into());
    }
    Ok(())
}

/// The facts of one attention: stacks of matrices, of which `group` query matrices in turn share
/// one key and value matrix.
pub(crate) struct AttentionProblem {
    pub q: Stack,
    pub k: Stack,
    pub v: Stack,
    pub group: usize,
    pub causal: bool,
    /// The factor on `q·kᵀ`.
    pub scale: f32,
    /// `[.., Sq, Dv]`.
    pub out: Shape,
}

impl AttentionProblem {
    fn new(q: &Layout, k: &Layout, v: &Layout, causal: bool, scale: Option<f32>) -> Self {
        let dims = q.dims();
        let (rows, d, dv) = (dims.len() - 2, dims[dims.len() - 1], v.dims()[v.dims().len() - 1]);
        let (q, k, v) = (Stack::new(q), Stack::new(k), Stack::new(v));
        Self {
            group: q.count() / k.count().max(1),
            causal,
            scale: scale.unwrap_or(1.0 / (d as f32).sqrt()),
            out: Shape::from([&dims[..=rows], &[dv]].concat()),
            q,
            k,
            v,
        }
    }

    /// The same over batch dimensions that are broadcast.
    fn broadcast(q: &Layout, k: &Layout, v: &Layout, causal: bool) -> Self {
        let batch = [k, v].iter().fold(batch_dims(q.dims()).to_vec(), |batch, layout| {
            broadcast_batch(&batch, batch_dims(layout.dims()))
                .expect("checked before the op was made")
        });
        let problem = Self::new(q, k, v, causal, None);
        let (q, k, v) =
            (problem.q.broadcast(&batch), problem.k.broadcast(&batch), problem.v.broadcast(&batch));
        let out = Shape::from([batch.as_slice(), &[q.rows, v.cols]].concat());
        Self { q, k, v, out, group: 1, ..problem }
    }

    pub fn seq_q(&self) -> usize {
        self.q.rows
    }

    pub fn seq_k(&self) -> usize {
        self.k.rows
    }

    pub fn head_dim(&self) -> usize {
        self.q.cols
    }

    pub fn value_dim(&self) -> usize {
        self.v.cols
    }

    /// Whether there is nothing to compute: the result has no elements, or no key is visible.
    pub fn is_empty(&self) -> bool {
        self.out.elem_count() == 0 || self.seq_k() == 0
    }
}

struct FlashAttention {
    name: &'static str,
    causal: bool,
    scale: Option<f32>,
    keep_lse: bool,
    /// f32 `[heads, Sq]`: the natural log-sum-exp of each row's scores; not read for rows without keys.
    lse: OnceLock<Tensor>,
}

impl FlashAttention {
    fn problem(&self, [q, k, v]: [&Layout; 3]) -> AttentionProblem {
        AttentionProblem::new(q, k, v, self.causal, self.scale)
    }

    fn keep(&self, problem: &AttentionProblem, lse: Storage) {
        if self.keep_lse {
            let shape = (problem.q.count(), problem.seq_q());
            let lse = Tensor::from_storage(lse, shape, BackpropOp::none(), false);
            self.lse.set(lse).expect("a node runs forward once");
        }
    }
}

impl Op for FlashAttention {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let [(q, lq), (k, lk), (v, lv)] = *inputs else { unreachable!("q, k, v") };
        let problem = self.problem([lq, lk, lv]);
        let (out, lse) = cpu::attention(&problem, q, k, v)?;
        self.keep(&problem, Storage::Cpu(CpuStorage::F32(lse)));
        Ok((cpu::narrow_to(q.dtype(), out)?, problem.out))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let [(q, lq), (k, lk), (v, lv)] = *inputs else { unreachable!("q, k, v") };
        let problem = self.problem([lq, lk, lv]);
        let (out, lse) = cuda::flash_attn(self.name, &problem, self.keep_lse, [q, k, v])?;
        if let Some(lse) = lse {
            self.keep(&problem, Storage::Cuda(lse));
        }
        Ok((out, problem.out))
    }
}

impl Differentiable for FlashAttention {
    /// Recomputes the probabilities block by block from the kept log-sum-exp
    /// (FlashAttention-2, Dao 2023, algorithm 2).
    fn grad(&self, inputs: &[&Tensor], out: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let [q, k, v] = *inputs else { unreachable!("q, k, v") };
        let lse = self.lse.get().expect("kept because an input is tracked");
        let backward =
            FlashAttentionBackward { name: self.name, causal: self.causal, scale: self.scale };
        // One flat result holds the three gradients in turn.
        let flat = eval(&backward, &[q, k, v, out, grad, lse])?;
        let mut start = 0;
        let mut part = |t: &Tensor| {
            let len = t.elem_count();
            let part = flat.narrow(0, start, len)?.reshape(t.shape())?;
            start += len;
            Ok::<_, candle_core::Error>(part)
        };
        let parts = [part(q)?, part(k)?, part(v)?];
        Ok(std::iter::zip(inputs, parts).map(|(t, part)| t.track_op().then_some(part)).collect())
    }
}

/// Inputs: q, k, v, out, the gradient of out, log-sum-exp. Result: dq, dk and dv in a row.
struct FlashAttentionBackward {
    name: &'static str,
    causal: bool,
    scale: Option<f32>,
}

impl Op for FlashAttentionBackward {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let [(q, lq), (k, lk), (v, lv), out, grad, (lse, _)] = *inputs else {
            unreachable!("six inputs")
        };
        let problem = AttentionProblem::new(lq, lk, lv, self.causal, self.scale);
        let grads = cpu::attention_backward(&problem, [q, k, v], out, grad, lse.as_slice()?)?;
        let shape = Shape::from(grads.len());
        Ok((cpu::narrow_to(q.dtype(), grads)?, shape))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let [(q, lq), (k, lk), (v, lv), out, grad, (lse, _)] = *inputs else {
            unreachable!("six inputs")
        };
        let problem = AttentionProblem::new(lq, lk, lv, self.causal, self.scale);
        let grads = cuda::flash_attn_backward(self.name, &problem, [q, k, v], out, grad, lse)?;
        let shape = Shape::from(
            lq.shape().elem_count() + lk.shape().elem_count() + lv.shape().elem_count(),
        );
        Ok((grads, shape))
    }
}

struct AttentionTc {
    causal: bool,
}

impl Op for AttentionTc {
    fn name(&self) -> &'static str {
        "kaio_attention_tc"
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let [(q, lq), (k, lk), (v, lv)] = *inputs else { unreachable!("q, k, v") };
        let problem = AttentionProblem::broadcast(lq, lk, lv, self.causal);
        let (out, _) = cpu::attention(&problem, q, k, v)?;
        Ok((CpuStorage::F32(out), problem.out))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let [(q, lq), (k, lk), (v, lv)] = *inputs else { unreachable!("q, k, v") };
        let problem = AttentionProblem::broadcast(lq, lk, lv, self.causal);
        let out = cuda::attention_tc(self.name(), &problem, [q, k, v])?;
        Ok((out, problem.out))
    }
}
