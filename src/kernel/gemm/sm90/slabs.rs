//! From registers to the result by TMA, slab after slab.

use super::Gemm;
use super::config::Orient;
use crate::kernel::hopper::store::{Direction, SlabStore};
use crate::kernel::hopper::{LINE, Lane, SLAB, Warpgroup};
use crate::kernel::raster::Tile;
use crate::ptx::Reg;

impl<'k> Gemm<'k, '_> {
    /// Stores slab after slab: from registers to shared memory, from there by TMA.
    pub(super) fn store_slabs(
        &self,
        accumulators: &[Vec<Reg<'k, f32>>],
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
                self.finish(accumulators, first_row + row, first_col + col, lane)
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

    /// Bias and activation on a slab's fragments.
    fn finish(
        &self,
        accumulators: &[Reg<'k, f32>],
        first_row: Reg<'k, u32>,
        first_col: Reg<'k, u32>,
        lane: Lane<'k>,
    ) -> Vec<Reg<'k, f32>> {
        let (k, epilogue) = (self.k, &self.c.epilogue);
        let load = |n: Reg<'k, u32>| {
            self.bias.map(|address| {
                let from = address.element(n, epilogue.bias_size());
                (from, n.lt(self.size[1]))
            })
        };
        match self.c.orient {
            Orient::Plain => {
                let mut out = Vec::with_capacity(accumulators.len());
                for (block, quad) in accumulators.chunks(4).enumerate() {
                    let col = first_col + (lane.lane % 4 * 2 + 8 * block as u32);
                    let bias =
                        load(col).map(|(from, inside)| epilogue.load_bias::<2>(k, from, inside));
                    let bias = |i: usize| bias.map(|pair| pair[i % 2]);
                    out.extend(quad.iter().enumerate().map(|(i, &s)| epilogue.finish(s, bias(i))));
                }
                out
            }
            Orient::Swapped => {
                let rows = [0, 8].map(|below| {
                    let row = first_row + (lane.warp * 16 + lane.lane / 4 + below);
                    load(row).map(|(from, inside)| epilogue.load_bias::<1>(k, from, inside)[0])
                });
                let finish = |(i, &sum)| epilogue.finish(sum, rows[i / 2 % 2]);
                accumulators.iter().enumerate().map(finish).collect()
            }
        }
    }
}
