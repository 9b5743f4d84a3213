//! The two operations in which the trained model and its reference differ.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::ops::softmax;
use kaio_candle::prelude::*;

/// Who multiplies matrices and attends.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// This crate, in bf16. The weights stay f32: casting them is part of the graph, so their
    /// gradients are f32 too.
    Kaio(Attention),
    /// candle's own operations, in f32.
    Reference,
}

/// Who attends where this crate multiplies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// This crate. Deterministic gradients are the same bits on every run.
    Kaio { deterministic: bool },
    /// candle's own operations, in f32.
    Candle,
}

impl Arithmetic {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kaio(Attention::Kaio { deterministic: false }) => "kaio-candle bf16",
            Self::Kaio(Attention::Kaio { deterministic: true }) => "kaio-candle bf16 deterministic",
            Self::Kaio(Attention::Candle) => "kaio-candle bf16 with candle's attention",
            Self::Reference => "candle f32",
        }
    }

    /// `x · weight` for x `[.., K]` and weight `[K, N]`, as f32.
    pub fn linear(self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        self.product(x, weight, DType::F32)
    }

    /// The same product, in the dtype that `attention` takes.
    pub fn projection(self, x: &Tensor, weight: &Tensor) -> Result<Tensor> {
        self.product(x, weight, DType::BF16)
    }

    fn product(self, x: &Tensor, weight: &Tensor, dtype: DType) -> Result<Tensor> {
        match self {
            Self::Kaio(_) => {
                let opts = MatmulOptions::default().out_dtype(dtype);
                x.to_dtype(DType::BF16)?.kaio_matmul_with(&weight.to_dtype(DType::BF16)?, &opts)
            }
            Self::Reference => {
                // One product of rank 2: candle would repeat the weight for every batch.
                let (rows, n) = (x.flatten_to(D::Minus2)?, weight.dim(1)?);
                let mut shape = x.dims().to_vec();
                shape[x.rank() - 1] = n;
                rows.matmul(weight)?.reshape(shape)
            }
        }
    }

    /// Causal self-attention over `[B, S, H, D]`.
    pub fn attention(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kaio(Attention::Kaio { deterministic }) => {
                let opts = FlashAttnOptions::default().causal(true).layout(AttnLayout::Bshd);
                q.kaio_flash_attn_with(k, v, &opts.deterministic(deterministic))
            }
            Self::Kaio(Attention::Candle) | Self::Reference => {
                let heads_first =
                    |x: &Tensor| x.to_dtype(DType::F32)?.transpose(1, 2)?.contiguous();
                let (q, k, v) = (heads_first(q)?, heads_first(k)?, heads_first(v)?);
                let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
                let scores = (q.matmul(&k.t()?)? * scale)?;
                let visible = Tensor::tril2(q.dim(2)?, DType::U8, q.device())?;
                let hidden = Tensor::new(f32::NEG_INFINITY, q.device())?;
                let scores = visible
                    .broadcast_as(scores.shape())?
                    .where_cond(&scores, &hidden.broadcast_as(scores.shape())?)?;
                softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(1, 2)
            }
        }
    }
}
