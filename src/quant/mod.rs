//! From float weights to the integer forms that the quantised products take, and back.
//!
//! All functions run on the tensor's own device and take any layout. The quantisers have no gradient:
//! a tracked input is an error.

mod int4;
mod int8;

pub(crate) use int4::dequantize;
pub use int4::{dequantize_int4, pack_int4, quantize_int4, unpack_int4};
pub use int8::{dequantize_int8, quantize_int8};

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
    let what = format_args!("what is made of `{}`,", arg.0);
    check::size(op, what, dims, DType::F32)?;
    match arg.1.device().is_cpu() {
        true => check::memory(op, what, dims, DType::F32)?,
        false => check::copyable(op, dims.iter().product())?,
    }
    Ok(())
}
