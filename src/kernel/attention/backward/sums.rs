//! Sums of dQ, to which tiles of keys add: blocks of queries in f32, one after the other, each as the
//! threads of two warpgroups have it in registers.
//!
//! A warpgroup has 64 columns, or 64 of 128 queries; of each eight columns a thread has two neighbours of two rows,
//! 8 apart. On Hopper these four lie side by side. The portable kernels add one number at a time, and a warp's
//! lie side by side then.

use super::super::lengths::Span;
use super::super::{Lengths, Name};
use crate::kernel::hopper::WARPGROUP;
use crate::ptx::{Kernel, Reg};

/// Queries of a block of the portable kernels.
pub const BLOCK: u32 = 64;
/// Bytes that a warpgroup has of eight columns.
pub const OCTET: u32 = 16 * WARPGROUP;
/// Bytes of those from a thread's number to its next one, for the portable kernels.
pub const PLANE: u32 = 4 * WARPGROUP;

/// Where they are.
#[derive(Clone, Copy)]
pub struct DqSums<'k> {
    address: Reg<'k, u64>,
    /// Blocks of a head.
    blocks: Reg<'k, u32>,
    queries: u32,
    bytes: u32,
    packed: bool,
}

/// Blocks of a head, of so many queries each. Those of a packed batch's sequences have blocks of their own.
pub fn blocks(lengths: Lengths, queries: u64, sequences: u64, block: u64) -> u64 {
    let own = if lengths == Lengths::Packed { sequences } else { 0 };
    queries.div_ceil(block) + own
}

impl<'k> DqSums<'k> {
    /// Declares their address: blocks of `queries` queries and `bytes` bytes.
    pub fn params(
        k: &'k Kernel,
        lengths: Lengths,
        [queries, bytes]: [u32; 2],
        size: Reg<'k, i32>,
        sequences: Option<Reg<'k, u32>>,
    ) -> Self {
        let address = k.pointer(Name::DqSums);
        let own = size.cast::<u32>().div_ceil(queries);
        let blocks = sequences.map_or(own, |sequences| own + sequences);
        Self { address, blocks, queries, bytes, packed: lengths == Lengths::Packed }
    }

    /// The number of a head's first block, of a sequence whose queries are `span`; `head` counts those of all
    /// batches.
    pub fn first(
        &self,
        head: Reg<'k, u32>,
        sequence: Reg<'k, u32>,
        span: Span<'k>,
    ) -> Reg<'k, u32> {
        let first = head * self.blocks;
        match span.begin.filter(|_| self.packed) {
            None => first,
            Some(begin) => first + begin / self.queries + sequence,
        }
    }

    /// The address of a block.
    pub fn block(&self, number: Reg<'k, u32>) -> Reg<'k, u64> {
        self.address.element(number, self.bytes)
    }
}
