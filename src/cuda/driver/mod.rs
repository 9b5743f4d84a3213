//! From a kernel's text to its launch, for any kernel: this room knows no family of them.
//!
//! | module | |
//! |---|---|
//! | `gpu` | what is known of each GPU |
//! | `compile`, `files` | from text to a loaded kernel; `KAIO_CACHE_DIR`, `KAIO_DUMP_PTX` |
//! | `cache` | what is made once for each GPU and key |
//! | `function` | a loaded kernel, and its launch |
//! | `args`, `tensor_map`, `memory` | what a launch passes |
//! | `launches`, `chain` | launches that follow each other, as one graph |
//! | `log` | who is told of a launch; `KAIO_LOG` |
//! | `order` | streams of several candle devices |
//! | `pool` | how much memory is in use |
//! | `raw` | the driver's functions, as safe ones where they can be |

pub(super) mod args;
pub(super) mod cache;
mod chain;
pub(super) mod compile;
mod files;
pub(super) mod function;
pub(super) mod gpu;
pub(super) mod launches;
pub(super) mod log;
pub(super) mod memory;
pub(super) mod order;
pub(super) mod pool;
pub(super) mod raw;
pub(super) mod tensor_map;
