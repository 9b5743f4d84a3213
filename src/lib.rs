//! Tensor operations with gradients for [candle](https://github.com/huggingface/candle), as methods
//! of [`Tensor`](candle_core::Tensor): matmul of f16 and bf16, flash attention, norms, losses, and products with
//! quantised weights; and an optimizer. On the CPU and on NVIDIA GPUs.
//!
//! # Quick start
//!
//! ```
//! use candle_core::{DType, Device, Tensor, Var};
//! use kaio_candle::prelude::*;
//!
//! let device = Device::Cpu; // or Device::new_cuda(0)?: nothing else changes
//! let x = Tensor::randn(0f32, 1., (2, 10, 64), &device)?.to_dtype(DType::BF16)?;
//! let weight = Var::randn(0f32, 0.1, (64, 64), &device)?;
//!
//! let h = x.kaio_matmul_tc(&weight.to_dtype(DType::BF16)?)?; // f32 [2, 10, 64]
//! let heads = h.reshape((2, 10, 4, 16))?.transpose(1, 2)?; // [B, H, S, D], a view
//! let loss = heads.kaio_flash_attn(&heads, &heads, true)?.sqr()?.mean_all()?;
//! assert!(loss.backward()?.get(&weight).is_some());
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! # Ops
//!
//! All are methods of [`KaioTensorExt`]; its page has shapes, layouts, gradients and errors.
//!
//! | method | from | to | gradient |
//! |---|---|---|---|
//! | [`kaio_matmul_tc`](KaioTensorExt::kaio_matmul_tc), [`_async`](KaioTensorExt::kaio_matmul_tc_async), [`kaio_matmul_with`](KaioTensorExt::kaio_matmul_with) | f16, bf16 | f32, f16, bf16 | yes |
//! | [`kaio_flash_attn`](KaioTensorExt::kaio_flash_attn), [`_with`](KaioTensorExt::kaio_flash_attn_with), [`_with_lse`](KaioTensorExt::kaio_flash_attn_with_lse) | f16, bf16, f32 | the same, f32 | yes |
//! | [`kaio_attention_tc`](KaioTensorExt::kaio_attention_tc) | f16 | f32 | yes |
//! | [`kaio_embedding`](KaioTensorExt::kaio_embedding) | f16, bf16, f32 | the same | yes |
//! | [`kaio_cross_entropy`](KaioTensorExt::kaio_cross_entropy) | f16, bf16, f32 | f32 | yes |
//! | [`kaio_linear_cross_entropy`](KaioTensorExt::kaio_linear_cross_entropy) | f16, bf16, f32 by a `compute_dtype` | f32 | yes |
//! | [`kaio_swiglu`](KaioTensorExt::kaio_swiglu), [`kaio_geglu`](KaioTensorExt::kaio_geglu) | f16, bf16, f32 | the same | yes |
//! | [`kaio_add`](KaioTensorExt::kaio_add) | f16, bf16, f32 | the same | yes |
//! | [`kaio_rms_norm`](KaioTensorExt::kaio_rms_norm), [`kaio_layer_norm`](KaioTensorExt::kaio_layer_norm), [`kaio_add_rms_norm`](KaioTensorExt::kaio_add_rms_norm), [`kaio_add_layer_norm`](KaioTensorExt::kaio_add_layer_norm) | f16, bf16, f32 | the same | yes |
//! | [`kaio_rope`](KaioTensorExt::kaio_rope) | f16, bf16, f32 | the same | of `x` |
//! | [`kaio_softmax`](KaioTensorExt::kaio_softmax) | f16, bf16, f32 | the same | yes |
//! | [`kaio_matmul_int8`](KaioTensorExt::kaio_matmul_int8) | int8 in u8 | f32 | no |
//! | [`kaio_matmul_int8_with`](KaioTensorExt::kaio_matmul_int8_with) | int8 in u8 | f32, f16, bf16 | of the bias |
//! | [`kaio_matmul_fp8`](KaioTensorExt::kaio_matmul_fp8) | f8e4m3 | f32, f16, bf16 | of the bias |
//! | [`kaio_matmul_quant`](KaioTensorExt::kaio_matmul_quant), [`_with`](KaioTensorExt::kaio_matmul_quant_with) | f16, bf16 and a [`QuantWeight`](quant::QuantWeight) | the same, or `out_dtype` | of `x` and the bias |
//! | [`kaio_qkv_project`](KaioTensorExt::kaio_qkv_project), [`kaio_swiglu_project`](KaioTensorExt::kaio_swiglu_project) | the same | that of `x` | of `x` |
//! | [`kaio_matmul_int4`](KaioTensorExt::kaio_matmul_int4) | f16, int4 in u32 | f32 | of `lhs` |
//! | [`kaio_qkv_project_int8`](KaioTensorExt::kaio_qkv_project_int8), [`_int4`](KaioTensorExt::kaio_qkv_project_int4) | f16, int8 or int4 | f16 | of `x` |
//!
//! Ops without a gradient refuse an input that tracks one. Some of candle-nn's do not: they leave what is
//! upstream of them without a gradient, silently. [The recipes] say which and what to use instead, and have the
//! attention of BERT, T5, Gemma 2, Whisper, Phi 3 and Llama.
//!
//! [The recipes]: https://docs.rs/crate/kaio-candle/latest/source/docs/recipes.md
//!
//! # Features
//!
//! - none: CPU tensors. Builds everywhere.
//! - `cuda`: CUDA tensors too, through this crate's own kernels and, for matmul and attention, those of `kaio-ops`;
//!   and the module `registry`, which keeps one `KaioDevice` for each GPU. It needs CUDA's compiler to build, and
//!   a GPU of compute capability 8.0 or later to run (attention falls back to kaio-ops on older ones).
//!   [`docs/engines.md`] lists limits, streams and environment variables.
//!
//! [`docs/engines.md`]: https://docs.rs/crate/kaio-candle/latest/source/docs/engines.md
//!
//! # Training
//!
//! [`train`] has AdamW in one launch for all variables, gradients that are clipped without the host, a check that finds
//! variables without a gradient, parts of a model that are computed again rather than kept, and blocks in which gradients are
//! moved rather than added to zeros.
//!
//! # Kernels of your own
//!
//! [`ptx`] writes kernels in Rust, without CUDA's compiler; with the feature `cuda`, [`launch`]
//! compiles them and runs them on candle's tensors and streams. Its page builds one step by step, and
//! `examples/custom_kernel.rs` is another, to be run.
//!
//! # Where things live
//!
//! `ext` speaks tensors, `op` shapes and gradients, `cpu` loops, `cuda` to the driver, `stack` turns
//! batch dimensions into offsets, [`quant`] makes weights, [`train`] steps, `kernel` turns problems into tiles and
//! [`ptx`] instructions into text. CONTRIBUTING.md has the map.
//!
//! # What versions promise
//!
//! Semantic versioning holds for what this page shows. The modules `kernel` and `tune` are public for this crate's own benches
//! and tests alone: they are hidden here, and may change in any release, so that tuning a kernel breaks nobody. Nor do the
//! texts of kernels, their choice or the last bits of a result belong to the promise.
#![cfg_attr(not(feature = "cuda"), doc = "\n\n[`launch`]: #features")]

