//! The products of a block of keys for 16-bit operands: each part of keys and values that a warp
//! loads is multiplied with all of its m16 tiles.

use super::Attention;
use super::attend::Thread;
use super::tile::SwizzledTile;
use crate::kernel::ampere::swizzle::Fragments;
use crate::ptx::{Half, Mma, Reg};

/// 16 rows by two chunks, as `mma` takes them.
pub(super) type Fragment<'k> = [Reg<'k, u32>; 4];

/// Where a lane finds its parts of lines, given that of the first.
pub(super) fn fragments<'k>(lines: SwizzledTile, start: Reg<'k, u32>) -> Fragments<'k> {
    Fragments::new(start, lines.steps().min(SwizzledTile::STEPS))
}

impl<'k> Attention<'k, '_> {
    /// The products of the warp's queries and a block of keys.
    pub(super) fn multiply_keys(&self, half: Half, t: &Thread<'k>) {
        let (k, c) = (self.k, self.c);
        let queries = fragments(c.query_tile(), t.places[0]);
        let keys = fragments(c.key_tile(), t.places[1] + t.stage);
        t.m16_tiles.iter().flat_map(|m16| &m16.scores).for_each(|score| score.set(0.0));
        for step in 0..c.query_tile().steps() {
            let left = t.m16_tiles.iter().zip(0..).map(|(m16, block)| {
                let in_regs = m16.queries.get(step as usize).copied();
                in_regs.unwrap_or_else(|| {
                    k.ldmatrix(queries.at(c.query_tile().block(block, step)), false)
                })
            });
            let left: Vec<_> = left.collect();
            for block in 0..c.keys / 16 {
                let right = k.ldmatrix(keys.at(c.key_tile().block(block, step)), false);
                for (m16, &a) in t.m16_tiles.iter().zip(&left) {
                    self.multiply(half, &m16.scores, block, a, right);
                }
            }
        }
    }

    /// Accumulators as left operands, of 16 keys each.
    pub(super) fn left(&self, half: Half, sums: &[Reg<'k, f32>]) -> Vec<Fragment<'k>> {
        let pack = |i: usize, eight: &[Reg<'k, f32>]| {
            self.k.cvt_rn_x2(half, eight[2 * i], eight[2 * i + 1])
        };
        sums.chunks(8).map(|eight| std::array::from_fn(|i| pack(i, eight))).collect()
    }

    /// Adds the products of each m16 tile's exponentials and a block of values.
    pub(super) fn multiply_values(&self, half: Half, t: &Thread<'k>, p: &[Vec<Fragment<'k>>]) {
        let (k, c) = (self.k, self.c);
        let values = fragments(c.value_tile(), t.places[2] + t.stage);
        for block in 0..c.keys / 16 {
            for step in 0..c.value_tile().steps() {
                let right = k.ldmatrix(values.at(c.value_tile().block(block, step)), true);
                for (m16, p) in t.m16_tiles.iter().zip(p) {
                    self.multiply(half, &m16.o, step, p[block as usize], right);
                }
            }
        }
    }

    /// Adds a product of 16×16 elements to the 16 columns from `16 · at` on, or to the 8 that there are.
    fn multiply(
        &self,
        half: Half,
        sums: &[Reg<'k, f32>],
        at: u32,
        a: Fragment<'k>,
        b: Fragment<'k>,
    ) {
        for (sums, b) in sums[8 * at as usize..].chunks(4).zip(b.chunks(2)) {
            let sums = sums.try_into().expect("columns are a multiple of 8");
            self.k.mma(half, sums, Mma { a, b: [b[0], b[1]] });
        }
    }
}
