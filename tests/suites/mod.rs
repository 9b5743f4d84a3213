//! The suites that every device runs, by topic: `tables.rs` lists them.
//!
//! A suite is a `pub fn name(device: &Device)`, so that the CPU tests (`tests/cpu.rs`) and the GPU suite
//! (`tests/gpu.rs`) run the same tables:
//!
//! ```ignore
//! let mut tally = Tally::new("matmul", device);
//! for dims in [..] {
//!     let case = format!("{dims:?}");
//!     let mut source = Source::new(&case, device);
//!     tally.case(case, || close("c", &computed, &reference, |i| tolerance));
//! }
//! tally.finish();
//! ```
//!
//! What only a GPU has (streams, graphs, launches, engines) is in `tests/gpu/`.

pub mod add;
pub mod attention;
pub mod cross_entropy;
pub mod differences;
pub mod embedding;
pub mod empty;
pub mod errors;
pub mod glu;
pub mod linear_cross_entropy;
pub mod loaders;
pub mod matmul;
pub mod norm;
pub mod quantized;
pub mod rope;
pub mod softmax;
pub mod train;
pub mod weights;

mod reference;
mod source;
mod tally;

pub use reference::*;
pub use source::*;
pub use tally::*;
