//! `softmax(q·kᵀ·scale + mask)·v`: flash attention with gradients, and the f32 output variant.

mod alone;
mod arguments;
mod backward;
mod broadcast;
mod call;
mod flash;
mod problem;
#[cfg(test)]
mod tests;

pub use alone::FlashAttnBackward;
pub(crate) use problem::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants, Mask,
};

use candle_core::{Result, Tensor};

use super::apply;
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
    qkv: [&Tensor; 3],
    opts: &FlashAttnOptions,
    wants_lse: bool,
) -> Result<[Tensor; N]> {
    let (op, inputs) = prepare(op, qkv, opts, wants_lse)?;
    apply(op, &inputs.iter().collect::<Vec<_>>())
}

/// The op of a checked call, and its inputs.
fn prepare(
    op: &'static str,
    qkv @ [q, k, v]: [&Tensor; 3],
    opts: &FlashAttnOptions,
    wants_lse: bool,
) -> Result<(FlashAttention, Vec<Tensor>)> {
    let extras = arguments::flash(op, [("q", q), ("k", k), ("v", v)], opts)?;
    let inputs = [qkv.as_slice(), &extras.list()].concat();
    let tracked = inputs.iter().any(|t| t.track_op());
    let call = Call::new(op, q.dtype(), opts, &extras);
    let inputs = inputs.into_iter().cloned().collect();
    Ok((FlashAttention { call, wants_lse, tracked }, inputs))
}

/// Attention from f16 to f32 over any broadcast batch dimensions.
pub(crate) fn attention_tc(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
    const OP: &str = "kaio_attention_tc";
    arguments::broadcast(OP, [("q", q), ("k", k), ("v", v)])?;
    let tracked = [q, k, v].iter().any(|t| t.track_op());
    let [out] = apply(BroadcastAttention { name: OP, causal, tracked }, &[q, k, v])?;
    Ok(out)
}
