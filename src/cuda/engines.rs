//! Which engine computes an op. In a build without the feature `cuda`, where no CUDA tensor exists to call
//! them with, the same functions say that it is missing.
#![cfg_attr(not(feature = "cuda"), allow(unused_variables))]

use candle_core::{CudaStorage, Result};

use super::Operand;
use crate::Engine;
use crate::op::{
    AttentionInputs, AttentionProblem, AttentionResults, AttentionWants, Epilogue, MatmulProblem,
    View,
};
use crate::options::Gate;

#[cfg(feature = "cuda")]
use {
    super::driver::gpu::has_kernels,
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
            None => kaio_ops::matmul_int8(op, x, w, scale),
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

/// Attention from f16 to f32, over any batch dimensions.
pub(crate) fn attention_tc(
    op: &'static str,
    problem: &AttentionProblem,
    inputs: [&CudaStorage; 3],
) -> Result<CudaStorage> {
    on_gpu!({
        let [q, k, v] = inputs;
        let inputs = AttentionInputs { q, k, v, extras: Default::default() };
        let wants = AttentionWants { lse: false, stats: false };
        match !problem.is_empty() && takes(op, problem, &inputs)? {
            true => native::attention_tc(op, problem, &inputs),
            false => Ok(flash_attn(op, problem, Engine::KaioOps, wants, &inputs)?.out),
        }
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

/// The result, and what is wanted besides.
pub(crate) fn flash_attn(
    op: &'static str,
    problem: &AttentionProblem,
    engine: Engine,
    wants: AttentionWants,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<AttentionResults<CudaStorage>> {
    on_gpu!({
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
