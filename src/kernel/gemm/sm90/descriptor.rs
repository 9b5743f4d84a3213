//! How wgmma finds an operand's stages in shared memory.

use super::config::{LINE, SLAB_BYTES};
use crate::kernel::gemm::Major;
use crate::ptx::{Operand, Reg};

/// The matrix descriptors of an operand's stages.
#[derive(Clone, Copy)]
pub(super) struct Descriptor<'k> {
    low: Reg<'k, u32>,
    major: Major,
}

impl<'k> Descriptor<'k> {
    /// Swizzle of 128 bytes, 1024 bytes between groups of eight lines.
    const HIGH: u32 = 0x4000_0040;

    /// Of the operand that begins at a shared address.
    pub fn new(address: Reg<'k, u32>, major: Major) -> Self {
        // Along K the leading offset is ignored; else it is that of the next 64 columns.
        let leading = if major == Major::K { 1 } else { SLAB_BYTES / 16 };
        Self { low: address.bits(4, 14) | (leading << 16), major }
    }

    pub fn stage(self, stage: Reg<'k, u32>, bytes: u32) -> Self {
        Self { low: stage * (bytes / 16) + self.low, ..self }
    }

    /// Of the stage from row or column 64 · `block` on.
    pub fn rows(self, block: u32) -> Self {
        let low = if block == 0 { self.low } else { self.low + block * (SLAB_BYTES / 16) };
        Self { low, ..self }
    }

    /// 16 elements of the depth.
    pub fn operand(self, step: u32) -> Operand<'k> {
        let (each, transposed) = match self.major {
            Major::K => (2, false),
            Major::Outer => (16 * LINE / 16, true),
        };
        let low = if step == 0 { self.low } else { self.low + step * each };
        Operand { descriptor: low.with_high(Self::HIGH), transposed }
    }
}
