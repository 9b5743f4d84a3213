//! `softmax(q·kᵀ·scale + mask)·v`: flash attention with gradients, and the f32 output variant.

mod arguments;
mod backward;
mod broadcast;
mod call;
mod flash;
mod problem;
#[cfg(test)]
mod tests;

pub(crate) use problem::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants, Mask,
};

use candle_core::{Result, Tensor};

use super::apply;
#[cfg(feature = "cuda")]
use super::{Differentiable, compute, tensor};
use crate::FlashAttnOptions;
use broadcast::BroadcastAttention;
use call::Call;
use flash::FlashAttention;

/// Attention in the dtype of the inputs, `[S, D]`, `[H, S, D]` or `[B, H, S, D]`.
pub(crate) fn flash_attn(
    op: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    opts: &FlashAttnOptions,
) -> Result<Tensor> {
    let [out] = flash(op, [q, k, v], opts, false)?;
    Ok(out)
}

/// The same, and the log-sum-exp of each query's scores.
pub(crate) fn flash_attn_with_lse(
    op: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    opts: &FlashAttnOptions,
) -> Result<(Tensor, Tensor)> {
    let [out, lse] = flash(op, [q, k, v], opts, true)?;
    Ok((out, lse))
}

fn flash<const N: usize>(
    op: &'static str,
    qkv @ [q, k, v]: [&Tensor; 3],
    opts: &FlashAttnOptions,
    wants_lse: bool,
) -> Result<[Tensor; N]> {
    let extras = arguments::flash(op, [("q", q), ("k", k), ("v", v)], opts)?;
    let inputs = [qkv.as_slice(), &extras.list()].concat();
    let tracked = inputs.iter().any(|t| t.track_op());
    let call = Call::new(op, q.dtype(), opts, &extras);
    apply(FlashAttention { call, wants_lse, tracked }, &inputs)
}

/// What an attention's backward pass gives for gradients of its result and of its log-sum-exp, without candle's
/// graph: those of q, k, v and a tracked bias.
#[cfg(feature = "cuda")]
pub(crate) fn flash_attn_gradients(
    op: &'static str,
    qkv @ [q, k, v]: [&Tensor; 3],
    opts: &FlashAttnOptions,
    grads: [Option<Tensor>; 2],
) -> Result<Vec<Option<Tensor>>> {
    let extras = arguments::flash(op, [("q", q), ("k", k), ("v", v)], opts)?;
    let inputs = [qkv.as_slice(), &extras.list()].concat();
    let call = Call::new(op, q.dtype(), opts, &extras);
    let flash = FlashAttention { call, wants_lse: true, tracked: true };
    let results: Vec<_> = compute(&flash, &inputs)?.into_iter().map(tensor).collect();
    flash.grad(&inputs, &results, &grads)
}

/// Attention from f16 to f32 over any broadcast batch dimensions.
pub(crate) fn attention_tc(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
    const OP: &str = "kaio_attention_tc";
    arguments::broadcast(OP, [("q", q), ("k", k), ("v", v)])?;
    let tracked = [q, k, v].iter().any(|t| t.track_op());
    let [out] = apply(BroadcastAttention { name: OP, causal, tracked }, &[q, k, v])?;
    Ok(out)
}
