//! Attention of candle's ops, which keeps all scores.

use candle_core::{D, Result, Tensor};

/// `softmax(q·kᵀ/√D + mask)·v`.
pub fn unfused(q: &Tensor, k: &Tensor, v: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
    let scores = (q.matmul(&k.t()?)? * scale)?;
    let scores = match mask {
        Some(mask) => scores.broadcast_add(mask)?,
        None => scores,
    };
    candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(v)
}
