//! What training takes besides the gradients of ops.

mod casts;
mod checkpoint;

pub use casts::cast_once;
pub use checkpoint::{Outputs, checkpoint};
