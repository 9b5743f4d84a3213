//! What every multiprocessor has, from Ampere on.

/// Lanes of a warp.
pub const WARP: u32 = 32;
/// Registers.
pub const REGISTERS: u32 = 65_536;
/// Bytes of shared memory that it reserves for each block.
const RESERVED: u32 = 1024;

/// Bytes of shared memory that each of `blocks` can have, where one alone can have `limit`.
pub fn shared_of_each(limit: u32, blocks: u32) -> u32 {
    ((limit + RESERVED) / blocks.max(1)).saturating_sub(RESERVED)
}
