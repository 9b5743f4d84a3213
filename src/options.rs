//! Engines and the options of the `_with` methods.

use candle_core::{DType, Tensor};

/// Who computes on the GPU.
///
/// A CPU tensor is computed by the CPU path under every engine of the release: code written for a GPU
/// runs unchanged on a laptop.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Engine {
    /// The fastest engine that supports the problem: native for matmul, kaio-ops for the rest.
    #[default]
    Auto,
    /// The kernels of the [`kaio-ops`](https://github.com/dmriding/kaio) crate, sm_80 and later.
    KaioOps,
    /// This crate's own kernels, for matmul: [`docs/kernels.md`] says how they work. Naming it in
    /// another op is an error.
    ///
    /// [`docs/kernels.md`]: https://docs.rs/crate/kaio-candle/latest/source/docs/kernels.md
    Native,
}

/// A function of each element of a product, computed in f32.
///
/// An infinity or NaN gives what the formula gives: NaN stays NaN, and −∞ is NaN under all but
/// `Relu`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))` (Hendrycks and Gimpel, 2016): candle's `gelu`.
    GeluTanh,
    /// `x/2 · (1 + erf(x/√2))` (Hendrycks and Gimpel, 2016): candle's `gelu_erf`.
    GeluErf,
    /// `x / (1 + e⁻ˣ)` (Elfwing, Uchibe and Doya, 2017), also called swish: candle's `silu`.
    Silu,
}

/// Options of [`kaio_matmul_with`](crate::KaioTensorExt::kaio_matmul_with), which computes
/// `act(A·B + bias)`: sum, bias and activation in f32, rounded to `out_dtype` once at the end.
///
/// ```
/// use candle_core::DType;
/// use kaio_candle::prelude::*;
///
/// let opts = MatmulOptions::default().out_dtype(DType::BF16).activation(Activation::Silu);
/// ```
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MatmulOptions {
    /// The result's dtype: f32, f16 or bf16. `None` is f32. The sum is in f32 in any case.
    pub out_dtype: Option<DType>,
    /// `[N]`, added to each row; f32 or the operands' dtype, of any stride, on their device.
    ///
    /// It is an input: its gradient is the upstream gradient summed in f32 over all rows of all
    /// batches, in its own dtype.
    pub bias: Option<Tensor>,
    /// Applied to each element after the bias.
    ///
    /// Where no input tracks a gradient it is part of the product's kernel. Where one does, the
    /// product with its bias is kept in f32 until the backward pass (4 bytes for each element of the
    /// result), and candle's own differentiable function follows: the gradient is candle's. Of
    /// `Relu` it is 0 at 0.
    pub activation: Option<Activation>,
    /// Who computes on the GPU.
    pub engine: Engine,
}

impl MatmulOptions {
    /// Sets the result's dtype.
    pub fn out_dtype(mut self, dtype: DType) -> Self {
        self.out_dtype = Some(dtype);
        self
    }

    /// Sets what is added to each row.
    pub fn bias(mut self, bias: Tensor) -> Self {
        self.bias = Some(bias);
        self
    }

    /// Sets what is applied to each element after the bias.
    pub fn activation(mut self, activation: Activation) -> Self {
        self.activation = Some(activation);
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
