//! The engine `Engine::Native`: this crate's own kernels on candle's stream.

mod activation;
mod attention;
mod attention_backward;
mod bytes;
mod encode;
mod glu;
mod limit;
mod matmul;
mod operand;
mod plan;
mod quantised;
mod quantize;
mod strided;
pub mod tune;
pub(crate) mod w4;

pub(crate) use activation::{activation, activation_backward};
pub(crate) use attention::{flash_attn, limit as flash_limit};
pub(crate) use attention_backward::attention_backward;
pub(crate) use bytes::{matmul_fp8, matmul_int8};
pub(crate) use encode::{encode, peak};
pub(crate) use glu::{glu, glu_backward};
pub(crate) use matmul::matmul;
pub(super) use quantised::{Codewords, Panel};
pub(crate) use quantised::{
    dequantize, matmul_quant, matmul_quant_all, pack_signed, repack, unpack,
};
pub(crate) use quantize::{Rounded, quantize_rows};
pub(crate) use strided::copy;
pub(super) use strided::packed_bytes;
