//! `softmax(q·kᵀ·scale + mask)·v`: flash attention with gradients, and the f32 output variant.

mod arguments;
mod call;
mod flash;
mod problem;
mod recompute;
#[cfg(test)]
mod tests;

pub(crate) use problem::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants, Mask,
};

use candle_core::{CpuStorage, CudaStorage, Result, Tensor};

use super::{Computed, Op, View, apply, apply_constant};
use crate::{FlashAttnOptions, cpu, cuda};
use call::Call;
use flash::FlashAttention;
use problem::Extras;

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
    if tracked && q.device().is_cuda() {
        arguments::differentiable(op, opts.engine)?;
    }
    let call = Call::new(op, q.dtype(), opts, &extras);
    apply(FlashAttention { call, wants_lse, tracked }, &inputs)
}

/// Attention from f16 to f32 over any broadcast batch dimensions. No gradient.
pub(crate) fn attention_tc(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
    const OP: &str = "kaio_attention_tc";
    arguments::broadcast(OP, [("q", q), ("k", k), ("v", v)])?;
    let [out] = apply_constant(&AttentionTc { causal }, &[q, k, v])?;
    Ok(out)
}

struct AttentionTc {
    causal: bool,
}

impl Op for AttentionTc {
    fn name(&self) -> &'static str {
        "kaio_attention_tc"
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [(q, lq), (k, lk), (v, lv)] = *inputs else { unreachable!("q, k, v") };
        let problem = AttentionProblem::broadcast(lq, lk, lv, self.causal);
        let inputs = AttentionInputs { q, k, v, extras: Extras::default() };
        let out = cpu::attention(&problem, &inputs)?.out;
        Ok(vec![(CpuStorage::F32(out), problem.shape)])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(q, lq), (k, lk), (v, lv)] = *inputs else { unreachable!("q, k, v") };
        let problem = AttentionProblem::broadcast(lq, lk, lv, self.causal);
        let out = cuda::attention_tc(self.name(), &problem, [q, k, v])?;
        Ok(vec![(out, problem.shape)])
    }
}
