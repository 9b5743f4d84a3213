//! From accumulators to the result: normalised, staged, stored.

use super::Attention;
use super::attend::Group;
use crate::kernel::Element;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::softmax::Finished;
use crate::kernel::attention::work::{OutputView, Row, Tile};
use crate::kernel::hopper::SLAB_BYTES;
use crate::kernel::hopper::store::{Direction, SlabStore};
use crate::ptx::Reg;

impl<'k> Attention<'k, '_> {
    /// Stores this warpgroup's part of a tile's result.
    pub(super) fn store(&self, g: &Group<'k>, tile: &Tile<'k>, finished: Finished<'k>) {
        let (k, c) = (self.k, self.c);
        let rows = self.rows(g, tile);
        let normalised = |(i, &sum): (usize, &Reg<'k, f32>)| {
            let row = i / 2 % 2;
            rows[row].unless_padding(sum * finished.inverse[row], 0.0)
        };
        let sums: Vec<_> = g.o.iter().enumerate().map(normalised).collect();
        let first = tile.first + (g.warps.number * c.positions()).cast();
        match (self.out_map, self.out_memory) {
            (Some(map), None) => self.store_slabs(g, tile, map, first, &sums),
            (None, Some(memory)) => self.store_rows(g, tile, memory, rows, &sums),
            (Some(map), Some(memory)) => {
                // TMA would write over the next sequence.
                debug_assert_eq!(c.variant.lengths, Lengths::Packed);
                let whole = (first + c.positions() as i32).le(tile.queries.count);
                k.if_else(
                    whole,
                    || self.store_slabs(g, tile, map, first, &sums),
                    || self.store_rows(g, tile, memory, rows, &sums),
                );
            }
            (None, None) => unreachable!("there is a result"),
        }
        self.rows_memory.store(&self.tiles, tile, rows, &finished, g.warps.lane.lane);
    }

    /// Stores slab after slab: from registers to shared memory, from there by TMA.
    fn store_slabs(
        &self,
        g: &Group<'k>,
        tile: &Tile<'k>,
        map: Reg<'k, u64>,
        first: Reg<'k, i32>,
        sums: &[Reg<'k, f32>],
    ) {
        let (k, c) = (self.k, self.c);
        let store = SlabStore {
            map,
            out: c.variant.out,
            adds: false,
            direction: Direction::Rows,
            memory: self.staged(g),
            room: if c.store_stages == 0 { c.head_slabs() } else { c.store_stages },
            slab_bytes: SLAB_BYTES,
            box_bytes: SLAB_BYTES,
            group: g.warps,
        };
        let slabs: Vec<_> = (0..).zip(sums.chunks((c.slab_cols() / 2) as usize)).collect();
        let position = tile.queries.at(first);
        store.run(
            &slabs,
            |(_, sums)| sums.to_vec(),
            |(number, _)| {
                let mut at = vec![k.var(number * c.slab_cols())];
                at.extend((c.variant.pack > 1).then(|| k.var(0)));
                at.extend([position, tile.pack, tile.batch]);
                [at]
            },
        );
        if c.store_stages == 0 {
            // The next queries come here.
            k.when(g.warps.leader, || k.tma_wait_read(0));
        }
    }

    /// The threads store pair after pair.
    fn store_rows(
        &self,
        g: &Group<'k>,
        tile: &Tile<'k>,
        memory: OutputView<'k>,
        rows: [Row<'k>; 2],
        sums: &[Reg<'k, f32>],
    ) {
        let (k, c) = (self.k, self.c);
        let size = c.variant.out.size();
        let start = memory.start(tile);
        let col = g.warps.lane.lane % 4 * 2;
        for (h, row) in rows.iter().enumerate() {
            let at = memory.at(start, tile, row, col, size);
            let pairs: Vec<_> = sums.chunks(4).map(|quad| &quad[2 * h..][..2]).collect();
            k.if_(row.inside, || {
                for (j, pair) in pairs.iter().enumerate() {
                    let to = at.at(8 * j as i64 * i64::from(size));
                    match c.variant.out {
                        Element::F32 => k.st_global(to, [pair[0], pair[1]]),
                        Element::Half(half) => {
                            k.st_global(to, [k.cvt_rn_x2(half, pair[0], pair[1])]);
                        }
                    }
                }
            });
        }
    }
}
