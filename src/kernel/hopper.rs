//! What kernels for Hopper share: the sizes that its instructions fix, and matrix descriptors.

use crate::ptx::{Operand, Reg};

/// Bytes of a swizzled line: 64 16-bit elements.
pub const LINE: u32 = 128;
/// Eight lines: what the swizzle repeats after.
pub const ATOM: u32 = 8 * LINE;
/// Rows of a wgmma, and lines of a slab.
pub const SLAB: u32 = 64;
pub const SLAB_BYTES: u32 = SLAB * LINE;
pub const WARPGROUP: u32 = 128;
/// Dynamic shared memory that a block can have.
pub const MAX_SHARED: u32 = 232_448;

/// How wgmma finds an operand in shared memory: columns of 64 elements, one after the other, each of
/// swizzled lines.
#[derive(Clone, Copy)]
pub struct Descriptor<'k> {
    low: Reg<'k, u32>,
    /// Bytes of a column.
    column: u32,
    /// Lines are along M or N, and K is from line to line.
    transposed: bool,
}

impl<'k> Descriptor<'k> {
    /// Swizzle of 128 bytes, 1024 bytes between groups of eight lines.
    const HIGH: u32 = 0x4000_0040;

    /// Lines are along K: of columns of `lines` lines that begin at a shared address.
    pub fn along_k(address: Reg<'k, u32>, lines: u32) -> Self {
        // The leading offset is ignored.
        Self { low: address.bits(4, 14) | (1 << 16), column: lines * LINE, transposed: false }
    }

    /// Lines are along M or N: of columns of `lines` lines that begin at a shared address.
    pub fn across_k(address: Reg<'k, u32>, lines: u32) -> Self {
        let column = lines * LINE;
        Self { low: address.bits(4, 14) | ((column / 16) << 16), column, transposed: true }
    }

    /// That of the stage, each of `bytes`.
    pub fn stage(self, stage: Reg<'k, u32>, bytes: u32) -> Self {
        Self { low: stage * (bytes / 16) + self.low, ..self }
    }

    /// That from row or column 64 · `block` on.
    pub fn rows(self, block: u32) -> Self {
        let bytes = match self.transposed {
            false => block * SLAB_BYTES,
            true => block * self.column,
        };
        let low = if bytes == 0 { self.low } else { self.low + bytes / 16 };
        Self { low, ..self }
    }

    /// 16 elements along K.
    pub fn operand(self, step: u32) -> Operand<'k> {
        let bytes = match self.transposed {
            false => step / 4 * self.column + step % 4 * 32,
            true => step * 16 * LINE,
        };
        let low = if bytes == 0 { self.low } else { self.low + bytes / 16 };
        Operand { descriptor: low.with_high(Self::HIGH), transposed: self.transposed }
    }
}
