//! Which engine computes an op.

use candle_core::{CudaStorage, Result};

pub(crate) use super::kaio_ops::{
    attention_tc, flash_attn, flash_attn_backward, matmul_int4, matmul_int8, qkv_int4, qkv_int8,
};
use super::{kaio_ops, native};
use crate::Engine;
use crate::op::{Epilogue, MatmulProblem, View};

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
    match engine {
        Engine::Auto | Engine::Native if problem.out.elem_count() > 0 && problem.lhs.cols > 0 => {
            native::matmul(op, problem, epilogue, a, b, bias)
        }
        // An empty product is zeros, to which candle's kernels add the bias.
        _ => kaio_ops::matmul(op, problem, epilogue, a, b, bias),
    }
}
