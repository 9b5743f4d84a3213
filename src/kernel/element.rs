//! Element types, and what of a kernel follows from their sizes.

use crate::ptx::Half;

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
    pub const fn size(self) -> u32 {
        match self {
            Self::F32 => 4,
            Self::Half(_) => 2,
        }
    }

    /// Those of a line of shared memory that TMA swizzles: 128 bytes.
    pub const fn per_line(self) -> u32 {
        128 / self.size()
    }

    /// Those of what a thread copies at once: 16 bytes.
    pub const fn per_chunk(self) -> u32 {
        16 / self.size()
    }

    /// Those along K of one instruction of tensor cores: 32 bytes.
    pub const fn k_step(self) -> u32 {
        32 / self.size()
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Half(half) => half.name(),
        }
    }
}
