//! The 16 bytes that `cp.async` copies and `ldmatrix` reads, and what their addresses are computed with.

use std::ops::{Add, BitXor, Div, Mul, Rem};

use crate::ptx::Reg;

/// Bytes of one asynchronous copy and of one line of an 8×8 matrix.
pub const CHUNK: u32 = 16;
/// Elements of those.
pub const CHUNK_ELEMENTS: u32 = 8;

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
