//! Training: an optimizer whose step is one launch for all variables, the clipping of gradients without the host, a check
//! that no variable is forgotten, parts of a model that are computed again rather than kept, blocks in which
//! gradients are moved rather than added to zeros, a backward pass that frees what it has used, and weights that are cast once.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use kaio_candle::train::{AdamW, AdamWConfig, Schedule};
//!
//! let device = Device::Cpu; // or Device::new_cuda(0)?
//! let weight = Var::randn(0f32, 0.1, (8, 4), &device)?;
//! let bias = Var::zeros(4, candle_core::DType::F32, &device)?;
//!
//! let config = AdamWConfig::default().lr(0.01).clip_norm(1.0).schedule(Schedule::cosine(100).warm_up(10));
//! let named = [("weight", weight.clone()), ("bias", bias.clone())];
//! let mut adamw = AdamW::named(named, config)?.decay_where(|_, var| var.rank() >= 2);
//!
//! let (x, y) = (Tensor::randn(0f32, 1., (16, 8), &device)?, Tensor::randn(0f32, 1., (16, 4), &device)?);
//! for _ in 0..100 {
//!     let loss = (x.matmul(&weight)?.broadcast_add(&bias)? - &y)?.sqr()?.mean_all()?;
//!     adamw.backward_step(&loss)?;
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! Everything here works on variables in f32, f16 and bf16, on the CPU and on GPUs, and waits for nothing: a norm is a
//! tensor on the device. The same gradients give the same bits, for sums have a fixed order.

mod adamw;
mod backward;
mod block;
mod casts;
mod checkpoint;
mod clip;
mod gradients;
mod in_place;
mod memory;
mod options;
mod schedule;
mod state;

pub use adamw::AdamW;
pub use backward::backward;
pub use block::block;
pub use casts::cast_once;
pub use checkpoint::{Outputs, checkpoint};
pub use clip::clip_grad_norm;
pub use gradients::grads_complete;
pub use memory::{peak_memory, reset_peak_memory};
pub use options::{AdamWConfig, Moments};
pub use schedule::Schedule;

#[cfg(feature = "cuda")]
pub(crate) use in_place::{StorageMut, write};
pub(crate) use state::{AdamWCall, AdamWTables, Sum, Update};
