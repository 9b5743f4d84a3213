//! What training takes besides the gradients of ops.

mod checkpoint;

pub use checkpoint::{Outputs, checkpoint};
