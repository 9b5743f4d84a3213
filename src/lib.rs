//! Fast tensor operations with gradients for [candle](https://github.com/huggingface/candle).

mod cpu;
mod cuda;
mod error;
mod ext;
mod op;
mod options;
pub mod prelude;
pub mod quant;
mod stack;

#[cfg(feature = "cuda")]
pub use cuda::registry;
pub use error::{Error, Result};
pub use ext::KaioTensorExt;
pub use options::{Engine, FlashAttnOptions, MatmulOptions};
