//! Causal grouped-query attention and its gradients, compared with the same formula in separate
//! candle operations.
//!
//! ```text
//! cargo run --release --example flash_attention
//! ```

use candle_core::{D, DType, Device, Result, Tensor, Var};
use candle_nn::ops::softmax;
use kaio_candle::prelude::*;

const BATCH: usize = 2;
const QUERY_HEADS: usize = 8;
const KEY_HEADS: usize = 2;
const SEQ: usize = 128;
const DIM: usize = 64;

fn main() -> Result<()> {
    let device = Device::Cpu;
    let q = Tensor::randn(0f32, 1.0, (BATCH, QUERY_HEADS, SEQ, DIM), &device)?;
    let k = Tensor::randn(0f32, 1.0, (BATCH, KEY_HEADS, SEQ, DIM), &device)?;
    let v = k.randn_like(0.0, 1.0)?;
    // Any loss would do; this one gives each output a gradient of its own.
    let weights = q.randn_like(0.0, 1.0)?;

    println!("largest difference from unfused f32 attention");
    println!("dtype    output     dq         dk         dv");
    for dtype in [DType::F32, DType::F16, DType::BF16] {
        let inputs = [&q, &k, &v].map(|x| x.to_dtype(dtype));
        let [q, k, v] = inputs.map(|x| Var::from_tensor(&x?));
        let (q, k, v) = (q?, k?, v?);

        let fused = q.kaio_flash_attn(&k, &v, true)?.to_dtype(DType::F32)?;
        // The casts are part of the graph, so both gradients arrive at the same variables.
        let unfused = attention(
            &q.to_dtype(DType::F32)?,
            &k.to_dtype(DType::F32)?,
            &v.to_dtype(DType::F32)?,
        )?;
        let fused_grads = (&fused * &weights)?.sum_all()?.backward()?;
        let unfused_grads = (&unfused * &weights)?.sum_all()?.backward()?;

        print!("{:<9}{:<11.1e}", dtype.as_str(), largest_difference(&fused, &unfused)?);
        for var in [&q, &k, &v] {
            if let (Some(a), Some(b)) = (fused_grads.get(var), unfused_grads.get(var)) {
                print!("{:<11.1e}", largest_difference(a, b)?);
            }
        }
        println!();
    }
    let kib = |elements: usize| BATCH * QUERY_HEADS * elements * size_of::<f32>() / 1024;
    let (scores, kept) = (kib(SEQ * SEQ), kib(SEQ));
    println!(
        "kept for the backward pass: {scores} KiB unfused (probabilities), {kept} KiB fused (log-sum-exps)"
    );
    Ok(())
}

/// `softmax(q·kᵀ/√D + mask)·v`, with every key head repeated for the query heads that share it.
fn attention(q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
    let repeat = |x: &Tensor| {
        let shape = (BATCH, KEY_HEADS, QUERY_HEADS / KEY_HEADS, SEQ, DIM);
        x.unsqueeze(2)?.broadcast_as(shape)?.reshape((BATCH, QUERY_HEADS, SEQ, DIM))
    };
    let scores = (q.matmul(&repeat(k)?.t()?)? / (DIM as f64).sqrt())?;
    let visible = Tensor::tril2(SEQ, DType::U8, q.device())?.broadcast_as(scores.shape())?;
    let hidden = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(scores.shape())?;
    softmax(&visible.where_cond(&scores, &hidden)?, D::Minus1)?.matmul(&repeat(v)?)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    let difference = (a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?;
    difference.abs()?.max_all()?.to_scalar()
}
