//! Split K: the part of a tile's depth that each of several blocks takes.

use crate::ptx::Reg;

/// A block's stages of the depth.
#[derive(Clone, Copy)]
pub(in crate::kernel) struct Share<'k> {
    pub first: Reg<'k, u32>,
    pub count: Reg<'k, u32>,
}

impl<'k> Share<'k> {
    /// The share of block `part` of `split`: `depth` stages in equal parts, and what is left over one each to
    /// the first blocks.
    pub fn new(depth: Reg<'k, u32>, split: u32, part: impl FnOnce() -> Reg<'k, u32>) -> Self {
        let k = depth.kernel();
        if split == 1 {
            return Self { first: k.var(0), count: depth };
        }
        let part = part();
        let (each, more) = (depth / split, depth % split);
        let one = k.var(1u32);
        let extra = k.select(part.lt(more), one, 0);
        Self { first: part * each + part.min(more), count: each + extra }
    }
}
