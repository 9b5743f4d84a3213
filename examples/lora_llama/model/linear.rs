//! Products with frozen weights, beside which low-rank matrices learn.

use std::str::FromStr;

use candle_core::{DType, Result, Tensor};
use candle_nn::VarBuilder;
use kaio_candle::prelude::*;

/// How a frozen weight is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// In the activations' dtype.
    Plain,
    Quantised(QuantScheme),
}

impl FromStr for Base {
    type Err = &'static str;

    fn from_str(name: &str) -> std::result::Result<Self, Self::Err> {
        Ok(match name {
            "plain" => Self::Plain,
            "int4" => Self::Quantised(QuantScheme::Int4 { group: 128, zero_points: false }),
            "nf4" => Self::Quantised(QuantScheme::Nf4 { block: 64 }),
            "int8" => Self::Quantised(QuantScheme::Int8 { per: Per::Channel }),
            _ => return Err("expected plain, int4, nf4 or int8"),
        })
    }
}

/// `x·Wᵀ`, and with an adapter `x·Wᵀ + scale · (x·Aᵀ)·Bᵀ` (Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models",
/// 2021).
#[derive(Clone)]
pub struct Linear {
    weight: Weight,
    adapter: Option<Adapter>,
}

#[derive(Clone)]
enum Weight {
    /// `[out, in]`
    Plain(Tensor),
    /// `[in, out]`
    Quantised(QuantWeight),
}

/// Matrices in f32, A `[rank, in]` and B `[out, rank]`.
#[derive(Clone)]
pub struct Adapter {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
}

impl Linear {
    pub fn load(vb: VarBuilder, [from, to]: [usize; 2], base: Base) -> Result<Self> {
        let weight = vb.get((to, from), "weight")?;
        let weight = match base {
            Base::Plain => Weight::Plain(weight),
            Base::Quantised(scheme) => {
                Weight::Quantised(QuantWeight::quantize(&weight.t()?, &scheme)?)
            }
        };
        Ok(Self { weight, adapter: None })
    }

    /// The widths of what it takes and of what it gives.
    pub fn dims(&self) -> Result<[usize; 2]> {
        match &self.weight {
            Weight::Plain(weight) => weight.dims2().map(|(to, from)| [from, to]),
            Weight::Quantised(weight) => Ok(weight.dims2().into()),
        }
    }

    /// Of the frozen weight.
    pub fn bytes(&self) -> usize {
        match &self.weight {
            Weight::Plain(weight) => weight.elem_count() * weight.dtype().size_in_bytes(),
            Weight::Quantised(weight) => weight.bytes(),
        }
    }

    pub fn adapt(&mut self, adapter: Adapter) {
        self.adapter = Some(adapter);
    }

    /// Makes constants of the adapter's matrices.
    pub fn detach(&mut self) {
        for matrix in self.adapter.iter_mut().flat_map(|Adapter { a, b, .. }| [a, b]) {
            *matrix = matrix.detach();
        }
    }

    /// In the dtype of `x`.
    pub fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let frozen = match &self.weight {
            Weight::Plain(weight) => product(x, weight, x.dtype())?,
            Weight::Quantised(weight) => x.kaio_matmul_quant(weight)?,
        };
        let Some(Adapter { a, b, scale }) = &self.adapter else { return Ok(frozen) };
        let low = (product(x, a, x.dtype())? * *scale)?;
        frozen.kaio_add(&product(&low, b, x.dtype())?)
    }
}

/// `x·weightᵀ`. In f32 it is candle's: what this crate multiplies has 16 bits.
pub fn product(x: &Tensor, weight: &Tensor, out_dtype: DType) -> Result<Tensor> {
    if x.dtype() == DType::F32 {
        let rows = x.flatten_to(x.rank() - 2)?.matmul(&weight.t()?)?;
        return rows.reshape([&x.dims()[..x.rank() - 1], &weight.dims()[..1]].concat());
    }
    // Matrices that learn are in f32, and cast on the way.
    let opts = MatmulOptions::default().compute_dtype(x.dtype()).out_dtype(out_dtype);
    x.kaio_matmul_with(&weight.t()?, &opts)
}
