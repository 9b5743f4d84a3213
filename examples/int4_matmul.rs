//! A weight in four bits an entry: quantise in groups of 128 rows, multiply, compare with the
//! unquantised product.
//!
//! ```text
//! cargo run --release --example int4_matmul
//! ```

use candle_core::{DType, Device, Result, Tensor};
use kaio_candle::prelude::*;
use kaio_candle::quant::{dequantize_int4, quantize_int4};

fn main() -> Result<()> {
    let device = Device::Cpu;
    let activations = Tensor::randn(0f32, 1.0, (64, 512), &device)?;
    let weight = Tensor::randn(0f32, 0.05, (512, 256), &device)?;
    let exact = activations.matmul(&weight)?;

    let (packed, scales) = quantize_int4(&weight)?;
    let product = activations.to_dtype(DType::F16)?.kaio_matmul_int4(&packed, &scales)?;

    let bytes = |x: &Tensor| x.elem_count() * x.dtype().size_in_bytes();
    println!("weight {:?}: {} bytes of f32", weight.dims(), bytes(&weight));
    println!("packed {:?}: {} bytes, eight nibbles a word along K", packed.dims(), bytes(&packed));
    println!("scales {:?}: {} bytes, one f16 a column and group", scales.dims(), bytes(&scales));
    println!(
        "error of the product, relative to its size: {:.2}%",
        100.0 * relative_error(&product, &exact)?
    );

    let restored = dequantize_int4(&packed, &scales)?;
    println!(
        "error of the restored weight:               {:.2}%",
        100.0 * relative_error(&restored, &weight)?
    );

    // Groups have scales of their own, so a coarse group costs the fine ones nothing.
    let (fine, coarse) = (weight.narrow(0, 0, 384)?, (weight.narrow(0, 384, 128)? * 50.0)?);
    let (packed, scales) = quantize_int4(&Tensor::cat(&[&fine, &coarse], 0)?)?;
    let fine_restored = dequantize_int4(&packed, &scales)?.narrow(0, 0, 384)?;
    let error = relative_error(&fine_restored, &fine)?;
    println!("of its first three groups, the fourth x50:  {:.2}%", 100.0 * error);
    Ok(())
}

/// The root-mean-square error of `x` over the root mean square of `exact`.
fn relative_error(x: &Tensor, exact: &Tensor) -> Result<f32> {
    let error = (x - exact)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
    Ok((error / exact.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
}
