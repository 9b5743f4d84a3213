//! The operations in which the trained model and its reference differ.

use candle_core::{D, DType, Result, Tensor};
use candle_nn::{loss::cross_entropy, ops, rotary_emb};
use kaio_candle::{prelude::*, train};

const NORM_EPSILON: f32 = 1e-5;

/// A product's weight `[K, N]`, and what is added to each row.
pub struct Linear {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// A gain for each column, and what is added after it.
pub struct Norm {
    pub kind: NormKind,
    pub gain: Tensor,
    pub bias: Option<Tensor>,
}

#[derive(Clone, Copy)]
pub enum NormKind {
    Layer,
    RootMeanSquare,
}

/// Who computes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Arithmetic {
    /// This crate, in bf16; its optimizer has f32 copies of the weights. Deterministic gradients are the same bits on
    /// every run.
    Kaio { deterministic: bool },
    /// candle's own operations, in f32.
    Reference,
}

impl Arithmetic {
    pub fn name(self) -> &'static str {
        match self {
            Self::Kaio { deterministic: false } => "kaio-candle bf16",
            Self::Kaio { deterministic: true } => "kaio-candle bf16 deterministic",
            Self::Reference => "candle f32",
        }
    }

    /// What matrices and all between the operations are in.
    pub fn dtype(self) -> DType {
        match self {
            Self::Kaio { .. } => DType::BF16,
            Self::Reference => DType::F32,
        }
    }

    /// What `f` gives, between whose operations gradients are moved rather than added to zeros.
    pub fn block<T: train::Outputs>(self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        match self {
            Self::Kaio { .. } => train::block(|_| f(), &[]),
            Self::Reference => f(),
        }
    }

    /// `x · weight + bias`
    pub fn linear(self, x: &Tensor, linear: &Linear) -> Result<Tensor> {
        match self {
            Self::Kaio { .. } => x.kaio_matmul_with(&linear.weight, &options(linear)),
            Self::Reference => {
                let y = flat_matmul(x, &linear.weight)?;
                linear.bias.as_ref().map_or(Ok(y.clone()), |bias| y.broadcast_add(bias))
            }
        }
    }

    /// `gelu(x · weight + bias)`
    pub fn linear_gelu(self, x: &Tensor, linear: &Linear) -> Result<Tensor> {
        match self {
            Self::Kaio { .. } => {
                let opts = options(linear).activation(Activation::GeluTanh);
                x.kaio_matmul_with(&linear.weight, &opts)
            }
            Self::Reference => self.linear(x, linear)?.gelu(),
        }
    }

    /// `silu(gate) · up`
    pub fn swiglu(self, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kaio { .. } => gate.kaio_swiglu(up),
            Self::Reference => gate.silu()? * up,
        }
    }

    pub fn norm(self, x: &Tensor, norm: &Norm) -> Result<Tensor> {
        let Norm { kind, gain, bias } = norm;
        match (self, kind) {
            (Self::Kaio { .. }, NormKind::Layer) => {
                x.kaio_layer_norm(gain, bias.as_ref(), NORM_EPSILON)
            }
            (Self::Kaio { .. }, NormKind::RootMeanSquare) => x.kaio_rms_norm(gain, NORM_EPSILON),
            // The fast functions of these names have no gradient.
            (Self::Reference, NormKind::Layer) => {
                let bias = bias.as_ref().map_or_else(|| gain.zeros_like(), |bias| Ok(bias.clone()));
                ops::layer_norm_slow(x, gain, &bias?, NORM_EPSILON)
            }
            (Self::Reference, NormKind::RootMeanSquare) => {
                ops::rms_norm_slow(x, gain, NORM_EPSILON)
            }
        }
    }

    /// The normalised sum of both, and the sum.
    pub fn add_norm(self, x: &Tensor, residual: &Tensor, norm: &Norm) -> Result<(Tensor, Tensor)> {
        let Norm { kind, gain, bias } = norm;
        match (self, kind) {
            (Self::Kaio { .. }, NormKind::Layer) => {
                x.kaio_add_layer_norm(residual, gain, bias.as_ref(), NORM_EPSILON)
            }
            (Self::Kaio { .. }, NormKind::RootMeanSquare) => {
                x.kaio_add_rms_norm(residual, gain, NORM_EPSILON)
            }
            (Self::Reference, _) => {
                let sum = (residual + x)?;
                Ok((self.norm(&sum, norm)?, sum))
            }
        }
    }

    /// A row of the table `[V, dim]` for each of the ids.
    pub fn embedding(self, table: &Tensor, ids: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kaio { .. } => table.kaio_embedding(ids),
            Self::Reference => {
                let rows = table.index_select(&ids.flatten_all()?, 0)?;
                rows.reshape([ids.dims(), &table.dims()[1..]].concat())
            }
        }
    }

    /// Turns the heads of `[B, S, H, D]` by their positions' angles.
    pub fn rope(self, x: &Tensor, [cos, sin]: &[Tensor; 2]) -> Result<Tensor> {
        let x = x.transpose(1, 2)?;
        let turned = match self {
            Self::Kaio { .. } => x.kaio_rope(cos, sin, RopeLayout::Halves)?,
            Self::Reference => rotary_emb::rope_slow(&x.contiguous()?, cos, sin)?,
        };
        turned.transpose(1, 2)
    }

    /// Causal self-attention over `[B, S, H, D]`.
    pub fn attention(self, q: &Tensor, k: &Tensor, v: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kaio { deterministic } => {
                let opts = FlashAttnOptions::default().causal(true).layout(AttnLayout::Bshd);
                q.kaio_flash_attn_with(k, v, &opts.deterministic(deterministic))
            }
            Self::Reference => {
                let heads_first = |x: &Tensor| x.transpose(1, 2)?.contiguous();
                let shared = q.dim(2)? / k.dim(2)?;
                let repeated = |x: &Tensor| {
                    let x = heads_first(x)?;
                    let (batch, heads, rows, width) = x.dims4()?;
                    let groups =
                        x.unsqueeze(2)?.broadcast_as((batch, heads, shared, rows, width))?;
                    groups.contiguous()?.reshape((batch, heads * shared, rows, width))
                };
                let (q, k, v) = (heads_first(q)?, repeated(k)?, repeated(v)?);
                let scale = 1.0 / (q.dim(D::Minus1)? as f64).sqrt();
                let scores = (q.matmul(&k.t()?)? * scale)?;
                let visible = Tensor::tril2(q.dim(2)?, DType::U8, q.device())?;
                let hidden = Tensor::new(f32::NEG_INFINITY, q.device())?;
                let scores = visible
                    .broadcast_as(scores.shape())?
                    .where_cond(&scores, &hidden.broadcast_as(scores.shape())?)?;
                ops::softmax(&scores, D::Minus1)?.matmul(&v)?.transpose(1, 2)
            }
        }
    }

    /// `x · tableᵀ` in f32, for a table `[V, dim]`.
    pub fn logits(self, x: &Tensor, table: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kaio { .. } => x.kaio_matmul_tc(&table.t()?),
            Self::Reference => flat_matmul(x, &table.t()?),
        }
    }

    /// The mean cross entropy of these logits with the targets.
    pub fn loss(self, x: &Tensor, table: &Tensor, targets: &Tensor) -> Result<Tensor> {
        match self {
            Self::Kaio { .. } => {
                x.kaio_linear_cross_entropy(table, targets, &CrossEntropyOptions::default())
            }
            Self::Reference => cross_entropy(&self.logits(x, table)?, targets),
        }
    }
}

fn options(linear: &Linear) -> MatmulOptions {
    let opts = MatmulOptions::default().out_dtype(DType::BF16);
    match &linear.bias {
        Some(bias) => opts.bias(bias.clone()),
        None => opts,
    }
}

/// One product of rank 2: candle would repeat the weight for every batch.
fn flat_matmul(x: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, n) = (x.flatten_to(D::Minus2)?, weight.dim(1)?);
    let mut shape = x.dims().to_vec();
    shape[x.rank() - 1] = n;
    rows.matmul(weight)?.reshape(shape)
}
