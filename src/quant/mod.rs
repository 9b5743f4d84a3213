//! From float weights to the integer forms that the quantised products take, and back.
//!
//! # int4 words of other formats
//!
//! A word here is eight nibbles along K, the lowest k the lowest, each two's complement (−8 to 7), with
//! one f16 scale for 128 rows of a column and no zero points. Nothing in a `u32` says so: words of
//! another format are taken as they are and give wrong products.
//!
//! - GPTQ's are unsigned, with zero points, in i32. [`QuantWeight::from_gptq`] takes all of them. If all
//!   zero points mean 8 (a symmetric checkpoint), groups are of 128 rows and rows are in order (no
//!   act-order), the top bit of each nibble is the whole difference.
//! - AWQ's are packed along N in an order of their own: [`QuantWeight::from_awq`].
//!
//! ```
//! # use candle_core::{Device, Tensor};
//! use kaio_candle::quant;
//!
//! let gptq = 0xFEDC_BA98_u32; // 8, 9, .. 15, each minus 8
//! let packed = Tensor::new(&[[gptq ^ 0x8888_8888]], &Device::Cpu)?;
//! let values = quant::unpack_int4(&packed)?.flatten_all()?;
//! assert_eq!(values.to_vec1::<f32>()?, [0., 1., 2., 3., 4., 5., 6., 7.]);
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! All functions run on the tensor's own device and take any layout. The quantisers have no gradient:
//! a tracked input is an error.

mod file;
mod int4;
mod int8;
pub(crate) mod load;
mod order;
pub(crate) mod planes;
pub(crate) mod quantize;
pub(crate) mod scheme;
mod weight;

pub use int4::{dequantize_int4, pack_int4, quantize_int4, unpack_int4};
pub use int8::{dequantize_int8, quantize_int8};
pub use load::{Checkpoint, GptqFormat};
pub use scheme::{Per, QuantScheme};
pub use weight::QuantWeight;
pub(crate) use weight::scales_of;

use candle_core::{DType, Result, Tensor};

use crate::check::{self, Arg};

/// Two's complement: non-negative numbers as they are, negative ones plus `modulus`.
fn wrap(rounded: &Tensor, modulus: f64) -> Result<Tensor> {
    let negative = rounded.lt(0f32)?.to_dtype(DType::F32)?;
    rounded + (negative * modulus)?
}

/// candle's ops, of which the functions here are made, can take a tensor, and matrices of shape `dims`
/// that are made of it, of up to four bytes an element.
fn sizes(op: &'static str, arg: Arg, dims: &[usize]) -> Result<()> {
    check::tensor(op, arg)?;
    Ok(check::made(op, arg, dims)?)
}
