//! The optimizer, the clipping of gradients, what is kept between steps, parts that are computed again, and
//! blocks.

mod adamw;
mod block;
mod checkpoint;
mod clip;
mod fixture;
mod inputs;
mod state;

pub use adamw::{accumulation, formula, layouts, moments_in_8_bits, options, sixteen_bits};
pub use block::block;
pub use checkpoint::checkpoint;
pub use clip::{clip, clipped_steps};
pub use fixture::beside_torch;
pub use state::{kept_bytes, resume};
