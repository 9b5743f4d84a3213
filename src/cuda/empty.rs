//! Problems without elements or without terms to sum, for which no kernel is launched.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::scalar::Scalar;
use candle_core::{CudaStorage, DType, Layout, Result, Shape};

use super::epilogue;
use crate::op::{
    AttentionInputs, AttentionProblem, AttentionResults, AttentionWants, Epilogue, MatmulProblem,
    View,
};

/// Zeros, for a result that no kernel writes.
pub(super) fn zeros(like: &CudaStorage, len: usize, dtype: DType) -> Result<CudaStorage> {
    like.device.zeros_impl(&Shape::from(len), dtype)
}

/// `len` times a number, in f32.
pub(super) fn full(like: &CudaStorage, len: usize, value: f32) -> Result<CudaStorage> {
    let mut out = zeros(like, len, DType::F32)?;
    if len > 0 && value != 0.0 {
        out.const_set(Scalar::F32(value), &Layout::contiguous(len))?;
    }
    Ok(out)
}

/// The result and log-sum-exp of a problem without elements in its result, or without keys. Its gradients
/// need nothing of the forward pass.
pub(super) fn flash_attn(
    p: &AttentionProblem,
    wants: AttentionWants,
    inputs: &AttentionInputs<CudaStorage>,
    attend: impl FnOnce(
        &AttentionProblem,
        &AttentionInputs<CudaStorage>,
    ) -> Result<AttentionResults<CudaStorage>>,
) -> Result<AttentionResults<CudaStorage>> {
    let AttentionInputs { q, k, ref extras, .. } = *inputs;
    let rows = p.q.count() * p.seq_q();
    let lse = match wants.lse {
        false => None,
        // Without columns of v the scores are still there: any matrix stands in for it.
        true if p.has_scores() => {
            let out = p.q.packed();
            let scores = AttentionProblem { v: p.k.clone(), out, ..p.clone() };
            attend(&scores, &AttentionInputs { q, k, v: k, extras: extras.clone() })?.lse
        }
        true => Some(full(q, rows, f32::NEG_INFINITY)?),
    };
    Ok(AttentionResults { out: zeros(q, p.out.elements(), p.out_dtype)?, lse, stats: None })
}

/// A product without elements, or one with K = 0: zeros, to which the bias is added.
pub(super) fn matmul(
    op: &'static str,
    problem: &MatmulProblem,
    epilogue: Epilogue,
    a: &CudaStorage,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    match problem.out.elem_count() {
        0 => zeros(a, 0, epilogue.out_dtype),
        len => {
            let sums = zeros(a, len, DType::F32)?;
            epilogue::apply(op, sums, (len, problem.rhs.cols), bias, epilogue)
        }
    }
}