mod check;
mod cpu;
mod cuda;
mod error;
mod ext;
// For this crate's benches and tests; hidden, so that a field more in a configuration is no breaking release.
#[doc(hidden)]
pub mod kernel;
mod op;
mod options;
pub mod prelude;
pub mod ptx;
pub mod quant;
mod stack;
pub mod train;

// As `kernel`.
#[doc(hidden)]
pub mod tune {
    #[cfg(feature = "cuda")]
    pub use crate::cuda::native::tune::*;
    pub use crate::op::linear_cross_entropy_within;
    pub use crate::op::{Backward, FlashAttnBackward};
}
#[cfg(feature = "cuda")]
pub use cuda::{launch, registry};
pub use error::{Error, Result};
pub use ext::KaioTensorExt;
pub use options::{
    Activation, Activations, AttnLayout, CrossEntropyOptions, Engine, FlashAttnOptions, Fp8Options,
    Int8Options, MatmulOptions, Reduction, RopeLayout,
};

/// The code of README, of the recipes and of the chapters, run by `cargo test`.
#[cfg(doctest)]
mod documents {
    #[doc = include_str!("../README.md")]
    struct Readme;
    #[doc = include_str!("../docs/recipes.md")]
    struct Recipes;
    #[doc = include_str!("../docs/training.md")]
    struct Training;
    #[doc = include_str!("../docs/quantised.md")]
    struct Quantised;
}
