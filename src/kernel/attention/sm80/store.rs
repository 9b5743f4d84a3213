//! From accumulators to the result: normalised, and stored by the threads.

use super::Attention;
use super::attend::{Lane, M16Tile};
use crate::kernel::Element;
use crate::kernel::ampere::store::{store_row, store_tf32x3_row};
use crate::kernel::attention::work::{Row, Tile};
use crate::kernel::multiprocessor::WARP;
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
        let store_rows = || self.rows_memory.store(&self.tiles, tile, rows, &finished, lane.lane);
        if self.c.variant.stats {
            // They would take registers until the result is stored.
            lane.lane.kernel().apart(lane.lane.lt(WARP), store_rows);
        }
        for (h, row) in rows.iter().enumerate() {
            let normalised =
                |&sum: &Reg<'k, f32>| row.unless_padding(sum * finished.inverse[h], 0.0);
            let of_row = m16.o.chunks(4).map(|quad| &quad[2 * h..][..2]);
            let pairs: Vec<[_; 2]> =
                of_row.map(|pair| [normalised(&pair[0]), normalised(&pair[1])]).collect();
            let (out, variant) = (&self.out, &self.c.variant);
            let at = |start, col| out.at(start, tile, row, col, variant.out.size());
            match self.c.element {
                Element::Half(_) => {
                    let start = out.start(tile);
                    store_row(variant.out, &pairs, lane.lane, row.inside, |col| at(start, col));
                }
                Element::F32 => {
                    let dim = variant.value_dim.into();
                    store_tf32x3_row(dim, &pairs, lane.lane, row.inside, |col| {
                        at(out.start(tile), col)
                    });
                }
            }
        }
        if !self.c.variant.stats {
            store_rows();
        }
    }
}
