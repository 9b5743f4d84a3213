//! From accumulators to the result: normalised, and stored by the threads.

use super::Attention;
use super::attend::{Lane, M16Tile};
use crate::kernel::Element;
use crate::kernel::attention::work::{Row, Tile};
use crate::ptx::Reg;

impl<'k> Attention<'k, '_> {
    /// Stores the result of an m16 tile.
    pub(super) fn store(
        &self,
        m16: &M16Tile<'k>,
        tile: &Tile<'k>,
        lane: Lane<'k>,
        rows: [Row<'k>; 2],
    ) {
        let finished = m16.softmax.finish(self.c.variant.stats);
        for (h, row) in rows.iter().enumerate() {
            let normalised =
                |&sum: &Reg<'k, f32>| row.unless_padding(sum * finished.inverse[h], 0.0);
            let of_row = m16.o.chunks(4).map(|quad| &quad[2 * h..][..2]);
            let pairs: Vec<[_; 2]> =
                of_row.map(|pair| [normalised(&pair[0]), normalised(&pair[1])]).collect();
            match self.c.element {
                Element::Half(_) => self.store_row(tile, lane, row, &pairs),
                Element::F32 => self.store_tf32x3_row(tile, lane, row, &pairs),
            }
        }
        self.rows_memory.store(&self.tiles, tile, rows, &finished, lane.lane);
    }

    /// Stores a row, of which this lane has the pairs from column `2 · (lane % 4)` of each 8 on.
    fn store_row(
        &self,
        tile: &Tile<'k>,
        lane: Lane<'k>,
        row: &Row<'k>,
        pairs: &[[Reg<'k, f32>; 2]],
    ) {
        let (k, size) = (self.k, self.c.variant.out.size());
        let start = self.out.start(tile);
        let at = |col: Reg<'k, u32>| self.out.at(start, tile, row, col, size);
        let bytes = |col: usize| (col * size as usize) as i64;
        let col = lane.lane % 4 * 2;
        match self.c.variant.out {
            Element::F32 => {
                let at = at(col);
                k.if_(row.inside, || {
                    for (j, &pair) in pairs.iter().enumerate() {
                        k.st_global(at.at(bytes(8 * j)), pair);
                    }
                });
            }
            Element::Half(half) => {
                let pairs: Vec<_> = pairs.iter().map(|&[a, b]| k.cvt_rn_x2(half, a, b)).collect();
                // Even lanes take both lanes' pairs of 8 columns, odd ones those of the next 8: the
                // four lanes of a row store 32 bytes together.
                let odd = (lane.lane % 2).ne(0);
                let both = pairs.chunks_exact(2);
                let rest = both.remainder();
                let quads: Vec<_> = both
                    .map(|pair| {
                        let kept = k.select(odd, pair[1], pair[0]);
                        let got = k.shfl_bfly(k.select(odd, pair[0], pair[1]), 1);
                        [k.select(odd, got, kept), k.select(odd, kept, got)]
                    })
                    .collect();
                let first = at(col + lane.lane % 2 * 6);
                let last = rest.first().map(|&pair| (pair, at(col)));
                k.if_(row.inside, || {
                    for (j, &quad) in quads.iter().enumerate() {
                        k.st_global(first.at(bytes(16 * j)), quad);
                    }
                    if let Some((pair, last)) = last {
                        k.st_global(last.at(bytes(16 * quads.len())), [pair]);
                    }
                });
            }
        }
    }

    /// Stores a row of [`multiply_values_tf32x3`](Self::multiply_values_tf32x3): of each 32 columns this lane
    /// has eight that follow each other, the first four of them the first ones of four pairs.
    fn store_tf32x3_row(
        &self,
        tile: &Tile<'k>,
        lane: Lane<'k>,
        row: &Row<'k>,
        pairs: &[[Reg<'k, f32>; 2]],
    ) {
        let (k, size) = (self.k, self.c.variant.out.size());
        let col = lane.lane % 4 * 8;
        let at = self.out.at(self.out.start(tile), tile, row, col, size);
        for (panel, pairs) in (0..).zip(pairs.chunks(4)) {
            let first = panel * 32;
            let inside = match first + 32 <= self.c.variant.value_dim {
                true => row.inside,
                false => row.inside & col.lt(self.c.variant.value_dim - first),
            };
            k.if_(inside, || {
                for half in 0..2 {
                    let to = at.at(((first + 4 * half) * size).into());
                    let quad: [_; 4] = std::array::from_fn(|j| pairs[j][half as usize]);
                    k.st_global(to, quad);
                }
            });
        }
    }
}
