//! The three projections before attention in one call that reads the activations once, with
//! quantised weights.
//!
//! ```text
//! cargo run --release --example fused_qkv
//! ```

use candle_core::{DType, Device, Result, Tensor};
use kaio_candle::prelude::*;
use kaio_candle::quant::{quantize_int4, quantize_int8};

const SEQ: usize = 64;
const WIDTH: usize = 256;
const HEADS: usize = 4;

fn main() -> Result<()> {
    let device = Device::Cpu;
    let x = Tensor::randn(0f32, 1.0, (SEQ, WIDTH), &device)?;
    let weight = || Tensor::randn(0f32, 0.06, (WIDTH, WIDTH), &device);
    let weights = [weight()?, weight()?, weight()?];
    let exact = [x.matmul(&weights[0])?, x.matmul(&weights[1])?, x.matmul(&weights[2])?];
    let exact_attended = attend(&exact)?;
    let x = x.to_dtype(DType::F16)?;

    let [q, k, v] = weights.each_ref().map(quantize_int8);
    let ((q, q_scale), (k, k_scale), (v, v_scale)) = (q?, k?, v?);
    let int8 = x.kaio_qkv_project_int8([&q, &k, &v], [q_scale, k_scale, v_scale])?;

    let [q, k, v] = weights.each_ref().map(quantize_int4);
    let ((q, q_scales), (k, k_scales), (v, v_scales)) = (q?, k?, v?);
    let int4 = x.kaio_qkv_project_int4([&q, &k, &v], [&q_scales, &k_scales, &v_scales])?;

    println!("error relative to f32 weights, in percent");
    println!("weights   q       k       v       attention output");
    for (name, (q, k, v)) in [("int8", int8), ("int4", int4)] {
        let projected = [q, k, v];
        print!("{name:<10}");
        for (x, exact) in projected.iter().zip(&exact) {
            print!("{:<8.2}", 100.0 * relative_error(x, exact)?);
        }
        println!("{:.2}", 100.0 * relative_error(&attend(&projected)?, &exact_attended)?);
    }
    Ok(())
}

/// Causal attention over `[S, H·D]` projections, whose heads are views.
fn attend(qkv: &[Tensor; 3]) -> Result<Tensor> {
    let [q, k, v] = qkv.each_ref().map(|x| x.reshape((SEQ, HEADS, WIDTH / HEADS))?.transpose(0, 1));
    let attended = q?.kaio_flash_attn(&k?, &v?, true)?;
    attended.transpose(0, 1)?.reshape((SEQ, WIDTH))
}

/// The root-mean-square error of `x` over the root mean square of `exact`.
fn relative_error(x: &Tensor, exact: &Tensor) -> Result<f32> {
    let error = (x.to_dtype(DType::F32)? - exact)?.sqr()?.sum_all()?.to_scalar::<f32>()?;
    Ok((error / exact.sqr()?.sum_all()?.to_scalar::<f32>()?).sqrt())
}
