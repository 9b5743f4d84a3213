//! The CPU path: the same functions in f32 (i32 for int8), multi-threaded.
//!
//! It is what a CPU tensor means and what the GPU suites compare with. Operands are widened to f32
//! once; the loops over matrices are `gemm`'s, the threads rayon's.

mod attention;
mod dense;
mod epilogue;
mod exp;
mod gemm;
mod glu;
mod quantized;
mod widen;

pub(crate) use attention::{Attended, attention, attention_backward};
pub(crate) use dense::{matmul, matmul_dense};
pub(crate) use epilogue::epilogue;
pub(crate) use glu::{glu, glu_backward};
pub(crate) use quantized::{dequantize_int4, matmul_int8, widen_int8};
pub(crate) use widen::narrow_to;
