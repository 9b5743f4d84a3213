//! The CPU path: the same functions in f32 (i32 for int8), multi-threaded.
//!
//! It is what a CPU tensor means and what the GPU suites compare with. Operands are widened to f32, those
//! of products block by block; the loops over matrices are `gemm`'s, the threads rayon's.

mod activation;
mod attention;
mod cross_entropy;
mod embedding;
mod epilogue;
mod exp;
mod gemm;
mod glu;
mod norm;
mod operand;
mod optimizer;
mod product;
mod quantised;
mod rope;
mod simd;
mod softmax;
mod widen;

pub(crate) use activation::{activation, activation_backward};
pub(crate) use attention::{Attended, attention, attention_backward};
pub(crate) use cross_entropy::{add_part, cross_entropy, cross_entropy_backward, reduce_losses};
pub(crate) use embedding::{embedding, embedding_backward};
pub(crate) use epilogue::epilogue;
pub(crate) use glu::{glu, glu_backward};
pub(crate) use norm::{norm, norm_backward};
pub(crate) use optimizer::{AdamWFactors, adamw, adamw_8bit, add, squares, with_floats};
pub(crate) use product::matmul;
pub(crate) use quantised::{
    Activations, dequantize, matmul_fp8, matmul_int8, matmul_quant, quantize_rows,
};
pub(crate) use rope::rope;
pub(crate) use softmax::{softmax, softmax_backward};
pub(crate) use widen::narrow_to;
