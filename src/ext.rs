//! The methods: what each means, and below that who computes it.
//!
//! They are one trait because one import brings all of them, and a trait is one item: so its manual is one file.

use candle_core::{Result, Tensor};

use crate::op::{self, QkvWeights};
use crate::options::Gate;
use crate::quant::QuantWeight;
use crate::{
    CrossEntropyOptions, FlashAttnOptions, Fp8Options, Int8Options, MatmulOptions, RopeLayout,
};

mod sealed {
    use candle_core::Tensor;

    pub trait Sealed: AsRef<Tensor> {}
    impl Sealed for Tensor {}
}

/// The ops of this crate as methods of [`candle_core::Tensor`].
///
/// On a CPU tensor each method runs this crate's CPU path, on a CUDA tensor the kernels of an
/// [`Engine`](crate::Engine), on the tensor's own device; nothing is moved. `..` stands for any
/// number of batch dimensions, broadcast as NumPy does. Views (transposed, narrowed, broadcast,
/// strided) are accepted; on a GPU, one that the kernel cannot read is copied once inside the call. A dimension of size zero gives an empty result, a sum over
/// nothing gives zeros. Inputs are never modified.
///
/// The trait is sealed: only `Tensor` has these methods.
///
/// # Errors
///
/// Each method checks its arguments before it allocates or launches anything; what it returns then
/// is a [`kaio_candle::Error`](crate::Error), which [`Error::of`](crate::Error::of) takes out of the
/// candle error. Messages name `self` by its role, as the tables do: `lhs`, `q`, `x`. The sections below name what each method refuses.
pub trait KaioTensorExt: sealed::Sealed {
    /// Matrix product `A·B` with f32 sums and an f32 result.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`lhs`) | `[.., M, K]` | f16 or bf16 |
    /// | `rhs` | `[.., K, N]` | the same |
    /// | result | `[.., M, N]` | f32 |
    ///
    /// A `rhs` without batch dimensions is shared by all batches of `self` and never repeated in memory.
    ///
    /// # Gradient
    ///
    /// Both inputs, in their dtype, summed in f32. f16 gradients too large or too small for f16 on
    /// the way through the kernel are scaled, not lost.
    ///
    /// # Errors
    ///
    /// Other dtypes, rank under 2, unequal K, batch dimensions that do not broadcast, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor};
    /// use kaio_candle::prelude::*;
    ///
    /// let a = Tensor::new(&[[1f32, 2.], [3., 4.]], &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// let c = a.kaio_matmul_tc(&a.t()?)?;
    /// assert_eq!(c.to_vec2::<f32>()?, [[5., 11.], [11., 25.]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_tc(&self, rhs: &Tensor) -> Result<Tensor> {
        op::matmul("kaio_matmul_tc", self.as_ref(), rhs, &MatmulOptions::default())
    }

    /// [`kaio_matmul_tc`](Self::kaio_matmul_tc) under its other name in kaio-candle 0.2, which had a second,
    /// asynchronous kernel. All kernels load while they compute now, so that nothing differs.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let a = Tensor::ones((3, 16), DType::F16, &Device::Cpu)?;
    /// let c = a.kaio_matmul_tc_async(&a.t()?)?;
    /// assert_eq!(c.sum_all()?.to_scalar::<f32>()?, 9. * 16.);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_tc_async(&self, rhs: &Tensor) -> Result<Tensor> {
        op::matmul("kaio_matmul_tc_async", self.as_ref(), rhs, &MatmulOptions::default())
    }

    /// `act(A·B + bias)`: [`kaio_matmul_tc`](Self::kaio_matmul_tc) with an optional bias and
    /// activation and a choice of result dtype and engine.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`lhs`) | `[.., M, K]` | f16 or bf16 |
    /// | `rhs` | `[.., K, N]` | the same |
    /// | both, with a `compute_dtype` of f16 or bf16 | the same | f32, f16 or bf16 each; multiplied in that |
    /// | `bias` of [`MatmulOptions`] | `[N]`, of any stride | what is multiplied, or f32 |
    /// | result | `[.., M, N]` | `out_dtype`: f32, f16 or bf16 |
    ///
    /// The sum, the bias and the activation are in f32; the result is rounded once, but before the
    /// activation too where an input tracks a gradient: see [`MatmulOptions::activation`].
    ///
    /// # Gradient
    ///
    /// Both operands and the bias, each in its dtype, summed in f32, through the activation by one kernel.
    ///
    /// # Errors
    ///
    /// Also a `compute_dtype` other than f16 and bf16, an `out_dtype` other than f32, f16 and bf16, a bias of another dtype, rank or length or
    /// on another device, and an engine that cannot take the problem.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let a = Tensor::ones((2, 5, 8), DType::BF16, &Device::Cpu)?;
    /// let w = Tensor::ones((8, 4), DType::BF16, &Device::Cpu)?;
    /// let c = a.kaio_matmul_with(&w, &MatmulOptions::default().out_dtype(DType::BF16))?;
    /// assert_eq!((c.dims(), c.dtype()), ([2, 5, 4].as_slice(), DType::BF16));
    ///
    /// // A layer: bias and activation in f32, before the one rounding.
    /// let bias = Tensor::new(&[1f32, -8., 0.5, -9.], &Device::Cpu)?;
    /// let layer = MatmulOptions::default().bias(bias).activation(Activation::Relu);
    /// let h = a.kaio_matmul_with(&w, &layer)?;
    /// assert_eq!(h.to_vec3::<f32>()?[1][4], [9., 0., 8.5, 0.]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_with(&self, rhs: &Tensor, opts: &MatmulOptions) -> Result<Tensor> {
        op::matmul("kaio_matmul_with", self.as_ref(), rhs, opts)
    }

    /// Product of int8 matrices, `scale · Σ a·b`, summed exactly in i32.
    ///
    /// candle has no i8, so u8 tensors carry the bytes of two's-complement int8;
    /// [`quant::quantize_int8`](crate::quant::quantize_int8) makes them.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`lhs`) | `[.., M, K]` | u8, read as int8 |
    /// | `rhs` | `[K, N]` | u8, read as int8 |
    /// | `scale` | | the product of both quantisation steps |
    /// | result | `[.., M, N]` | f32 |
    ///
    /// # Gradient
    ///
    /// None: a tracked input is an error.
    ///
    /// # Errors
    ///
    /// Other dtypes or ranks, unequal K, K over 131071 (the sum could leave i32), a scale that is
    /// not finite, a tracked input, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::{prelude::*, quant};
    /// let a = Tensor::new(&[[1f32, -2., 3.]], &Device::Cpu)?;
    /// let w = Tensor::new(&[[1f32], [1.], [-1.]], &Device::Cpu)?;
    /// let ((a, a_scale), (w, w_scale)) = (quant::quantize_int8(&a)?, quant::quantize_int8(&w)?);
    /// let c = a.kaio_matmul_int8(&w, a_scale * w_scale)?;
    /// assert!((c.to_vec2::<f32>()?[0][0] + 4.).abs() < 0.05);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_int8(&self, rhs: &Tensor, scale: f32) -> Result<Tensor> {
        op::matmul_int8(self.as_ref(), rhs, scale)
    }

    /// Product with a weight in int4, eight values a `u32`, one scale for each 128 rows of a column.
    ///
    /// The lowest nibble of a word is the lowest k; a nibble is two's complement, −8 to 7; the weight
    /// is nibble · scale, on a GPU rounded to f16's digits. [`quant::quantize_int4`](crate::quant::quantize_int4) makes this form.
    ///
    /// A GPU brings the weight into the form that its kernels read in each call. A weight that is used more than once is better a
    /// [`QuantWeight`](crate::quant::QuantWeight), by [`from_int4`](crate::quant::QuantWeight::from_int4), for
    /// [`kaio_matmul_quant`](Self::kaio_matmul_quant): that does so once.
    ///
    /// GPTQ and AWQ pack theirs differently, and nothing in a `u32` says so: see [`quant`](crate::quant).
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`lhs`) | `[.., M, K]`, K a multiple of 128 | f16 |
    /// | `packed` | `[K/8, N]` | u32 |
    /// | `scales` | `[K/128, N]` | f16 |
    /// | result | `[.., M, N]` | f32 |
    ///
    /// # Gradient
    ///
    /// Of `self`; the weight is a constant.
    ///
    /// # Errors
    ///
    /// Other dtypes or ranks, K not a multiple of 128, rows of `packed` or `scales` that do not
    /// belong to K, unequal N, a weight that tracks a gradient, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::{prelude::*, quant};
    /// let w = Tensor::randn(0f32, 1., (256, 8), &Device::Cpu)?;
    /// let (packed, scales) = quant::quantize_int4(&w)?;
    /// let a = Tensor::ones((3, 256), DType::F16, &Device::Cpu)?;
    /// assert_eq!(a.kaio_matmul_int4(&packed, &scales)?.dims(), [3, 8]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_int4(&self, packed: &Tensor, scales: &Tensor) -> Result<Tensor> {
        op::matmul_int4(self.as_ref(), packed, scales)
    }

    /// Product with a quantised weight, `x·W`.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., M, K]` | f16 or bf16 |
    /// | `weight` | `[K, N]` | any scheme |
    /// | result | `[.., M, N]` | that of `x` |
    ///
    /// # Gradient
    ///
    /// Of `x`, `dC·Wᵀ`. The weight is a constant, for which nothing is computed or kept.
    ///
    /// # Errors
    ///
    /// Other dtypes, rank under 2, another K, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let w = Tensor::randn(0f32, 1., (100, 8), &Device::Cpu)?;
    /// let w = QuantWeight::quantize(&w, &QuantScheme::Nf4 { block: 64 })?;
    /// let x = Tensor::ones((2, 3, 100), DType::BF16, &Device::Cpu)?;
    /// assert_eq!(x.kaio_matmul_quant(&w)?.dims(), [2, 3, 8]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_quant(&self, weight: &QuantWeight) -> Result<Tensor> {
        op::matmul_quant("kaio_matmul_quant", self.as_ref(), weight, &MatmulOptions::default())
    }

    /// [`kaio_matmul_quant`](Self::kaio_matmul_quant) with [`MatmulOptions`]: `act(x·W + bias)` of f16 or bf16
    /// activations, or of ones that are rounded to eight bits inside.
    ///
    /// # Gradient
    ///
    /// Of `x` and the bias. That of a rounding to eight bits counts as 1.
    ///
    /// # Errors
    ///
    /// As there; a bias of another dtype or length; activations of eight bits with a weight that is not of the same kind.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let w = Tensor::randn(0f32, 1., (64, 8), &Device::Cpu)?;
    /// let w = QuantWeight::quantize(&w, &QuantScheme::Int8 { per: Per::Channel })?;
    /// let x = Tensor::ones((3, 64), DType::F16, &Device::Cpu)?;
    /// let opts = MatmulOptions::default().activations(Activations::Int8).activation(Activation::Silu);
    /// assert_eq!(x.kaio_matmul_quant_with(&w, &opts)?.dtype(), DType::F16);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_quant_with(&self, weight: &QuantWeight, opts: &MatmulOptions) -> Result<Tensor> {
        op::matmul_quant("kaio_matmul_quant_with", self.as_ref(), weight, opts)
    }

    /// Query, key and value projections of one input with quantised weights, each of its own width.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., M, K]` | f16 or bf16 |
    /// | `weights` | three `[K, Nᵢ]` | any schemes |
    /// | result | three `[.., M, Nᵢ]` | that of `x` |
    ///
    /// # Gradient
    ///
    /// Of `x`, summed over the three in f32.
    ///
    /// # Errors
    ///
    /// Those of [`kaio_matmul_quant`](Self::kaio_matmul_quant).
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let scheme = QuantScheme::Int4 { group: 32, zero_points: true };
    /// let w = |n| QuantWeight::quantize(&Tensor::randn(0f32, 1., (64, n), &Device::Cpu)?, &scheme);
    /// let x = Tensor::ones((3, 64), DType::BF16, &Device::Cpu)?;
    /// let (q, k, v) = x.kaio_qkv_project([&w(32)?, &w(8)?, &w(8)?])?;
    /// assert_eq!((q.dims(), k.dims(), v.dims()), ([3, 32].as_slice(), [3, 8].as_slice(), [3, 8].as_slice()));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_qkv_project(&self, weights: [&QuantWeight; 3]) -> Result<(Tensor, Tensor, Tensor)> {
        op::qkv_project(self.as_ref(), weights).map(Into::into)
    }

    /// The first half of a gated feed-forward layer, `silu(x·G) · (x·U)`, with quantised weights of one width.
    ///
    /// The result is rounded to the dtype of `x`. So are both products before, unless one kernel has them in f32, as for a few rows
    /// that track no gradient: see [`kaio_swiglu`](Self::kaio_swiglu).
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., M, K]` | f16 or bf16 |
    /// | `gate`, `up` | `[K, N]` | any schemes |
    /// | result | `[.., M, N]` | that of `x` |
    ///
    /// # Gradient
    ///
    /// Of `x`.
    ///
    /// # Errors
    ///
    /// Those of [`kaio_matmul_quant`](Self::kaio_matmul_quant), and unequal N.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let w = Tensor::randn(0f32, 1., (64, 96), &Device::Cpu)?;
    /// let w = QuantWeight::quantize(&w, &QuantScheme::Nf4 { block: 64 })?;
    /// let x = Tensor::ones((3, 64), DType::BF16, &Device::Cpu)?;
    /// assert_eq!(x.kaio_swiglu_project(&w, &w)?.dims(), [3, 96]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_swiglu_project(&self, gate: &QuantWeight, up: &QuantWeight) -> Result<Tensor> {
        op::swiglu_project(self.as_ref(), gate, up)
    }

    /// [`kaio_matmul_int8`](Self::kaio_matmul_int8) with [`Int8Options`]: scales of rows and columns, a zero point of
    /// the activations, bias, activation and dtype. Sums are exact integers; what follows is in f32.
    ///
    /// # Gradient
    ///
    /// Of the bias alone; operands and scales that track one are an error.
    ///
    /// # Errors
    ///
    /// As there; scales or a bias of another dtype or shape; a zero point outside −128 to 127, and with one other than 0 K
    /// over 65793 (`K · 255 · 128` has to fit i32).
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let a = Tensor::new(&[[1u8, 2], [3, 255]], &Device::Cpu)?; // 255 is −1
    /// let w = Tensor::new(&[[1u8], [1]], &Device::Cpu)?;
    /// let opts = Int8Options::default().lhs_scales(Tensor::new(&[1f32, 10.], &Device::Cpu)?).zero_point(1);
    /// assert_eq!(a.kaio_matmul_int8_with(&w, &opts)?.to_vec2::<f32>()?, [[1.], [0.]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_int8_with(&self, rhs: &Tensor, opts: &Int8Options) -> Result<Tensor> {
        op::matmul_int8_with(self.as_ref(), rhs, opts)
    }

    /// Product of floats of eight bits (e4m3) with scales of tensors, of rows and columns, or of blocks:
    /// `act(Σ (a · scale of a) · (b · scale of b) + bias)`, summed in f32.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`lhs`) | `[.., M, K]` | f8e4m3 |
    /// | `rhs` | `[K, N]` | f8e4m3 |
    /// | result | `[.., M, N]` | f32, f16 or bf16 |
    ///
    /// # Gradient
    ///
    /// Of the bias alone; operands and scales that track one are an error.
    ///
    /// # Errors
    ///
    /// Other dtypes, scales or a bias of another shape, unequal K, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let a = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
    /// let w = Tensor::new(&[[3f32], [0.5]], &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
    /// let opts = Fp8Options::default().rhs_scales(Tensor::new(&[0.5f32], &Device::Cpu)?);
    /// assert_eq!(a.kaio_matmul_fp8(&w, &opts)?.to_vec2::<f32>()?, [[2.]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_matmul_fp8(&self, rhs: &Tensor, opts: &Fp8Options) -> Result<Tensor> {
        op::matmul_fp8(self.as_ref(), rhs, opts)
    }

    /// Attention `softmax(q·kᵀ/√D + mask)·v` from f16 to f32, over any batch dimensions.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`q`) | `[.., Sq, D]` | f16 |
    /// | `k` | `[.., Sk, D]` | f16 |
    /// | `v` | `[.., Sk, Dv]` | f16 |
    /// | result | `[.., Sq, Dv]` | f32 |
    ///
    /// With `causal` the last query sees all keys, the one before all but the last, and so on; a row
    /// that sees no key is zero.
    ///
    /// # Gradient
    ///
    /// q, k and v in f16, as of [`kaio_flash_attn`](Self::kaio_flash_attn), summed over what was broadcast. On
    /// CUDA the gradient of the result is rounded to f16.
    ///
    /// # Errors
    ///
    /// Other dtypes, rank under 2, unequal D or Sk, D = 0, batch dimensions that do not broadcast, two devices;
    /// on CUDA, head dimensions over what the engine takes (256), and on GPUs before 8.0 a tracked input.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let q = Tensor::zeros((2, 4, 16), DType::F16, &Device::Cpu)?;
    /// let v = Tensor::ones((2, 9, 8), DType::F16, &Device::Cpu)?;
    /// let k = Tensor::zeros((2, 9, 16), DType::F16, &Device::Cpu)?;
    /// let o = q.kaio_attention_tc(&k, &v, true)?;
    /// assert_eq!((o.dims(), o.sum_all()?.to_scalar::<f32>()?), ([2, 4, 8].as_slice(), 64.));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_attention_tc(&self, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
        op::attention_tc(self.as_ref(), k, v, causal)
    }

    /// Flash attention `softmax(q·kᵀ/√D + mask)·v` in O(S·D) memory, with gradients.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`q`) | `[Sq, D]`, `[Hq, Sq, D]` or `[B, Hq, Sq, D]` | f16, bf16 or f32 |
    /// | `k` | the same with `Hkv`, `Sk`; Hq a multiple of Hkv | the same |
    /// | `v` | like `k`, with head dimension Dv | the same |
    /// | result | like `self`, with Dv | the same |
    ///
    /// Query heads `h·Hq/Hkv` and the `Hq/Hkv − 1` that follow it share the key head `h`. With
    /// `causal` the last query sees all keys; a row that sees no key is zero.
    ///
    /// # Gradient
    ///
    /// q, k and v, in O(S·D) memory: probabilities are rebuilt block by block (FlashAttention-2, Dao 2023) from
    /// what the forward pass kept of each row. [`docs/training.md`] says what that is.
    ///
    /// [`docs/training.md`]: https://docs.rs/crate/kaio-candle/latest/source/docs/training.md
    ///
    /// # Errors
    ///
    /// Other dtypes, unequal ranks, D, Sk or B, other heads of `v` than of `k`, Hq not a multiple of Hkv,
    /// D = 0, two devices; on CUDA, head dimensions over what the engine takes (256).
    ///
    /// # Example
    ///
    /// ```
    /// use candle_core::{Device, Var};
    /// use kaio_candle::prelude::*;
    ///
    /// let q = Var::randn(0f32, 1., (1, 4, 10, 16), &Device::Cpu)?;
    /// let k = Var::randn(0f32, 1., (1, 2, 12, 16), &Device::Cpu)?;
    /// let v = Var::randn(0f32, 1., (1, 2, 12, 16), &Device::Cpu)?;
    /// let loss = q.kaio_flash_attn(&k, &v, true)?.sqr()?.sum_all()?;
    /// let grads = loss.backward()?;
    /// assert_eq!(grads.get(&k).unwrap().dims(), [1, 2, 12, 16]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_flash_attn(&self, k: &Tensor, v: &Tensor, causal: bool) -> Result<Tensor> {
        let opts = FlashAttnOptions::default().causal(causal);
        op::flash_attn("kaio_flash_attn", self.as_ref(), k, v, &opts)
    }

    /// [`kaio_flash_attn`](Self::kaio_flash_attn) with [`FlashAttnOptions`]: causal masks and sliding
    /// windows, scale, softcap, ALiBi, a bias on the scores, packed and padded batches of several
    /// lengths, the other layout, an f32 result, and the engine.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`q`) | `[Sq, D]`, `[Hq, Sq, D]` or `[B, Hq, Sq, D]`; by `layout` `[Sq, Hq, D]` or `[B, Sq, Hq, D]` | f16, bf16 or f32 |
    /// | `k` | the same with `Hkv`, `Sk`; Hq a multiple of Hkv | the same |
    /// | `v` | like `k`, with head dimension Dv | the same |
    /// | `bias` of the options | `[B, Hq, Sq, Sk]`, where each but Sk may be 1, and leading ones left out | the same, or f32 |
    /// | `alibi_slopes` | `[Hq]` or `[B, Hq]` | f32 |
    /// | `cu_seqlens_q`, `cu_seqlens_k` | `[B + 1]` | u32 |
    /// | `seqlens_q`, `seqlens_k` | `[B]` | u32 |
    /// | result | like `self`, with Dv | `out_dtype`: the same, or f32 |
    ///
    /// # Gradient
    ///
    /// q, k, v and the bias, each in its dtype, in O(S·D) memory and the size of the bias. Slopes and
    /// lengths have none.
    ///
    /// # Errors
    ///
    /// Also options that exclude each other, a scale or softcap out of range, another `out_dtype`, a
    /// bias, slopes or lengths of another dtype or shape, slopes or lengths that track a gradient, on
    /// the CPU lengths that do not fit, and an engine that cannot take the problem or, on CUDA, that has no
    /// backward pass for inputs that track a gradient.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let x = Tensor::ones((6, 16), DType::F32, &Device::Cpu)?;
    /// let o = x.kaio_flash_attn_with(&x, &x, &FlashAttnOptions::default().softmax_scale(0.))?;
    /// assert_eq!(o.to_vec2::<f32>()?, x.to_vec2::<f32>()?);
    ///
    /// // Two sequences of 4 and 2 rows end to end, 3 heads of width 16.
    /// let ends = Tensor::new(&[0u32, 4, 6], &Device::Cpu)?;
    /// let opts = FlashAttnOptions::default()
    ///     .layout(AttnLayout::Bshd)
    ///     .causal(true)
    ///     .window_size_left(2)
    ///     .cu_seqlens_q(ends.clone())
    ///     .cu_seqlens_k(ends);
    /// let x = Tensor::randn(0f32, 1., (6, 3, 16), &Device::Cpu)?;
    /// assert_eq!(x.kaio_flash_attn_with(&x, &x, &opts)?.dims(), [6, 3, 16]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_flash_attn_with(
        &self,
        k: &Tensor,
        v: &Tensor,
        opts: &FlashAttnOptions,
    ) -> Result<Tensor> {
        op::flash_attn("kaio_flash_attn_with", self.as_ref(), k, v, opts)
    }

    /// [`kaio_flash_attn_with`](Self::kaio_flash_attn_with), and each query's log-sum-exp
    /// `ln Σ exp(score)`, with which results over parts of the keys can be combined.
    ///
    /// | | shape | dtype |
    /// |---|---|---|
    /// | result | as there | as there |
    /// | log-sum-exp | `[Sq]`, `[Hq, Sq]` or `[B, Hq, Sq]` by the rank of `self`, under each layout | f32 |
    ///
    /// It is −∞ where a query sees no key.
    ///
    /// # Gradient
    ///
    /// As there, through the result and through the log-sum-exp: results over parts of the keys that are
    /// combined by their log-sum-exps are differentiated as the whole would be.
    ///
    /// # Errors
    ///
    /// As there.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let q = Tensor::zeros((2, 3, 16), DType::F32, &Device::Cpu)?;
    /// let k = Tensor::zeros((2, 8, 16), DType::F32, &Device::Cpu)?;
    /// let (out, lse) = q.kaio_flash_attn_with_lse(&k, &k, &FlashAttnOptions::default())?;
    /// assert_eq!((out.dims(), lse.dims()), ([2, 3, 16].as_slice(), [2, 3].as_slice()));
    /// assert_eq!(lse.to_vec2::<f32>()?[1][2], 8f32.ln());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_flash_attn_with_lse(
        &self,
        k: &Tensor,
        v: &Tensor,
        opts: &FlashAttnOptions,
    ) -> Result<(Tensor, Tensor)> {
        op::flash_attn_with_lse("kaio_flash_attn_with_lse", self.as_ref(), k, v, opts)
    }

    /// Query, key and value projections of one input with int8 weights: `scales[i] · x·weights[i]`.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., M, K]` | f16 |
    /// | `weights` | three `[K, Nᵢ]` | u8, read as int8 |
    /// | `scales` | | one step a weight |
    /// | result | three `[.., M, Nᵢ]` | f16 |
    ///
    /// # Gradient
    ///
    /// Of `x`; the weights are constants.
    ///
    /// # Errors
    ///
    /// Other dtypes or ranks, unequal K, a scale that is not finite, a weight that tracks a gradient, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::{prelude::*, quant};
    /// let (w, scale) = quant::quantize_int8(&Tensor::randn(0f32, 1., (32, 16), &Device::Cpu)?)?;
    /// let x = Tensor::ones((2, 5, 32), DType::F16, &Device::Cpu)?;
    /// let (q, k, v) = x.kaio_qkv_project_int8([&w, &w, &w], [scale; 3])?;
    /// assert_eq!(q.dims(), [2, 5, 16]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_qkv_project_int8(
        &self,
        weights: [&Tensor; 3],
        scales: [f32; 3],
    ) -> Result<(Tensor, Tensor, Tensor)> {
        op::qkv_project_of(self.as_ref(), QkvWeights::Int8 { weights, scales })
    }

    /// Query, key and value projections of one input with int4 weights in the form of
    /// [`kaio_matmul_int4`](Self::kaio_matmul_int4).
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., M, K]`, K a multiple of 128 | f16 |
    /// | `weights` | three `[K/8, Nᵢ]` | u32 |
    /// | `scales` | three `[K/128, Nᵢ]` | f16 |
    /// | result | three `[.., M, Nᵢ]` | f16 |
    ///
    /// # Gradient
    ///
    /// Of `x`; the weights are constants.
    ///
    /// # Errors
    ///
    /// As for `kaio_matmul_int4`.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::{prelude::*, quant};
    /// let (w, s) = quant::quantize_int4(&Tensor::randn(0f32, 1., (128, 16), &Device::Cpu)?)?;
    /// let x = Tensor::ones((5, 128), DType::F16, &Device::Cpu)?;
    /// let (q, k, v) = x.kaio_qkv_project_int4([&w, &w, &w], [&s, &s, &s])?;
    /// assert_eq!(v.dims(), [5, 16]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_qkv_project_int4(
        &self,
        weights: [&Tensor; 3],
        scales: [&Tensor; 3],
    ) -> Result<(Tensor, Tensor, Tensor)> {
        op::qkv_project_of(self.as_ref(), QkvWeights::Int4 { packed: weights, scales })
    }

    /// Gated linear unit by SiLU: `self · σ(self) · up`, in one pass over memory (SwiGLU; Shazeer, "GLU
    /// Variants Improve Transformer", 2020).
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`gate`) | any | f16, bf16 or f32 |
    /// | `up` | that of `gate` | that of `gate` |
    /// | result | the same | the same |
    ///
    /// Computed in f32 and rounded once. Both halves of one projection are read in place, as is every view
    /// whose last dimension is contiguous; others are copied once.
    ///
    /// # Gradient
    ///
    /// Both, computed from `gate` and `up` in one pass; nothing else is kept for it.
    ///
    /// # Errors
    ///
    /// Other dtypes, unequal dtypes or shapes, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # use kaio_candle::prelude::*;
    /// let projection = Var::randn(0f32, 1., (2, 5, 2 * 8), &Device::Cpu)?;
    /// let (gate, up) = (projection.narrow(2, 0, 8)?, projection.narrow(2, 8, 8)?);
    /// let h = gate.kaio_swiglu(&up)?;
    /// assert_eq!(h.dims(), [2, 5, 8]);
    /// assert!(h.sqr()?.mean_all()?.backward()?.get(&projection).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_swiglu(&self, up: &Tensor) -> Result<Tensor> {
        op::glu("kaio_swiglu", Gate::Silu, self.as_ref(), up)
    }

    /// Gated linear unit by GELU, `gelu(self) · up` with
    /// `gelu(x) = ½·x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))`; else as [`kaio_swiglu`](Self::kaio_swiglu).
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let gate = Tensor::new(&[0f32, 1.], &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// let h = gate.kaio_geglu(&gate)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    /// assert!(h[0] == 0. && (h[1] - 0.8412).abs() < 0.004);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_geglu(&self, up: &Tensor) -> Result<Tensor> {
        op::glu("kaio_geglu", Gate::GeluTanh, self.as_ref(), up)
    }

    /// `self + rhs`, as candle's `+`, for the parts of a model within a [`block`](crate::train::block): this sum's gradient is
    /// handed to both as it is, where candle adds it to zeros for each.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`lhs`) | any | f16, bf16 or f32 |
    /// | `rhs` | that of `lhs` | that of `lhs` |
    /// | result | the same | the same |
    ///
    /// Views of any strides are read in place. [`kaio_add_rms_norm`](Self::kaio_add_rms_norm) and
    /// [`kaio_add_layer_norm`](Self::kaio_add_layer_norm) normalise a sum in the same pass.
    ///
    /// # Gradient
    ///
    /// Both: that of the sum.
    ///
    /// # Errors
    ///
    /// Other dtypes, unequal dtypes or shapes, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor, Var};
    /// # use kaio_candle::prelude::*;
    /// // What a low-rank matrix adds to a frozen one (Hu et al., "LoRA", 2021).
    /// let x = Tensor::randn(0f32, 1., (2, 5, 64), &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// let frozen = Tensor::randn(0f32, 0.1, (64, 32), &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// let (a, b) = (Var::randn(0f32, 0.1, (64, 4), &Device::Cpu)?, Var::zeros((4, 32), DType::F32, &Device::Cpu)?);
    /// let opts = MatmulOptions::default().compute_dtype(DType::BF16).out_dtype(DType::BF16);
    /// let loss = kaio_candle::train::block(
    ///     |_| {
    ///         let low = x.kaio_matmul_with(&a, &opts)?.kaio_matmul_with(&b, &opts)?;
    ///         x.kaio_matmul_with(&frozen, &opts)?.kaio_add(&low)?.kaio_softmax()?.sqr()?.mean_all()
    ///     },
    ///     &[],
    /// )?;
    /// assert!(loss.backward()?.get(&b).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_add(&self, rhs: &Tensor) -> Result<Tensor> {
        op::add(self.as_ref(), rhs)
    }

    /// RMSNorm over the last dimension: `self · weight / √(mean(self²) + eps)` (Zhang and Sennrich, "Root Mean Square Layer
    /// Normalization", 2019). It takes the place of `candle_nn::ops::rms_norm`, through which no gradient passes.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., width]` | f16, bf16 or f32 |
    /// | `weight` | `[width]` | that of `x`, or f32 |
    /// | `eps` | | at least 0: 1e-6, say |
    /// | result | that of `x` | that of `x` |
    ///
    /// Computed in f32 and rounded once. Views whose rows are contiguous and a fixed distance apart are read in place; others
    /// are copied once.
    ///
    /// # Gradient
    ///
    /// Both, in one pass over `x` and the upstream gradient, the same from run to run; one f32 of each row is kept for it.
    /// That of a constant is not computed.
    ///
    /// # Errors
    ///
    /// Other dtypes or shapes, a negative or infinite `eps`, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # use kaio_candle::prelude::*;
    /// let x = Tensor::new(&[[3f32, 4.]], &Device::Cpu)?;
    /// let weight = Var::new(&[1f32, 2.], &Device::Cpu)?;
    /// let y = x.kaio_rms_norm(&weight, 0.)?;
    /// let rms = 12.5f32.sqrt();
    /// assert!((y.to_vec2::<f32>()?[0][1] - 8. / rms).abs() < 1e-6);
    /// let grads = y.sum_all()?.backward()?;
    /// assert!((grads.get(&weight).unwrap().to_vec1::<f32>()?[0] - 3. / rms).abs() < 1e-6);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_rms_norm(&self, weight: &Tensor, eps: f32) -> Result<Tensor> {
        op::rms_norm(self.as_ref(), weight, eps)
    }

    /// LayerNorm over the last dimension: `(self − mean) · weight / √(variance + eps) + bias`, of the variance that divides
    /// by the width (Ba, Kiros and Hinton, "Layer Normalization", 2016). It takes the place of `candle_nn::ops::layer_norm`,
    /// through which no gradient passes.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., width]` | f16, bf16 or f32 |
    /// | `weight` | `[width]` | that of `x`, or f32 |
    /// | `bias` | `[width]` | that of `weight` |
    /// | `eps` | | at least 0: 1e-5, say |
    /// | result | that of `x` | that of `x` |
    ///
    /// Else as [`kaio_rms_norm`](Self::kaio_rms_norm).
    ///
    /// # Gradient
    ///
    /// All three, likewise; two f32 of each row are kept for it.
    ///
    /// # Errors
    ///
    /// As for `kaio_rms_norm`.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let x = Tensor::new(&[[1f32, 3.], [5., 5.]], &Device::Cpu)?;
    /// let (weight, bias) = (x.get(0)?, x.get(1)?);
    /// let y = x.kaio_layer_norm(&weight, Some(&bias), 1e-12)?;
    /// assert_eq!(y.to_vec2::<f32>()?, [[4., 8.], [5., 5.]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_layer_norm(&self, weight: &Tensor, bias: Option<&Tensor>, eps: f32) -> Result<Tensor> {
        op::layer_norm(self.as_ref(), weight, bias, eps)
    }

    /// What a layer of a transformer begins with: the [RMSNorm](Self::kaio_rms_norm) of `self + residual`, and that sum,
    /// which goes on, in one pass over memory.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., width]` | f16, bf16 or f32 |
    /// | `residual` | that of `x` | that of `x` |
    /// | `weight` | `[width]` | that of `x`, or f32 |
    /// | `eps` | | at least 0: 1e-6, say |
    /// | results: normed, sum | that of `x` | that of `x` |
    ///
    /// The sum is rounded, and what is normed is the rounded sum.
    ///
    /// # Gradient
    ///
    /// All three; the sum's own upstream gradient is added in the same pass.
    ///
    /// # Errors
    ///
    /// As for `kaio_rms_norm`.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let attended = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
    /// let (h, weight) = (attended.affine(2., 0.)?, attended.ones_like()?.squeeze(0)?);
    /// let (normed, h) = attended.kaio_add_rms_norm(&h, &weight, 1e-6)?;
    /// assert_eq!(h.to_vec2::<f32>()?, [[3., 6.]]);
    /// assert_eq!(normed.to_vec2::<f32>()?, h.kaio_rms_norm(&weight, 1e-6)?.to_vec2::<f32>()?);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_add_rms_norm(
        &self,
        residual: &Tensor,
        weight: &Tensor,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        op::add_rms_norm(self.as_ref(), residual, weight, eps)
    }

    /// The same with [LayerNorm](Self::kaio_layer_norm): that of `self + residual`, and the sum.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., width]` | f16, bf16 or f32 |
    /// | `residual` | that of `x` | that of `x` |
    /// | `weight` | `[width]` | that of `x`, or f32 |
    /// | `bias` | `[width]` | that of `weight` |
    /// | `eps` | | at least 0: 1e-5, say |
    /// | results: normed, sum | that of `x` | that of `x` |
    ///
    /// The sum is rounded, and what is normed is the rounded sum.
    ///
    /// # Gradient
    ///
    /// All four; the sum's own upstream gradient is added in the same pass.
    ///
    /// # Errors
    ///
    /// As for `kaio_rms_norm`.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let attended = Tensor::new(&[[1f32, 2.]], &Device::Cpu)?;
    /// let (h, weight) = (attended.affine(2., 0.)?, attended.ones_like()?.squeeze(0)?);
    /// let (normed, h) = attended.kaio_add_layer_norm(&h, &weight, None, 1e-12)?;
    /// assert_eq!((normed.to_vec2::<f32>()?, h.to_vec2::<f32>()?), (vec![vec![-1., 1.]], vec![vec![3., 6.]]));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_add_layer_norm(
        &self,
        residual: &Tensor,
        weight: &Tensor,
        bias: Option<&Tensor>,
        eps: f32,
    ) -> Result<(Tensor, Tensor)> {
        op::add_layer_norm(self.as_ref(), residual, weight, bias, eps)
    }

    /// Rotary position embedding (Su et al., "RoFormer", 2021): the pair `(a, b)` becomes `(a·cos − b·sin, b·cos + a·sin)`
    /// by the angle of its position. It takes the place of `candle_nn::rotary_emb::{rope, rope_i}`, through which no gradient
    /// passes.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., heads, positions, D]`, or without heads | f16, bf16 or f32 |
    /// | `cos`, `sin` | `[positions, R/2]` or `[batch, positions, R/2]`, of these or more positions | that of `x`, or f32 |
    /// | `layout` | [`RopeLayout`]: which elements are pairs | |
    /// | result | that of `x` | that of `x` |
    ///
    /// Elements from R on stay as they are (partial rotary). Computed in f32 and rounded once. Views whose last dimension is
    /// contiguous are read in place, `[B, S, H, D]` with its dimensions swapped among them.
    ///
    /// # Gradient
    ///
    /// Of `x`: the rotation back, by the same kernel. `cos` and `sin` are constants.
    ///
    /// # Errors
    ///
    /// Other dtypes or shapes, `cos` or `sin` that track a gradient, two devices.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let x = Tensor::new(&[[1f32, 0., 7.]], &Device::Cpu)?;
    /// let angle = Tensor::new(&[[0.5f32]], &Device::Cpu)?;
    /// let y = x.kaio_rope(&angle.cos()?, &angle.sin()?, RopeLayout::Halves)?.to_vec2::<f32>()?;
    /// assert!((y[0][0] - 0.5f32.cos()).abs() < 1e-6 && (y[0][1] - 0.5f32.sin()).abs() < 1e-6);
    /// assert_eq!(y[0][2], 7.);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_rope(&self, cos: &Tensor, sin: &Tensor, layout: RopeLayout) -> Result<Tensor> {
        op::rope(self.as_ref(), cos, sin, layout)
    }

    /// Softmax over the last dimension, `e^(self − max) / Σ e^(self − max)`. It takes the place of
    /// `candle_nn::ops::softmax_last_dim`, through which no gradient passes.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`x`) | `[.., width]` | f16, bf16 or f32 |
    /// | result | that of `x` | that of `x` |
    ///
    /// Computed in f32 and rounded once. A row that is −∞ throughout, or has +∞ or NaN, is NaN. Views whose rows are
    /// contiguous and a fixed distance apart are read in place; others are copied once.
    ///
    /// # Gradient
    ///
    /// From the result, in one pass.
    ///
    /// # Errors
    ///
    /// Other dtypes, no dimension.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let x = Tensor::new(&[[0f32, 3f32.ln()]], &Device::Cpu)?;
    /// let y = x.kaio_softmax()?.to_vec2::<f32>()?;
    /// assert!((y[0][1] - 0.75).abs() < 1e-6);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_softmax(&self) -> Result<Tensor> {
        op::softmax(self.as_ref())
    }

    /// Cross-entropy of logits with the indices of classes: of a row
    /// `(1 − ε)·(lse − zₜ) + ε·mean(lse − zⱼ) + z_loss·lse²` with `lse = log Σⱼ exp zⱼ`, `ε` the label smoothing and `t` the
    /// target; the mean over all rows that are not ignored, their sum, or all of them. Computed in one pass over the
    /// logits, in f32 (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`logits`) | `[.., V]` | f16, bf16 or f32 |
    /// | `targets` | `[..]` | u32 or i64 |
    /// | result | `[]`, with [`Reduction::None`](crate::Reduction::None) `[..]` | f32 |
    ///
    /// Every view whose last dimension is contiguous is read in place, at any offset; others are copied once.
    /// Logits of −∞ have probability 0. As in PyTorch, a target of logit −∞ has loss +∞, as has label smoothing over one,
    /// and logits that are all −∞, or one that is +∞ or NaN, have loss NaN.
    ///
    /// # Gradient
    ///
    /// Of the logits, in their dtype, from the logits and a log-sum-exp for each row: read once, written once.
    ///
    /// # Errors
    ///
    /// Other dtypes or shapes, two devices, tracked targets, options out of range. A target out of range that is not
    /// `ignore_index` is an error on the CPU. On a GPU nobody waits to see it: the loss of its row is NaN, as are the
    /// mean and the sum with it and the gradient of its row; nothing is read out of bounds.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # use kaio_candle::prelude::*;
    /// let logits = Var::new(&[[2f32, 0., 1.], [0., 0., 0.]], &Device::Cpu)?;
    /// let targets = Tensor::new(&[0i64, -100], &Device::Cpu)?;
    /// let loss = logits.kaio_cross_entropy(&targets, &CrossEntropyOptions::default())?;
    /// assert!((loss.to_scalar::<f32>()? - 0.4076).abs() < 1e-4);
    /// assert!(loss.backward()?.get(&logits).is_some());
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_cross_entropy(&self, targets: &Tensor, opts: &CrossEntropyOptions) -> Result<Tensor> {
        op::cross_entropy(self.as_ref(), targets, opts)
    }

    /// [`kaio_cross_entropy`](Self::kaio_cross_entropy) of the logits `self · weightᵀ`, which are never whole in memory:
    /// a chunk of rows at a time, of up to 1 GiB, rounded to the operands' dtype.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`hidden`) | `[.., H]` | f16 or bf16 |
    /// | `weight` | `[V, H]`, as of candle's `Linear` and of an embedding | that of `hidden` |
    /// | both, with a `compute_dtype` of f16 or bf16 | the same | f32, f16 or bf16 each; multiplied in that |
    /// | `targets` | `[..]` | u32 or i64 |
    /// | result | `[]`, with [`Reduction::None`](crate::Reduction::None) `[..]` | f32 |
    ///
    /// V a multiple of 8 is fastest: otherwise products read copies of chunks.
    ///
    /// # Gradient
    ///
    /// Of `hidden` and `weight`, each if it is tracked, in their dtypes, summed over all rows in f32. Of a mean or a sum it
    /// is computed with the loss, as in Liger Kernel (Hsu et al., 2024), and kept until the backward pass multiplies it: in f32,
    /// but on a GPU that of bf16 hidden states in bf16. With [`Reduction::None`](crate::Reduction::None) each row has a
    /// factor of its own: the backward pass computes logits again.
    ///
    /// # Errors
    ///
    /// As of `kaio_cross_entropy`.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor, Var};
    /// # use kaio_candle::prelude::*;
    /// let hidden = Tensor::randn(0f32, 1., (2, 5, 16), &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// let weight = Var::from_tensor(&Tensor::randn(0f32, 1., (40, 16), &Device::Cpu)?.to_dtype(DType::BF16)?)?;
    /// let targets = Tensor::new(&[[3u32, 1, 4, 1, 5], [9, 2, 6, 5, 3]], &Device::Cpu)?;
    /// let loss = hidden.kaio_linear_cross_entropy(&weight, &targets, &CrossEntropyOptions::default())?;
    /// assert_eq!(loss.backward()?.get(&weight).unwrap().dims(), [40, 16]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_linear_cross_entropy(
        &self,
        weight: &Tensor,
        targets: &Tensor,
        opts: &CrossEntropyOptions,
    ) -> Result<Tensor> {
        op::linear_cross_entropy(self.as_ref(), weight, targets, opts)
    }

    /// Rows of a table: `out[..] = self[ids[..]]`.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `self` (`table`) | `[V, H]` | f16, bf16 or f32 |
    /// | `ids` | any | u32 or i64 |
    /// | result | that of `ids`, and `H` | that of `table` |
    ///
    /// # Gradient
    ///
    /// Of the table, in its dtype: the rows of each id are summed in f32, in the order in which they are, so that it is the
    /// same each time. On a GPU ids are sorted for it, and long runs of one id are summed in parts.
    ///
    /// # Errors
    ///
    /// Other dtypes or shapes, two devices, tracked ids. An id out of range is an error on the CPU. On a GPU nobody waits
    /// to see it: its row of the result is NaN, and it adds nothing to the gradient; nothing is read out of bounds.
    ///
    /// # Example
    ///
    /// ```
    /// # use candle_core::{Device, Tensor, Var};
    /// # use kaio_candle::prelude::*;
    /// let table = Var::new(&[[0f32, 1.], [2., 3.], [4., 5.]], &Device::Cpu)?;
    /// let ids = Tensor::new(&[[2u32, 0], [2, 2]], &Device::Cpu)?;
    /// let rows = table.kaio_embedding(&ids)?;
    /// assert_eq!(rows.dims(), [2, 2, 2]);
    /// let grads = rows.sum_all()?.backward()?;
    /// assert_eq!(grads.get(&table).unwrap().to_vec2::<f32>()?, [[1., 1.], [0., 0.], [3., 3.]]);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    fn kaio_embedding(&self, ids: &Tensor) -> Result<Tensor> {
        op::embedding(self.as_ref(), ids)
    }
}

impl KaioTensorExt for Tensor {}
