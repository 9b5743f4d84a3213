//! Half-precision matrix multiplication with f32 accumulation, and what each rounding costs.
//!
//! ```text
//! cargo run --release --example matmul
//! ```

use candle_core::{DType, Device, Result, Tensor};
use kaio_candle::prelude::*;

fn main() -> Result<()> {
    let device = Device::Cpu;
    // A batch of left-hand sides against one right-hand side, which is a transposed view. Neither is
    // copied.
    let a = Tensor::randn(0f32, 1.0, (4, 64, 512), &device)?;
    let b = Tensor::randn(0f32, 1.0, (128, 512), &device)?.t()?;
    let exact = product_in_f64(&a, &b)?;
    println!("{:?} x {:?}, entries of about {:.0}", a.dims(), b.dims(), rms(&exact)?);
    println!("largest error against f64    from rounding the inputs    of the product itself");

    for dtype in [DType::F16, DType::BF16] {
        let (a, b) = (a.to_dtype(dtype)?, b.to_dtype(dtype)?);
        let product = a.kaio_matmul_tc(&b)?;

        // The same rounded inputs, multiplied in f64, separate the two causes.
        let of_rounded = product_in_f64(&a, &b)?;
        let from_inputs = largest_difference(&of_rounded, &exact)?;
        let of_product = largest_difference(&product.to_dtype(DType::F64)?, &of_rounded)?;
        println!("{:<29}{from_inputs:<27.1e}{of_product:.1e}", dtype.as_str());
    }
    Ok(())
}

fn product_in_f64(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    a.to_dtype(DType::F64)?.broadcast_matmul(&b.to_dtype(DType::F64)?)
}

fn rms(x: &Tensor) -> Result<f64> {
    x.sqr()?.mean_all()?.sqrt()?.to_scalar()
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f64> {
    (a - b)?.abs()?.max_all()?.to_scalar()
}
