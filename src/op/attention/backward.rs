//! From the gradient of an attention's result, and of its log-sum-exp, to those of its operands: by loops on the
//! CPU, by kernels on a GPU. Both rebuild the probabilities block by block (FlashAttention-2, Dao 2023,
//! algorithm 2).

use candle_core::op::BackpropOp;
use candle_core::{DType, Layout, Result, Shape, Storage, Tensor};

use super::super::{View, cast, on_cpu, on_cuda};
use super::problem::{AttentionGrads, AttentionInputs, AttentionProblem, AttentionUpstream};
use crate::stack::Stack;
use crate::{cpu, cuda};

/// How an op's inputs make a problem.
pub(super) trait Attends {
    /// The method that the user called.
    fn name(&self) -> &'static str;

    /// Whether gradients have to be the same from run to run, to the last bit.
    fn deterministic(&self) -> bool;

    /// The facts and the storages of the inputs in their order.
    fn read<'a, S>(&self, views: &[View<'a, S>]) -> (AttentionProblem, AttentionInputs<'a, S>);

    /// The matrices of a tensor that has a row for each query or key, in the problem's order.
    fn matrices(&self, layout: &Layout) -> Stack;

    /// Elements in the problem's order, without gaps, as a tensor of that shape.
    fn back(&self, t: &Tensor, shape: &Shape) -> Result<Tensor>;
}

/// What a backward pass begins with.
#[derive(Clone, Copy)]
pub(super) struct Upstream<'a> {
    pub out: &'a Tensor,
    pub grad: &'a Tensor,
    /// Of the log-sum-exp.
    pub lse_grad: Option<&'a Tensor>,
    /// What the forward pass saved of each row.
    pub stats: [&'a Tensor; 2],
}

/// The gradients of q, k and v, in these shapes, and of a bias.
pub(super) fn gradients(
    op: &impl Attends,
    inputs: &[&Tensor],
    upstream: Upstream,
    shapes: [&Shape; 3],
    bias: Option<&Tensor>,
) -> Result<AttentionGrads<Tensor>> {
    let q = inputs[0];
    let with_column = |t: &Tensor| t.contiguous()?.unsqueeze(t.rank());
    let lse_grad = upstream.lse_grad.map(with_column).transpose()?;
    // Tensor cores multiply it with the operands.
    let grad = match q.device().is_cpu() {
        true => upstream.grad.clone(),
        false => cast(upstream.grad, q.dtype())?,
    };
    let [a, b] = upstream.stats;
    let after = [upstream.out, &grad, a, b].into_iter().chain(&lse_grad);
    let guards: Vec<_> =
        inputs.iter().copied().chain(after).map(|t| t.storage_and_layout()).collect();
    let bias_dims = bias.map(|bias| bias.dims());
    let tensor = |storage, shape: &Shape| {
        Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false)
    };
    if let Storage::Cpu(_) = &*guards[0].0 {
        let (problem, operands, upstream) = read(op, &on_cpu(op.name(), &guards)?, inputs.len());
        let grads = cpu::attention_backward(&problem, &operands, &upstream, bias_dims)?;
        let narrowed = |grad: Vec<f32>, dtype: DType, shape: &Shape| {
            let storage = Storage::Cpu(cpu::narrow_to(dtype, grad)?);
            Ok::<_, candle_core::Error>(tensor(storage, shape))
        };
        let matrices = |grad: Vec<f32>, shape: &Shape| {
            op.back(&narrowed(grad, q.dtype(), &shape.elem_count().into())?, shape)
        };
        let bias = grads.bias.zip(bias);
        return Ok(AttentionGrads {
            q: matrices(grads.q, shapes[0])?,
            k: matrices(grads.k, shapes[1])?,
            v: matrices(grads.v, shapes[2])?,
            bias: bias.map(|(grad, t)| narrowed(grad, t.dtype(), t.shape())).transpose()?,
        });
    }
    let (problem, operands, upstream) = read(op, &on_cuda(op.name(), &guards)?, inputs.len());
    let places = shapes.map(|shape| op.matrices(&Layout::contiguous(shape)));
    let grads = cuda::attention_backward(
        op.name(),
        &problem,
        op.deterministic(),
        &operands,
        &upstream,
        places.each_ref(),
        bias_dims,
    )?;
    let bias = grads.bias.zip(bias);
    Ok(AttentionGrads {
        q: tensor(Storage::Cuda(grads.q), shapes[0]),
        k: tensor(Storage::Cuda(grads.k), shapes[1]),
        v: tensor(Storage::Cuda(grads.v), shapes[2]),
        bias: bias.map(|(grad, t)| tensor(Storage::Cuda(grad), t.shape())),
    })
}

/// The storages of the inputs, and of what follows them.
fn read<'a, S>(
    op: &impl Attends,
    views: &[View<'a, S>],
    inputs: usize,
) -> (AttentionProblem, AttentionInputs<'a, S>, AttentionUpstream<'a, S>) {
    let (own, after) = views.split_at(inputs);
    let (problem, operands) = op.read(own);
    let lse_grad = after.get(4).map(|&(grad, at)| {
        let stack = Stack::new(at);
        (grad, stack.with_batch_dims(problem.q.batch().len()))
    });
    let upstream = AttentionUpstream {
        out: after[0].0,
        grad: (after[1].0, op.matrices(after[1].1)),
        stats: [after[2].0, after[3].0],
        lse_grad,
    };
    (problem, operands, upstream)
}
