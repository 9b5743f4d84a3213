//! From registers to the result: by the copy engine in slabs, or staged in shared memory.

use super::Gemm;
use super::config::{LINE, Orient, SLAB, SLAB_BYTES, WARPGROUP};
use crate::kernel::Element;
use crate::kernel::gemm::result::TileOfResult;
use crate::kernel::raster::Tile;
use crate::ptx::{Half, Kernel, Reg};

impl<'k> Gemm<'k, '_> {
    /// Slab after slab: registers to shared memory, from there by the copy engine.
    pub(super) fn store_slabs(
        &self,
        sums: &[Reg<'k, f32>],
        map: Reg<'k, u64>,
        tile: Tile<'k>,
        thread: Reg<'k, u32>,
        group: Reg<'k, u32>,
        leader: Reg<'k, bool>,
    ) {
        let (k, c) = (self.k, self.c);
        let (lane, warp) = (thread % 32, thread / 32 % 4);
        let first_col = tile.col * c.cols;
        let first_row = tile.row * c.rows + group * SLAB;
        let slabs = self.base + self.plan.result + group * (c.slabs * SLAB_BYTES);
        let each = c.slab_cols();
        let count = c.cols / each;
        // All at once if they fit, else half of the memory is written while the other is read.
        let (step, pending) = if count <= c.slabs { (count, 0) } else { (c.slabs / 2, 1) };
        for batch in (0..count).step_by(step as usize) {
            let batch = batch..count.min(batch + step);
            let to = |slab: u32| slabs + slab % c.slabs * SLAB_BYTES;
            // What was there has left its memory.
            k.when(leader, || k.tma_wait_read(pending));
            k.barrier_at(group + 1, WARPGROUP);
            for slab in batch.clone() {
                let columns = &sums[(slab * each / 2) as usize..][..(each / 2) as usize];
                let columns = self.finish(columns, first_col + slab * each, lane);
                match c.epilogue.out {
                    Element::Half(half) => {
                        write_half_slab(k, half, &columns, to(slab), lane, warp);
                    }
                    Element::F32 => write_f32_slab(k, &columns, to(slab), lane, warp),
                }
            }
            k.fence_proxy_async();
            k.barrier_at(group + 1, WARPGROUP);
            for slab in batch {
                let mut at = vec![first_col + slab * each, first_row];
                at.extend(c.batched.then_some(tile.batch));
                k.when(leader, || k.tma_store(map, &at, to(slab)));
            }
            k.when(leader, || k.tma_commit());
        }
    }

    /// Bias and activation on a slab's fragments.
    fn finish(
        &self,
        sums: &[Reg<'k, f32>],
        first_col: Reg<'k, u32>,
        lane: Reg<'k, u32>,
    ) -> Vec<Reg<'k, f32>> {
        let (k, epilogue) = (self.k, &self.c.epilogue);
        let mut out = Vec::with_capacity(sums.len());
        for (block, quad) in sums.chunks(4).enumerate() {
            let bias = self.bias.map(|address| {
                let col = first_col + (lane % 4 * 2 + 8 * block as u32);
                let from = address.element(col, epilogue.bias_size());
                epilogue.load_bias::<2>(k, from, col.lt(self.size[1]))
            });
            let bias = |i: usize| bias.map(|pair| pair[i % 2]);
            out.extend(quad.iter().enumerate().map(|(i, &sum)| epilogue.finish(sum, bias(i))));
        }
        out
    }

    /// Writes this warpgroup's sums as f32 over the stages, in the order of `C`.
    pub(super) fn stage(&self, sums: &[Reg<'k, f32>], thread: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let (lane, warp) = (thread % 32, thread / 32);
        let row = warp * 16 + lane / 4;
        let col = lane % 4 * 2;
        let pitch = c.staged_pitch();
        let staged = self.base + self.plan.result;
        // All of the block's wgmma have read the stages, or its threads the tile before this one.
        k.barrier(1, WARPGROUP * c.consumers());
        match c.orient {
            Orient::Plain => {
                let to = staged + (row * pitch + col) * 4;
                for (j, quad) in sums.chunks(4).enumerate() {
                    for h in 0..2 {
                        let at = (8 * h * pitch as usize + 8 * j) * 4;
                        k.st_shared(to.at(at as i64), [quad[2 * h], quad[2 * h + 1]]);
                    }
                }
            }
            Orient::Swapped => {
                let to = staged + (col * pitch + row) * 4;
                for (j, quad) in sums.chunks(4).enumerate() {
                    for (i, &sum) in quad.iter().enumerate() {
                        let (h, c) = (i / 2, i % 2);
                        let at = ((8 * j + c) * pitch as usize + 8 * h) * 4;
                        k.st_shared(to.at(at as i64), [sum]);
                    }
                }
            }
        }
        match c.split {
            1 => k.barrier(1, WARPGROUP * c.consumers()),
            _ => k.sync_cluster(),
        }
    }

    /// Adds up the blocks' staged tiles, each block a share of them in the same order, and stores.
    pub(super) fn store_staged(
        &self,
        unit: u32,
        out: Reg<'k, u64>,
        tile: Tile<'k>,
        thread: Reg<'k, u32>,
    ) {
        let (k, c) = (self.k, self.c);
        let [(row, lines), (col, width)] = c.orient.order([(tile.row, c.rows), (tile.col, c.cols)]);
        let first = (row * lines, col * width);
        let parts: Vec<_> = match c.split {
            1 => vec![self.base + self.plan.result],
            split => (0..split).map(|rank| k.mapa(self.base + self.plan.result, rank)).collect(),
        };
        let threads = WARPGROUP * c.consumers();
        let mine = match c.split {
            1 => thread,
            _ => k.cluster_rank() * threads + thread,
        };
        let units = lines * width / unit;
        let stride = threads * c.split;
        let result = TileOfResult {
            epilogue: c.epilogue,
            out,
            rows: self.size[0],
            cols: self.size[1],
            bias: self.bias,
            first,
            batch: tile.batch,
        };
        // Four at a time, so that their loads are under way together; in a loop, so that no more are:
        // ptxas would compute the addresses of all of them first, and spill. The last ones follow.
        // Two at a time where two blocks of three warpgroups share the registers.
        let together = if c.consumers() * c.blocks_per_sm == 4 { 2 } else { 4 };
        let turns = units / stride / together;
        let whole = if turns > 1 { together * turns } else { 0 };
        let some = |first: Reg<'k, u32>, rounds: std::ops::Range<u32>| {
            let sums: Vec<_> = rounds
                .clone()
                .map(|i| {
                    let index = first + (i - rounds.start) * stride;
                    let inside = ((i + 1) * stride > units).then(|| index.lt(units));
                    let index = if inside.is_some() { index.min(units - 1) } else { index };
                    let (line, col) = (index / (width / unit), index % (width / unit) * unit);
                    let from = (line * c.staged_pitch() + col) * 4;
                    (self.add_parts(&parts, from, unit), line, col, inside)
                })
                .collect();
            for (sum, line, col, inside) in sums {
                result.store(&sum, line, col, inside);
            }
        };
        if whole > 0 {
            k.for_(mine, whole * stride, together * stride, |first| some(first, 0..together));
        }
        let rounds = units.div_ceil(stride);
        for start in (whole..rounds).step_by(together as usize) {
            some(mine + start * stride, start..rounds.min(start + together));
        }
    }

    fn add_parts(
        &self,
        parts: &[Reg<'k, u32>],
        from: Reg<'k, u32>,
        unit: u32,
    ) -> Vec<Reg<'k, f32>> {
        let k = self.k;
        let load = |part: Reg<'k, u32>| -> Vec<Reg<'k, f32>> {
            let at = part + from;
            match (self.c.split, unit) {
                (1, 4) => k.ld_shared::<f32, 4>(at).to_vec(),
                (1, _) => k.ld_shared::<f32, 1>(at).to_vec(),
                (_, 4) => k.ld_cluster::<f32, 4>(at).to_vec(),
                _ => k.ld_cluster::<f32, 1>(at).to_vec(),
            }
        };
        let loaded: Vec<_> = parts.iter().map(|&part| load(part)).collect();
        loaded
            .into_iter()
            .reduce(|sum, part| sum.into_iter().zip(part).map(|(a, b)| a + b).collect())
            .expect("there is a part")
    }
}

