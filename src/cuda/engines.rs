//! Which engine computes an op. In a build without the feature `cuda`, where no CUDA tensor exists to call
//! them with, the same functions say that it is missing.
#![cfg_attr(not(feature = "cuda"), allow(unused_variables))]

use candle_core::{CudaStorage, Result};

use super::Operand;
use crate::Engine;
use crate::op::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants, Epilogue, MatmulProblem, View,
};
use crate::options::Gate;
use crate::stack::Stack;

#[cfg(feature = "cuda")]
use {
    super::driver::gpu::{Gpu, has_kernels},
    super::{empty, kaio_ops, native},
    crate::error::Error,
    candle_core::{DType, backend::BackendStorage},
};

/// The body of a function that ops call.
#[cfg(feature = "cuda")]
macro_rules! on_gpu {
    ($body:expr) => {
        $body
    };
}
#[cfg(not(feature = "cuda"))]
macro_rules! on_gpu {
    ($body:expr) => {
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    };
}

/// Whether [`matmul_int4`] takes a weight of `n` columns.
pub(crate) fn takes_int4(n: usize) -> bool {
    // The kernel of kaio-ops 0.5 scales every block of 64 columns with the scales of the first one.
    n <= 64
}

pub(crate) fn matmul(
    op: &'static str,
    problem: &MatmulProblem,
    engine: Engine,
    epilogue: Epilogue,
    a: &CudaStorage,
    b: &CudaStorage,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        if problem.out.elem_count() == 0 || problem.lhs.cols == 0 {
            return empty::matmul(op, problem, epilogue, a, bias);
        }
        match engine {
            Engine::Auto | Engine::Native => native::matmul(op, problem, epilogue, a, b, bias),
            Engine::KaioOps => kaio_ops::matmul(op, problem, epilogue, a, b, bias),
        }
    })
}

pub(crate) fn matmul_int8(
    op: &'static str,
    x: Operand,
    w: Operand,
    scale: f32,
) -> Result<CudaStorage> {
    on_gpu!({
        match empty::product(x, w.1.cols, DType::F32)? {
            Some(zeros) => Ok(zeros),
            None => native::matmul_int8(op, x, w, scale),
        }
    })
}

pub(crate) fn matmul_int4(
    op: &'static str,
    x: Operand,
    w: Operand,
    s: Operand,
) -> Result<CudaStorage> {
    on_gpu!({
        match empty::product(x, w.1.cols, DType::F32)? {
            Some(zeros) => Ok(zeros),
            None => kaio_ops::matmul_int4(op, x, w, s),
        }
    })
}

/// Three products of one input, with weights of equal width.
pub(crate) fn qkv_int8(
    op: &'static str,
    x: Operand,
    weights: &[Operand],
    scales: [f32; 3],
) -> Result<[CudaStorage; 3]> {
    on_gpu!({
        match no_projections(x, weights)? {
            Some(zeros) => Ok(zeros),
            None => kaio_ops::qkv_int8(op, x, weights, scales),
        }
    })
}

pub(crate) fn qkv_int4(
    op: &'static str,
    x: Operand,
    weights: &[Operand],
    scales: &[Operand],
) -> Result<[CudaStorage; 3]> {
    on_gpu!({
        match no_projections(x, weights)? {
            Some(zeros) => Ok(zeros),
            None => kaio_ops::qkv_int4(op, x, weights, scales),
        }
    })
}

#[cfg(feature = "cuda")]
fn no_projections(x: Operand, weights: &[Operand]) -> Result<Option<[CudaStorage; 3]>> {
    let each = || empty::product(x, weights[0].1.cols, DType::F16);
    Ok(match [each()?, each()?, each()?] {
        [Some(q), Some(k), Some(v)] => Some([q, k, v]),
        _ => None,
    })
}

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

/// `act(gate) · up`, packed.
pub(crate) fn glu(op: &'static str, kind: Gate, operands: [Operand; 2]) -> Result<CudaStorage> {
    on_gpu!({
        let [(gate, stack), _] = operands;
        match stack.elements() {
            0 => empty::zeros(gate, 0, gate.dtype()),
            _ => native::glu(op, kind, operands),
        }
    })
}

/// The gradients of gate and up, given both and the result's gradient.
pub(crate) fn glu_backward(
    op: &'static str,
    kind: Gate,
    operands: [Operand; 3],
) -> Result<[CudaStorage; 2]> {
    on_gpu!({
        let [(gate, stack), ..] = operands;
        let zeros = || empty::zeros(gate, 0, gate.dtype());
        match stack.elements() {
            0 => Ok([zeros()?, zeros()?]),
            _ => native::glu_backward(op, kind, operands),
        }
    })
}
