//! Both sides of a product as signed bytes: quantise, multiply in integers, compare with the
//! unquantised product.
//!
//! ```text
//! cargo run --release --example int8_matmul
//! ```

use candle_core::{DType, Device, Result, Tensor};
use kaio_candle::prelude::*;
use kaio_candle::quant::{dequantize_int8, quantize_int8};

fn main() -> Result<()> {
    let device = Device::Cpu;
    let activations = Tensor::randn(0f32, 1.0, (64, 512), &device)?;
    let weight = Tensor::randn(0f32, 0.05, (512, 256), &device)?;
    let exact = activations.matmul(&weight)?;

    let (a, a_scale) = quantize_int8(&activations)?;
    let (w, w_scale) = quantize_int8(&weight)?;
    // One scale a tensor, so their product belongs to every entry of the result.
    let product = a.kaio_matmul_int8(&w, a_scale * w_scale)?;

    println!("scales: activations {a_scale:.5}, weight {w_scale:.5}");
    println!(
        "error of the product, relative to its size: {:.2}%",
        100.0 * relative_error(&product, &exact)?
    );

    // The sums are exact, so all of that error was made when quantising.
    let of_bytes = dequantize_int8(&a, a_scale)?.matmul(&dequantize_int8(&w, w_scale)?)?;
    println!(
        "of that, not from quantising:               {:.1e}%",
        100.0 * relative_error(&product, &of_bytes)?
    );

    // The scale follows the largest magnitude: outliers take the resolution from all other entries.
    let outlier = Tensor::new(&[100f32], &device)?.pad_with_zeros(0, 0, 511)?.unsqueeze(0)?;
    let spiked = activations.broadcast_add(&outlier)?;
    let (s, s_scale) = quantize_int8(&spiked)?;
    let spiked_product = s.kaio_matmul_int8(&w, s_scale * w_scale)?;
    let error = relative_error(&spiked_product, &spiked.matmul(&weight)?)?;
    println!("with one column of outliers of 100:         {:.1}%", 100.0 * error);

    let (from, to) = (weight.elem_count() * DType::F32.size_in_bytes(), w.elem_count());
    println!("the weight shrank from {from} to {to} bytes");
    Ok(())
}

/// The root-mean-square error of `x` over the root mean square of `exact`.
fn relative_error(x: &Tensor, exact: &Tensor) -> Result<f32> {
    let error = (x - exact)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
    Ok((error / exact.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
}
