//! From registers to the result by the copy engine, slab after slab.

use super::Gemm;
use super::config::{LINE, Orient, SLAB, WARPGROUP};
use crate::kernel::Element;
use crate::kernel::raster::Tile;
use crate::ptx::{Half, Kernel, Reg};

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
        let lanes = Lanes { lane: thread % 32, warp: thread / 32 % 4 };
        for (turn, batch) in slabs.chunks(step as usize).enumerate() {
            let to = |i: u32| memory + (turn as u32 * step + i) % c.slabs * c.slab_bytes();
            // What was there has left its memory.
            k.when(leader, || k.tma_wait_read(if turn == 0 { 0 } else { 1 }));
            k.barrier_at(group + 1, WARPGROUP);
            for (i, &(sums, row, col)) in (0..).zip(batch) {
                let values = self.finish(sums, first_row + row, first_col + col, lanes);
                match (c.epilogue.out, c.orient) {
                    (Element::Half(half), Orient::Plain) => lanes.write_half(half, &values, to(i)),
                    (Element::Half(half), Orient::Swapped) => {
                        lanes.write_half_columns(half, &values, to(i));
                    }
                    (Element::F32, Orient::Plain) => lanes.write_f32(&values, to(i)),
                    (Element::F32, Orient::Swapped) => lanes.write_f32_columns(&values, to(i)),
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
        lanes: Lanes<'k>,
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
                    let col = first_col + (lanes.lane % 4 * 2 + 8 * block as u32);
                    let bias =
                        load(col).map(|(from, inside)| epilogue.load_bias::<2>(k, from, inside));
                    let bias = |i: usize| bias.map(|pair| pair[i % 2]);
                    out.extend(quad.iter().enumerate().map(|(i, &s)| epilogue.finish(s, bias(i))));
                }
                out
            }
            Orient::Swapped => {
                let rows = [0, 8].map(|below| {
                    let row = first_row + (lanes.warp * 16 + lanes.lane / 4 + below);
                    load(row).map(|(from, inside)| epilogue.load_bias::<1>(k, from, inside)[0])
                });
                let finish = |(i, &sum)| epilogue.finish(sum, rows[i / 2 % 2]);
                sums.iter().enumerate().map(finish).collect()
            }
        }
    }
}

/// A thread's place in its warpgroup, whose warps have 16 rows each, lanes as wgmma has them.
#[derive(Clone, Copy)]
struct Lanes<'k> {
    lane: Reg<'k, u32>,
    warp: Reg<'k, u32>,
}

impl<'k> Lanes<'k> {
    fn kernel(&self) -> &'k Kernel {
        self.lane.kernel()
    }

    /// 64 columns of 16-bit elements, swizzled as the copy engine expects.
    fn write_half(&self, half: Half, columns: &[Reg<'k, f32>], to: Reg<'k, u32>) {
        let Self { lane, warp } = *self;
        let line = warp * 16 + lane % 16;
        let start = to + line * LINE;
        for (i, eight) in columns.chunks(8).enumerate() {
            // Two blocks of 8 columns: lanes 0 to 15 address the first, the others the second.
            let chunk = (lane / 16 + 2 * i as u32) ^ (lane % 8);
            self.kernel().stmatrix(start + chunk * 16, self.pack(half, eight), false);
        }
    }

    /// The same, with the slab's columns as lines.
    fn write_half_columns(&self, half: Half, columns: &[Reg<'k, f32>], to: Reg<'k, u32>) {
        let Self { lane, warp } = *self;
        // Two blocks of 8 columns, of 8 rows and the 8 below them.
        let line = lane / 16 * 8 + lane % 8;
        let chunk = (warp * 2 + lane / 8 % 2) ^ (lane % 8);
        let start = to + line * LINE + chunk * 16;
        for (i, eight) in (0..).zip(columns.chunks(8)) {
            let to = start.at((i * 16 * LINE).into());
            self.kernel().stmatrix(to, self.pack(half, eight), true);
        }
    }

    fn pack(&self, half: Half, eight: &[Reg<'k, f32>]) -> [Reg<'k, u32>; 4] {
        std::array::from_fn(|j| self.kernel().pack(half, eight[2 * j], eight[2 * j + 1]))
    }

    /// 32 columns of f32, swizzled as the copy engine expects.
    fn write_f32(&self, columns: &[Reg<'k, f32>], to: Reg<'k, u32>) {
        let (Self { lane, warp }, k) = (*self, self.kernel());
        let row = lane / 4;
        let start = to + (warp * 16 + row) * LINE + lane % 2 * 8;
        for (i, quad) in columns.chunks(4).enumerate() {
            let chunk = (lane % 4 / 2 + 2 * i as u32) ^ (row % 8);
            let at = start + chunk * 16;
            k.st_shared(at, [quad[0], quad[1]]);
            k.st_shared(at.at((8 * LINE).into()), [quad[2], quad[3]]);
        }
    }

    /// The same, with the slab's columns as lines, in two halves of 32 rows each.
    fn write_f32_columns(&self, columns: &[Reg<'k, f32>], to: Reg<'k, u32>) {
        let (Self { lane, warp }, k) = (*self, self.kernel());
        let row = lane / 4;
        let half = to + warp / 2 * (columns.len() as u32 * 2 * LINE) + row % 4 * 4;
        for odd in 0..2 {
            let line = lane % 4 * 2 + odd;
            for below in 0..2 {
                let chunk = (warp % 2 * 4 + row / 4 + 2 * below) ^ line;
                let start = half + line * LINE + chunk * 16;
                for (i, quad) in (0..).zip(columns.chunks(4)) {
                    let sum = quad[(2 * below + odd) as usize];
                    k.st_shared(start.at((i * 8 * LINE).into()), [sum]);
                }
            }
        }
    }
}
