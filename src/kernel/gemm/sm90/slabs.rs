//! From registers to the result by the copy engine, slab after slab.

use super::Gemm;
use super::config::Orient;
use crate::kernel::hopper::{LINE, SLAB, WARPGROUP};
use crate::kernel::raster::Tile;
use crate::kernel::slab::{self, Seat};
use crate::ptx::Reg;

impl<'k> Gemm<'k, '_> {
    /// Slab after slab: registers to shared memory, from there by the copy engine.
    pub(super) fn store_slabs(
        &self,
        sums: &[Vec<Reg<'k, f32>>],
        map: Reg<'k, u64>,
        tile: Tile<'k>,
        thread: Reg<'k, u32>,
        group: Reg<'k, u32>,
        leader: Reg<'k, bool>,
    ) {
        let (k, c) = (self.k, self.c);
        let first_col = tile.col * c.cols;
        let first_row = match c.pingpong {
            false => tile.row * c.rows + group * SLAB,
            true => tile.row * c.rows,
        };
        let memory = self.base + self.plan.result + group * (c.slabs * c.slab_bytes());
        let each = c.slab_cols();
        // Where the columns are no multiple of a slab's, the last two overlap.
        let starts = (0..c.cols.div_ceil(each)).map(|i| (i * each).min(c.cols - each));
        let slabs: Vec<_> = (0..)
            .zip(sums)
            .flat_map(|(chain, sums)| {
                starts.clone().map(move |start| {
                    (&sums[start as usize / 2..][..each as usize / 2], chain * SLAB, start)
                })
            })
            .collect();
        let count = slabs.len() as u32;
        // All at once if they fit, else half of the memory is written while the other is read.
        let step = if count <= c.slabs { count } else { c.slabs / 2 };
        let seat = Seat { lane: thread % 32, warp: thread / 32 % 4 };
        for (turn, batch) in slabs.chunks(step as usize).enumerate() {
            let to = |i: u32| memory + (turn as u32 * step + i) % c.slabs * c.slab_bytes();
            // What was there has left its memory.
            k.when(leader, || k.tma_wait_read(if turn == 0 { 0 } else { 1 }));
            k.barrier_at(group + 1, WARPGROUP);
            for (i, &(sums, row, col)) in (0..).zip(batch) {
                let values = self.finish(sums, first_row + row, first_col + col, seat);
                match c.orient {
                    Orient::Plain => slab::write(k, c.epilogue.out, &values, to(i), seat),
                    Orient::Swapped => slab::write_columns(k, c.epilogue.out, &values, to(i), seat),
                }
            }
            k.fence_proxy_async();
            k.barrier_at(group + 1, WARPGROUP);
            let [width, lines] = c.result_box();
            for (i, &(_, row, col)) in (0..).zip(batch) {
                let [y, x] = c.orient.order([first_row + row, first_col + col]);
                for j in 0..c.slab_bytes() / (lines * LINE) {
                    let mut at = vec![if j == 0 { x } else { x + j * width }, y];
                    at.extend(c.batched.then_some(tile.batch));
                    let from = to(i).at((j * lines * LINE).into());
                    k.when(leader, || k.tma_store(map, &at, from));
                }
            }
            k.when(leader, || k.tma_commit());
        }
    }

    /// Bias and activation on a slab's fragments.
    fn finish(
        &self,
        sums: &[Reg<'k, f32>],
        first_row: Reg<'k, u32>,
        first_col: Reg<'k, u32>,
        seat: Seat<'k>,
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
                let mut out = Vec::with_capacity(sums.len());
                for (block, quad) in sums.chunks(4).enumerate() {
                    let col = first_col + (seat.lane % 4 * 2 + 8 * block as u32);
                    let bias =
                        load(col).map(|(from, inside)| epilogue.load_bias::<2>(k, from, inside));
                    let bias = |i: usize| bias.map(|pair| pair[i % 2]);
                    out.extend(quad.iter().enumerate().map(|(i, &s)| epilogue.finish(s, bias(i))));
                }
                out
            }
            Orient::Swapped => {
                let rows = [0, 8].map(|below| {
                    let row = first_row + (seat.warp * 16 + seat.lane / 4 + below);
                    load(row).map(|(from, inside)| epilogue.load_bias::<1>(k, from, inside)[0])
                });
                let finish = |(i, &sum)| epilogue.finish(sum, rows[i / 2 % 2]);
                sums.iter().enumerate().map(finish).collect()
            }
        }
    }
}
