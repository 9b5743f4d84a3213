//! `use kaio_candle::prelude::*;` is all that a call needs.

pub use crate::quant::{Per, QuantScheme, QuantWeight};
pub use crate::{
    Activation, Activations, AttnLayout, Engine, FlashAttnOptions, Fp8Options, Int8Options,
    KaioTensorExt, MatmulOptions, RopeLayout,
};

#[cfg(feature = "cuda")]
pub use crate::registry;
