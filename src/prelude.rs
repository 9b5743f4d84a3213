//! `use kaio_candle::prelude::*;` is all that a call needs.

pub use crate::quant::{Per, QuantScheme, QuantWeight};
pub use crate::{
    Activation, Activations, AttnLayout, CrossEntropyOptions, Engine, FlashAttnOptions, Fp8Options,
    Int8Options, KaioTensorExt, MatmulOptions, Reduction, RopeLayout,
};

#[cfg(feature = "cuda")]
pub use crate::registry;
