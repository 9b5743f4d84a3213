//! Attention.

use candle_core::{CudaStorage, Result};

use crate::Engine;
use crate::op::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants,
};
use crate::stack::Stack;

#[cfg(feature = "cuda")]
use {
    super::super::driver::gpu::{Gpu, has_kernels},
    super::super::{empty, kaio_ops, native},
    crate::error::Error,
    candle_core::backend::BackendStorage,
};

/// Whether [`Engine::Auto`] is native: what is older than the kernels still has those of kaio-ops.
#[cfg(feature = "cuda")]
fn takes(
    op: &'static str,
    problem: &AttentionProblem,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<bool> {
    Ok(native::flash_limit(problem).is_none() && has_kernels(op, inputs.q.device())?)
}

/// The result, and what is wanted besides, over two batch dimensions or, where heads share no keys and nothing
/// else has them, any.
pub(crate) fn flash_attn(
    op: &'static str,
    problem: &AttentionProblem,
    engine: Engine,
    wants: AttentionWants,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<AttentionResults<CudaStorage>> {
    on_gpu!({
        if wants.stats {
            differentiable(op, problem, engine, inputs)?;
        }
        if problem.is_empty() {
            return empty::flash_attn(problem, wants, inputs, |scores, inputs| {
                let wants = AttentionWants { lse: true, stats: false };
                flash_attn(op, scores, engine, wants, inputs)
            });
        }
        let native = match engine {
            Engine::KaioOps => false,
            Engine::Auto => takes(op, problem, inputs)?,
            Engine::Native => match native::flash_limit(problem) {
                None => true,
                Some((what, fix)) => {
                    let (engine, limit) = ("Engine::Native".into(), format!("cannot take {what}"));
                    let fix = fix.into();
                    return Err(Error::Unsupported { op, what: engine, limit, fix }.into());
                }
            },
        };
        match native {
            true => native::flash_attn(op, problem, wants, inputs),
            false => kaio_ops::flash_attn(op, problem, wants.lse, inputs),
        }
    })
}

/// An input tracks a gradient: native kernels have a backward pass, those of kaio-ops have none.
#[cfg(feature = "cuda")]
fn differentiable(
    op: &'static str,
    problem: &AttentionProblem,
    engine: Engine,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<()> {
    let refuse = |what: &str, limit: String, fix: &str| {
        let (what, fix) = (what.into(), fix.into());
        Err(Error::Unsupported { op, what, limit, fix }.into())
    };
    match engine {
        Engine::KaioOps => refuse(
            "Engine::KaioOps",
            "has no backward pass of attention, and an input tracks a gradient".into(),
            "leave the engine to `Engine::Auto`, which has one, or `.detach()` the inputs",
        ),
        // It says itself what it cannot take.
        Engine::Native => Ok(()),
        Engine::Auto => {
            // Old GPUs are refused as such.
            Gpu::of(op, inputs.q.device())?;
            match native::flash_limit(problem) {
                None => Ok(()),
                Some((what, fix)) => {
                    refuse("this crate", format!("cannot differentiate attention of {what}"), fix)
                }
            }
        }
    }
}

/// The gradients of q, k and v, which lie as `places` says, each in a storage that has no other elements, and of
/// a bias of shape `bias` (up to `[B, Hq, Sq, Sk]`), packed. The problem is not empty, and [`flash_attn`] took it.
pub(crate) fn attention_backward(
    op: &'static str,
    problem: &AttentionProblem,
    deterministic: bool,
    inputs: &AttentionInputs<CudaStorage>,
    upstream: &AttentionUpstream<CudaStorage>,
    places: [&Stack; 3],
    bias: Option<&[usize]>,
) -> Result<AttentionGrads<CudaStorage>> {
    on_gpu!(native::attention_backward(op, problem, deterministic, inputs, upstream, places, bias))
}
