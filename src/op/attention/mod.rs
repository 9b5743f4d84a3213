//! `softmax(q·kᵀ·scale + mask)·v`: flash attention with gradients, and the f32 output variant.

mod arguments;
mod call;
mod flash;
mod problem;
mod recompute;
#[cfg(test)]
mod tests;

pub(crate) use problem::{AttentionInputs, AttentionProblem, AttentionUpstream, Mask};

use std::sync::{Arc, OnceLock};

use candle_core::{CpuStorage, CudaStorage, Result, Shape, Tensor};

use super::{Op, View, apply, eval};
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
    Ok(flash(op, [q, k, v], opts, false)?.0)
}

/// The same, and the log-sum-exp of each query's scores.
pub(crate) fn flash_attn_with_lse(
    op: &'static str,
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    opts: &FlashAttnOptions,
) -> Result<(Tensor, Tensor)> {
    let (out, lse) = flash(op, [q, k, v], opts, true)?;
    Ok((out, lse.get().expect("kept because it was asked for").clone()))
}

fn flash(
    op: &'static str,
    qkv @ [q, k, v]: [&Tensor; 3],
    opts: &FlashAttnOptions,
    wants_lse: bool,
) -> Result<(Tensor, Arc<OnceLock<Tensor>>)> {
    let extras = arguments::flash(op, [("q", q), ("k", k), ("v", v)], opts)?;
    let inputs = [qkv.as_slice(), &extras.list()].concat();
    let lse = Arc::new(OnceLock::new());
    let flash = FlashAttention {
        call: Call::new(op, q.dtype(), opts, &extras),
        keeps_lse: wants_lse || inputs.iter().any(|t| t.track_op()),
        lse: lse.clone(),
    };
    Ok((apply(flash, &inputs)?, lse))
}

/// Attention from f16 to f32 over any broadcast batch dimensions. No gradient.
pub(crate) fn attention_tc(q: &Tensor, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
    const OP: &str = "kaio_attention_tc";
    arguments::broadcast(OP, [("q", q), ("k", k), ("v", v)])?;
    eval(&AttentionTc { causal }, &[q, k, v])
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
        let inputs = AttentionInputs { q, k, v, extras: Extras::default() };
        let (out, _) = cpu::attention(&problem, &inputs)?;
        Ok((CpuStorage::F32(out), problem.shape))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let [(q, lq), (k, lk), (v, lv)] = *inputs else { unreachable!("q, k, v") };
        let problem = AttentionProblem::broadcast(lq, lk, lv, self.causal);
        let out = cuda::attention_tc(self.name(), &problem, [q, k, v])?;
        Ok((out, problem.shape))
    }
}
