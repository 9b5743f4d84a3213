//! `candle_flash_attn::flash_attn` by kaio-candle. All models of candle-transformers 0.11 that have a
//! `use_flash_attn` call this one function of the crate, so that a `[patch.crates-io]` entry that
//! names this directory is all it takes: the models stay as they are.
//!
//! It differs from the crate that it stands in for: it builds without compiling CUTLASS, takes f32 and
//! CPU tensors too, and has a gradient.

use candle_core::{Result, Tensor};
use kaio_candle::prelude::*;

/// `softmax(q·kᵀ·softmax_scale + mask)·v` for q `[B, Sq, Hq, D]`, k and v `[B, Sk, Hkv, D]`, of any
/// strides; a causal mask is aligned bottom-right.
pub fn flash_attn(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    softmax_scale: f32,
    causal: bool,
) -> Result<Tensor> {
    let opts = FlashAttnOptions::default()
        .layout(AttnLayout::Bshd)
        .softmax_scale(softmax_scale)
        .causal(causal);
    q.kaio_flash_attn_with(k, v, &opts)
}
