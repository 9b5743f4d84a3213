//! Products of 16-bit operands by `mma.sync`. A warp has one or more m16 tiles, of 16 rows each; what it loads of
//! the right operand is multiplied with all of them.

use super::swizzle::Fragments;
use super::tile::SwizzledTile;
use crate::ptx::{Half, Kernel, Mma, Reg};

/// Rows of an m16 tile: those of an `mma`.
pub const M16: u32 = 16;

/// 16 rows by two chunks, as `mma` takes them.
pub type Fragment<'k> = [Reg<'k, u32>; 4];

/// Lines in shared memory.
#[derive(Clone, Copy)]
pub struct Lines<'k> {
    pub tile: SwizzledTile,
    /// Where a lane finds its part of the first 16 lines and two chunks, but for `region`.
    pub start: Reg<'k, u32>,
    /// Bytes, a multiple of [`SwizzledTile::ALIGN`]: operands whose places differ in them alone share registers.
    pub region: u32,
}

impl<'k> Lines<'k> {
    /// Where a lane finds its parts of all of them, but for the region.
    pub fn fragments(&self) -> Fragments<'k> {
        Fragments::new(self.start, self.tile.steps().min(SwizzledTile::STEPS))
    }

    /// The offset of 16 lines and a step from there: see [`SwizzledTile::block`].
    pub fn block(&self, block: u32, step: u32) -> (u32, u32) {
        let (xor, add) = self.tile.block(block, step);
        (xor, add + self.region)
    }
}

/// `left·linesᵀ`: sets the sums of each m16 tile. `left` gives the fragments of the m16 tiles at a step along the
/// lines.
pub fn multiply_lines<'k>(
    half: Half,
    sums: &[&[Reg<'k, f32>]],
    left: impl Fn(u32) -> Vec<Fragment<'k>>,
    lines: Lines<'k>,
) {
    let k = lines.start.kernel();
    let right = lines.fragments();
    sums.iter().copied().flatten().for_each(|sum| sum.set(0.0));
    for step in 0..lines.tile.steps() {
        let left = left(step);
        for block in 0..lines.tile.count / 16 {
            let right = k.ldmatrix(right.at(lines.block(block, step)), false);
            for (sums, &a) in sums.iter().zip(&left) {
                multiply(k, half, sums, block, a, right);
            }
        }
    }
}

/// `left·lines`: adds to the sums of each m16 tile, which has a fragment for each 16 lines.
pub fn add_lines<'k>(
    half: Half,
    sums: &[&[Reg<'k, f32>]],
    left: &[Vec<Fragment<'k>>],
    lines: Lines<'k>,
) {
    let k = lines.start.kernel();
    let right = lines.fragments();
    for block in 0..lines.tile.count / 16 {
        for step in 0..lines.tile.steps() {
            let right = k.ldmatrix(right.at(lines.block(block, step)), true);
            for (sums, left) in sums.iter().zip(left) {
                multiply(k, half, sums, step, left[block as usize], right);
            }
        }
    }
}

/// Accumulators as left operands, of 16 columns each.
pub fn left<'k>(half: Half, sums: &[Reg<'k, f32>]) -> Vec<Fragment<'k>> {
    let pack = |i: usize, eight: &[Reg<'k, f32>]| {
        let (low, high) = (eight[2 * i], eight[2 * i + 1]);
        low.kernel().cvt_rn_x2(half, low, high)
    };
    sums.chunks(8).map(|eight| std::array::from_fn(|i| pack(i, eight))).collect()
}

/// Adds a product of 16×16 elements to the 16 columns from `16 · at` on, or to the 8 that there are.
fn multiply<'k>(
    k: &'k Kernel,
    half: Half,
    sums: &[Reg<'k, f32>],
    at: u32,
    a: Fragment<'k>,
    b: Fragment<'k>,
) {
    for (sums, b) in sums[8 * at as usize..].chunks(4).zip(b.chunks(2)) {
        let sums = sums.try_into().expect("columns are a multiple of 8");
        k.mma(half, sums, Mma { a, b: [b[0], b[1]] });
    }
}
