//! Inputs and our results of some problems in one file, for who compares them with others' results.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor, safetensors};
use kaio_candle::prelude::*;

use super::common::Result;

/// Positions, heads.
const LENGTH: usize = 2048;
const HEADS: usize = 8;

/// Tensors `NAME/q`, `/k`, `/v` and `/out`, `[1, H, S, D]`.
pub fn run(device: &Device, path: &Path) -> Result<()> {
    let mut all = HashMap::new();
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for dim in [64, 128, 256] {
            let random =
                || Tensor::randn(0f32, 1., (1, HEADS, LENGTH, dim), device)?.to_dtype(dtype);
            let (q, k, v) = (random()?, random()?, random()?);
            for (mask, causal) in [("full", false), ("causal", true)] {
                let name = format!("{} D{dim} {mask}", dtype.as_str());
                let out = q.kaio_flash_attn(&k, &v, causal)?;
                for (what, tensor) in [("q", &q), ("k", &k), ("v", &v), ("out", &out)] {
                    all.insert(format!("{name}/{what}"), tensor.clone());
                }
            }
        }
    }
    safetensors::save(&all, path)?;
    println!("wrote {}", path.display());
    Ok(())
}
