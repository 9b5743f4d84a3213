//! The one door to the GPU.
//!
//! The ops call the functions of [`engines`]; without the feature `cuda` they are an error that says
//! so, which keeps `cfg` out of the ops.

#[cfg(feature = "cuda")]
mod driver;
#[cfg(feature = "cuda")]
mod empty;
mod engines;
#[cfg(feature = "cuda")]
mod epilogue;
#[cfg(feature = "cuda")]
mod fit;
#[cfg(feature = "cuda")]
mod kaio_ops;
#[cfg(feature = "cuda")]
pub mod launch;
#[cfg(feature = "cuda")]
pub mod native;
#[cfg(feature = "cuda")]
pub mod registry;
#[cfg(feature = "cuda")]
mod scaled;
#[cfg(feature = "cuda")]
mod session;

pub(crate) use engines::*;

/// A storage and where its matrices are.
pub(crate) type Operand<'a> = (&'a candle_core::CudaStorage, &'a crate::stack::Stack);
