//! From registers to the result by TMA, slab after slab.

use super::Gemm;
use super::config::Orient;
use crate::kernel::gemm::terms::Sum;
use crate::kernel::hopper::store::{Direction, SlabStore};
use crate::kernel::hopper::{LINE, Lane, SLAB, Warpgroup};
use crate::kernel::raster::Tile;
use crate::ptx::Reg;

impl<'k> Gemm<'k, '_> {
    /// Stores slab after slab: from registers to shared memory, from there by TMA.
    pub(super) fn store_slabs<S: Sum>(
        &self,
        accumulators: &[Vec<Reg<'k, S>>],
        map: Reg<'k, u64>,
        tile: Tile<'k>,
        thread: Reg<'k, u32>,
        group: Reg<'k, u32>,
        leader: Reg<'k, bool>,
    ) {
        let c = self.c;
        let first_col = tile.col * c.cols;
        let first_row = match c.pingpong {
            false => tile.row * c.rows + group * SLAB,
            true => tile.row * c.rows,
        };
        let memory = self.base + self.smem.result + group * (c.store_stages * c.slab_bytes());
        let each = c.slab_cols();
        // Where the columns are no multiple of a slab's, the last two overlap.
        let starts = (0..c.cols.div_ceil(each)).map(|i| (i * each).min(c.cols - each));
        let slabs: Vec<_> = (0..)
            .zip(accumulators)
            .flat_map(|(m64, accumulators)| {
                starts.clone().map(move |start| {
                    (&accumulators[start as usize / 2..][..each as usize / 2], m64 * SLAB, start)
                })
            })
            .collect();
        let lane = Lane::new(thread);
        let [width, lines] = c.result_box();
        let store = SlabStore {
            map,
            out: c.epilogue.out,
            direction: match c.orient {
                Orient::Plain => Direction::Rows,
                Orient::Swapped => Direction::Columns,
            },
            memory,
            room: c.store_stages,
            slab_bytes: c.slab_bytes(),
            box_bytes: lines * LINE,
            group: Warpgroup { number: group, lane, leader, meeting: self.smem.meeting },
        };
        store.run(
            &slabs,
            |&(accumulators, row, col)| {
                self.finish(accumulators, tile, first_row + row, first_col + col, lane)
            },
            |&(_, row, col)| {
                let [y, x] = c.orient.order([first_row + row, first_col + col]);
                (0..c.slab_bytes() / store.box_bytes).map(move |j| {
                    let x = if j == 0 { x } else { x + j * width };
                    [x, y].into_iter().chain(c.batched.then_some(tile.batch)).collect()
                })
            },
        );
    }

    /// Scale, bias and activation on a slab's fragments.
    fn finish<S: Sum>(
        &self,
        accumulators: &[Reg<'k, S>],
        tile: Tile<'k>,
        first_row: Reg<'k, u32>,
        first_col: Reg<'k, u32>,
        lane: Lane<'k>,
    ) -> Vec<Reg<'k, f32>> {
        let (terms, [rows, cols]) = (&self.terms, self.size);
        // Rows and columns of `C`, which are the other ones of a tile of `Cᵀ`.
        let of_row = |m: &dyn Fn() -> Reg<'k, u32>| {
            terms.row(|| {
                let m = m();
                (tile.batch_row(self.c.batched, rows, m), m.lt(rows))
            })
        };
        let below = |i: u32| first_row + (lane.warp * 16 + lane.lane / 4 + 8 * i);
        let across = |block: u32| first_col + (lane.lane % 4 * 2 + 8 * block);
        let mut out = Vec::with_capacity(accumulators.len());
        match self.c.orient {
            Orient::Plain => {
                let of_rows = [0, 1].map(|i| of_row(&|| below(i)));
                for (block, quad) in (0..).zip(accumulators.chunks(4)) {
                    let n = across(block);
                    let of_cols = terms.columns::<2>(n, || n.lt(cols));
                    let finish = |(i, &sum)| terms.finish(sum, of_rows[i / 2], of_cols[i % 2]);
                    out.extend(quad.iter().enumerate().map(finish));
                }
            }
            Orient::Swapped => {
                let of_cols = [0, 1].map(|i| {
                    let n = below(i);
                    terms.columns::<1>(n, || n.lt(cols))[0]
                });
                for (block, quad) in (0..).zip(accumulators.chunks(4)) {
                    let of_rows = [0, 1].map(|i| of_row(&|| across(block) + i));
                    let finish = |(i, &sum)| terms.finish(sum, of_rows[i % 2], of_cols[i / 2]);
                    out.extend(quad.iter().enumerate().map(finish));
                }
            }
        }
        out
    }
}
