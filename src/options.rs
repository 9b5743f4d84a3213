//! Engines and the options of the `_with` methods.

use candle_core::DType;

/// Who computes on the GPU.
///
/// A CPU tensor is computed by the CPU path under every engine of the release: code written for a GPU
/// runs unchanged on a laptop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// The fastest engine that supports the problem.
    #[default]
    Auto,
    /// The kernels of the [`kaio-ops`](https://github.com/dmriding/kaio) crate, sm_80 and later.
    KaioOps,
    /// This crate's own kernels. Not in this release: naming it is an error.
    Native,
}

/// Options of [`kaio_matmul_with`](crate::KaioTensorExt::kaio_matmul_with).
///
/// ```
/// use candle_core::DType;
/// use kaio_candle::prelude::*;
///
/// let opts = MatmulOptions::default().out_dtype(DType::BF16).engine(Engine::KaioOps);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MatmulOptions {
    /// The result's dtype: f32, f16 or bf16. `None` is f32. The sum is in f32 in any case.
    pub out_dtype: Option<DType>,
    /// Who computes on the GPU.
    pub engine: Engine,
}

impl MatmulOptions {
    /// Sets the result's dtype.
    pub fn out_dtype(mut self, dtype: DType) -> Self {
        self.out_dtype = Some(dtype);
        self
    }

    /// Sets who computes on the GPU.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }
}

/// Options of [`kaio_flash_attn_with`](crate::KaioTensorExt::kaio_flash_attn_with).
///
/// ```
/// use kaio_candle::prelude::*;
///
/// let opts = FlashAttnOptions::default().causal(true).softmax_scale(0.1);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct FlashAttnOptions {
    /// Query `i` of `Sq` sees the keys `j` with `j - Sk <= i - Sq`: the last query sees all keys.
    pub causal: bool,
    /// The factor on `q·kᵀ`. `None` is `1/√D`.
    pub softmax_scale: Option<f32>,
    /// Who computes on the GPU.
    pub engine: Engine,
}

impl FlashAttnOptions {
    /// Sets whether later keys are hidden from earlier queries.
    pub fn causal(mut self, causal: bool) -> Self {
        self.causal = causal;
        self
    }

    /// Sets the factor on `q·kᵀ`; it must be finite.
    pub fn softmax_scale(mut self, scale: f32) -> Self {
        self.softmax_scale = Some(scale);
        self
    }

    /// Sets who computes on the GPU.
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }
}
