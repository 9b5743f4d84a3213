//! The native kernels: from the facts of a problem to PTX, as pure functions.
//!
//! A problem holds facts, a chooser turns it into a configuration, which holds all choices, and an
//! emitter turns that into PTX. Nothing here knows candle, the driver or a GPU: the configuration
//! alone decides the text, so that it is the key under which compiled kernels are kept.

mod ampere;
pub mod attention;
mod epilogue;
pub mod gemm;
pub(crate) mod hopper;
mod multiprocessor;
mod name;
pub mod params;
mod plan;
mod raster;

pub use plan::{Plan, Step};

use crate::ptx::{Half, Source, Target};

/// An element type in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Element {
    /// f32.
    F32,
    /// f16 or bf16.
    Half(Half),
}

impl Element {
    /// Bytes.
    pub fn size(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::Half(_) => 2,
        }
    }
}

/// What kernels are chosen for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Device {
    /// What kernels are assembled for.
    pub target: Target,
    /// Multiprocessors.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block can have.
    pub shared_per_block: u32,
}

/// A kernel of this crate, with all its choices made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Config {
    /// A product on Hopper.
    MatmulSm90(gemm::sm90::Config),
    /// A product on any GPU from Ampere on.
    MatmulSm80(gemm::sm80::Config),
    /// The sum of a product's parts.
    MatmulReduce(gemm::sm80::Reduce),
    /// Attention on Hopper.
    FlashSm90(attention::sm90::Config),
    /// Attention on any GPU from Ampere on.
    FlashSm80(attention::sm80::Config),
    /// The results of an attention's parts, put together.
    FlashCombine(attention::combine::Config),
}

impl Config {
    /// The kernel.
    pub fn emit(&self) -> Source {
        match self {
            Self::MatmulSm90(config) => gemm::sm90::emit(config),
            Self::MatmulSm80(config) => gemm::sm80::emit(config),
            Self::MatmulReduce(config) => gemm::sm80::emit_reduce(config),
            Self::FlashSm90(config) => attention::sm90::emit(config),
            Self::FlashSm80(config) => attention::sm80::emit(config),
            Self::FlashCombine(config) => attention::combine::emit(config),
        }
    }
}

/// Hands out shared memory: each region has one owner and an offset that nobody types in.
#[derive(Debug, Default)]
pub(crate) struct Arena {
    pub used: u32,
}

impl Arena {
    /// The offset of the next region.
    pub fn region(&mut self, bytes: u32, align: u32) -> u32 {
        let offset = self.used.next_multiple_of(align);
        self.used = offset + bytes;
        offset
    }
}
