//! The engine `Engine::Native`: this crate's own kernels on candle's stream.

mod activation;
mod along_k;
mod attention;
mod attention_backward;
mod bytes;
mod cross_entropy;
mod embedding;
mod encode;
mod glu;
mod limit;
mod matmul;
mod norm;
mod ones;
mod operand;
mod optimizer;
mod plan;
mod quantised;
mod quantize;
mod regroup;
mod rope;
mod softmax;
mod strided;
pub mod tune;
pub(crate) mod w4;

pub(crate) use activation::{activation, activation_backward};
pub(crate) use attention::{flash_attn, limit as flash_limit};
pub(crate) use attention_backward::attention_backward;
pub(crate) use bytes::{matmul_fp8, matmul_int8, matmul_rounded};
pub(crate) use cross_entropy::{
    cross_entropy, cross_entropy_backward, cross_entropy_in_place, reduce_losses,
};
pub(crate) use embedding::{embedding, embedding_backward};
pub(crate) use encode::{encode, peak};
pub(crate) use glu::{glu, glu_backward};
pub(crate) use matmul::{matmul, product_to};
pub(crate) use norm::{norm, norm_backward};
pub(crate) use optimizer::{accumulate, adamw, grad_norm, scale_grads};
pub(super) use quantised::{Codewords, Panel};
pub(crate) use quantised::{
    dequantize, divides, matmul_quant, matmul_quant_all, pack_signed, repack, unpack,
};
pub(crate) use quantize::{Rounded, quantize_rows};
pub(crate) use regroup::{regroup, sum_of_codes};
pub(crate) use rope::rope;
pub(crate) use softmax::softmax;
pub(crate) use strided::copy;
pub(super) use strided::packed_bytes;
pub(super) use w4::Results;
