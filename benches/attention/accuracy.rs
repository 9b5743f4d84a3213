//! Inputs and our results of some problems in one file, for who compares them with others' results.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, Var, safetensors};
use kaio_candle::prelude::*;
use kaio_candle::tune::FlashAttnBackward;

use super::common::Result;

/// Positions, heads.
const LENGTH: usize = 2048;
const HEADS: usize = 8;

/// Tensors `NAME/q`, `/k`, `/v` and `/out`, `[1, H, S, D]`.
pub fn results(device: &Device, path: &Path) -> Result<()> {
    let mut all = HashMap::new();
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for dim in [64, 128, 256] {
            let random = || random(device, dtype, [HEADS, LENGTH, dim]);
            let (q, k, v) = (random()?, random()?, random()?);
            for (mask, causal) in MASKS {
                let name = format!("{} D{dim} {mask}", dtype.as_str());
                let out = q.kaio_flash_attn(&k, &v, causal)?;
                for (what, tensor) in [("q", &q), ("k", &k), ("v", &v), ("out", &out)] {
                    all.insert(format!("{name}/{what}"), tensor.clone());
                }
            }
        }
    }
    save(&all, path)
}

/// Tensors `NAME/q`, `/k`, `/v`, the upstream gradient `/grad`, and of our default and of our deterministic
/// backward pass `/default/dq`, `/deterministic/dq` and so on. The inputs are the same on each run.
pub fn gradients(device: &Device, path: &Path) -> Result<()> {
    const HALF: usize = LENGTH / 2;
    device.set_seed(16)?;
    let square = |dim| ([HEADS, HEADS], [LENGTH, LENGTH], dim);
    let cases = [
        ("D64", square(64), MASKS.as_slice()),
        ("D96", square(96), &MASKS),
        ("D128", square(128), &MASKS),
        ("D256", square(256), &MASKS),
        ("D128, 8 heads on 2", ([HEADS, 2], [LENGTH, LENGTH], 128), &MASKS),
        // PyTorch's causal masks of these are refused or aligned at the first key.
        ("D128, 1024 queries of 2048 keys", ([HEADS, HEADS], [HALF, LENGTH], 128), &MASKS[..1]),
        ("D128, 2048 queries of 1024 keys", ([HEADS, HEADS], [LENGTH, HALF], 128), &MASKS[..1]),
    ];
    let mut all = HashMap::new();
    for dtype in [DType::BF16, DType::F16] {
        for (what, ([heads, kv_heads], [queries, keys], dim), masks) in cases {
            let var = |heads, length| {
                let random = random(device, dtype, [heads, length, dim])?;
                Ok::<_, candle_core::Error>(Var::from_tensor(&random)?.into_inner())
            };
            let inputs = [var(heads, queries)?, var(kv_heads, keys)?, var(kv_heads, keys)?];
            let grad = random(device, dtype, [heads, queries, dim])?;
            for &(mask, causal) in masks {
                let name = format!("{} {what} {mask}", dtype.as_str());
                let mut keep = |what: &str, tensor: &Tensor| {
                    all.insert(format!("{name}/{what}"), tensor.detach());
                };
                let [q, k, v] = &inputs;
                for (what, tensor) in [("q", q), ("k", k), ("v", v), ("grad", &grad)] {
                    keep(what, tensor);
                }
                for (who, deterministic) in [("default", false), ("deterministic", true)] {
                    let opts = FlashAttnOptions::default().causal(causal);
                    let opts = opts.deterministic(deterministic);
                    let gradients = FlashAttnBackward::new([q, k, v], &opts)?.run(&grad)?;
                    for (of, gradient) in ["dq", "dk", "dv"].into_iter().zip(gradients) {
                        keep(&format!("{who}/{of}"), &gradient.ok_or("a gradient is missing")?);
                    }
                }
            }
        }
    }
    save(&all, path)
}

const MASKS: [(&str, bool); 2] = [("full", false), ("causal", true)];

fn random(
    device: &Device,
    dtype: DType,
    [heads, length, dim]: [usize; 3],
) -> candle_core::Result<Tensor> {
    Tensor::randn(0f32, 1., (1, heads, length, dim), device)?.to_dtype(dtype)
}

fn save(all: &HashMap<String, Tensor>, path: &Path) -> Result<()> {
    safetensors::save(all, path)?;
    println!("wrote {}", path.display());
    Ok(())
}
