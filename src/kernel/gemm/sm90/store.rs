//! From registers to the result through a tile in shared memory, which the threads store.

use super::Gemm;
use super::config::Orient;
use crate::kernel::gemm::result::TileOfResult;
use crate::kernel::gemm::terms::{Sum, add};
use crate::kernel::hopper::WARPGROUP;
use crate::kernel::raster::Tile;
use crate::ptx::Reg;

impl<'k> Gemm<'k, '_> {
    /// Writes this warpgroup's sums, of 32 bits, over the stages, in the order of `C`.
    pub(super) fn stage<S: Sum>(&self, sums: &[Reg<'k, S>], thread: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let team = WARPGROUP * c.team();
        let staged = self.base + self.smem.result;
        let (thread, staged) = match c.teams {
            1 => (thread, staged),
            _ => (thread % team, staged + thread / team * c.staged_bytes()),
        };
        let (lane, warp) = (thread % 32, thread / 32);
        let row = warp * 16 + lane / 4;
        let col = lane % 4 * 2;
        let pitch = c.staged_pitch();
        // All of the block's wgmma have read the stages, or its threads the tile before this one.
        self.smem.meeting.only().sync(k);
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
            1 => self.smem.meeting.only().sync(k),
            _ => k.sync_cluster(),
        }
    }

    /// Adds up the blocks' staged tiles, each block a share of them in the same order, and stores.
    pub(super) fn store_staged<S: Sum>(&self, unit: u32, tile: Tile<'k>, thread: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let [(row, lines), (col, width)] = c.orient.order([(tile.row, c.rows), (tile.col, c.cols)]);
        let first = (row * lines, col * width);
        let team = |team| self.base + (self.smem.result + team * c.staged_bytes());
        let teams: Vec<_> = (0..c.teams).map(team).collect();
        let parts: Vec<_> = match c.split {
            1 => teams,
            split => {
                let of_rank = |rank| teams.iter().map(move |&part| k.mapa(part, rank));
                (0..split).flat_map(of_rank).collect()
            }
        };
        let threads = WARPGROUP * c.consumers();
        let mine = match c.split {
            1 => thread,
            _ => k.cluster_rank() * threads + thread,
        };
        let units = lines * width / unit;
        let stride = threads * c.split;
        let result = TileOfResult {
            terms: self.terms,
            out: self.out,
            rows: self.size[0],
            cols: self.size[1],
            first,
            batch: tile.batch,
        };
        // Four at a time, so that their loads are under way together; in a loop, so that no more are:
        // ptxas would compute the addresses of all of them first, and spill. The last ones follow.
        // Two at a time where four warpgroups that multiply share the registers.
        let together = if c.consumers() * c.blocks_per_sm >= 4 { 2 } else { 4 };
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
                    (self.add_parts::<S>(&parts, from, unit), line, col, inside)
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

    fn add_parts<S: Sum>(
        &self,
        parts: &[Reg<'k, u32>],
        from: Reg<'k, u32>,
        unit: u32,
    ) -> Vec<Reg<'k, S>> {
        let k = self.k;
        let load = |part: Reg<'k, u32>| -> Vec<Reg<'k, S>> {
            let at = part + from;
            match (self.c.split, unit) {
                (1, 4) => k.ld_shared::<S, 4>(at).to_vec(),
                (1, _) => k.ld_shared::<S, 1>(at).to_vec(),
                (_, 4) => k.ld_cluster::<S, 4>(at).to_vec(),
                _ => k.ld_cluster::<S, 1>(at).to_vec(),
            }
        };
        // All of them before the first is used.
        let loaded: Vec<_> = parts.iter().map(|&part| load(part)).collect();
        add(loaded).expect("there is a part")
    }
}