/// 64 columns of 16-bit elements, swizzled as the copy engine expects.
fn write_half_slab<'k>(
    k: &'k Kernel,
    half: Half,
    columns: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    lane: Reg<'k, u32>,
    warp: Reg<'k, u32>,
) {
    let line = warp * 16 + lane % 16;
    let start = to + line * LINE;
    for (i, eight) in columns.chunks(8).enumerate() {
        // Two blocks of 8 columns: lanes 0 to 15 address the first, the others the second.
        let chunk = (lane / 16 + 2 * i as u32) ^ (lane % 8);
        let packed = std::array::from_fn(|j| k.pack(half, eight[2 * j], eight[2 * j + 1]));
        k.stmatrix(start + chunk * 16, packed, false);
    }
}

/// 32 columns of f32, swizzled as the copy engine expects.
fn write_f32_slab<'k>(
    k: &'k Kernel,
    columns: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    lane: Reg<'k, u32>,
    warp: Reg<'k, u32>,
) {
    let row = lane / 4;
    let start = to + (warp * 16 + row) * LINE + lane % 2 * 8;
    for (i, quad) in columns.chunks(4).enumerate() {
        let chunk = (lane % 4 / 2 + 2 * i as u32) ^ (row % 8);
        let at = start + chunk * 16;
        k.st_shared(at, [quad[0], quad[1]]);
        k.st_shared(at.at((8 * LINE).into()), [quad[2], quad[3]]);
    }
}
