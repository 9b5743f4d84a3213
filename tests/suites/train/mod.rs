//! The optimizer, the clipping of gradients, and what is kept between steps.

mod adamw;
mod clip;
mod inputs;
mod state;

pub use adamw::{accumulation, formula, layouts, moments_in_8_bits, options, sixteen_bits};
pub use clip::{clip, clipped_steps};
pub use state::{kept_bytes, resume};
