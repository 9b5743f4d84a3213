//! The 16 bytes that `cp.async` copies and `ldmatrix` reads, and where they lie in lines whose chunks
//! are permuted by XOR.
//!
//! ```text
//!            chunk of a line of 128 bytes
//!  line 0    0 1 2 3 4 5 6 7      A copy by eight threads writes a line: all banks.
//!  line 1    1 0 3 2 5 4 7 6      An 8×8 matrix of ldmatrix is one chunk of eight lines:
//!  line 2    2 3 0 1 6 7 4 5      the same chunk has another place in each, all banks again.
//!  line 3    3 2 1 0 7 6 5 4      A step of two chunks along a line is an XOR of the address.
//!  …
//! ```
//!
//! The formulas work on registers in a kernel and on integers in tests.

use std::ops::{Add, BitXor, Div, Mul, Rem};

use crate::ptx::{Address, Reg};

/// Bytes of one asynchronous copy and of one line of an 8×8 matrix.
pub const CHUNK: u32 = 16;

/// What addresses are computed with.
pub trait Word:
    Copy
    + Add<Output = Self>
    + Add<u32, Output = Self>
    + Mul<u32, Output = Self>
    + Div<u32, Output = Self>
    + Rem<u32, Output = Self>
    + BitXor<Output = Self>
{
}
impl Word for u32 {}
impl Word for Reg<'_, u32> {}

/// The offset of a chunk of a line of `line_bytes`. `phase` says which permutation a line has, by its
/// number: lines have different ones as long as together they fill all banks several times.
pub fn swizzled<T: Word>(line: T, chunk: T, line_bytes: u32, phase: impl FnOnce(T) -> T) -> T {
    line * line_bytes + (chunk ^ (phase(line) % (line_bytes / CHUNK))) * CHUNK
}

/// Which 8×8 matrices a lane addresses for `ldmatrix.x4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MatrixOrder {
    /// (line 0, chunk 0), (8, 0), (0, 1), (8, 1): a left operand of `mma`, or a right one that is
    /// transposed.
    Lines,
    /// (line 0, chunk 0), (0, 1), (8, 0), (8, 1): a right operand, or a left one that is transposed.
    Chunks,
}

impl MatrixOrder {
    /// The line and chunk of a lane.
    pub fn place<T: Word>(self, lane: T) -> (T, T) {
        match self {
            Self::Lines => (lane % 16, lane / 16),
            Self::Chunks => (lane / 16 * 8 + lane % 8, lane / 8 % 2),
        }
    }
}

/// Where a lane finds its part of each 16 lines and two chunks of a swizzled tile.
pub struct Fragments<'k> {
    /// By what is XORed, in units of two chunks.
    from: Vec<Reg<'k, u32>>,
}

impl<'k> Fragments<'k> {
    /// From the address of the first one; `xors` are XORed.
    pub fn new(start: Reg<'k, u32>, xors: u32) -> Self {
        let from = (0..xors).map(|i| if i == 0 { start } else { start ^ (i * 2 * CHUNK) });
        Self { from: from.collect() }
    }

    /// What to XOR, in units of two chunks, then what to add.
    pub fn at(&self, (xor, add): (u32, u32)) -> Address<'k, u32> {
        self.from[xor as usize].at(add.into())
    }
}
