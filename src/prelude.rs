//! `use kaio_candle::prelude::*;` is all that a call needs.

pub use crate::{Activation, AttnLayout, Engine, FlashAttnOptions, KaioTensorExt, MatmulOptions};

#[cfg(feature = "cuda")]
pub use crate::registry;
