//! From registers to the result by TMA, slab after slab.

use super::Gemm;
use super::config::Orient;
use crate::kernel::gemm::terms::{Line, Lines, Sum, Vectors};
use crate::kernel::hopper::store::{Direction, SlabStore};
use crate::kernel::hopper::{LINE, Lane, SLAB, WARPGROUP, Warpgroup};
use crate::kernel::raster::Tile;
use crate::ptx::Reg;

/// The scales of a warpgroup's part of a tile, on their way through shared memory: those of the tile's rows, and
/// of its columns.
#[derive(Clone, Copy)]
pub(super) struct TileScales<'k> {
    sides: [TileLines<'k>; 2],
}

#[derive(Clone, Copy)]
struct TileLines<'k> {
    vectors: Vectors<'k>,
    /// Where they begin.
    at: Reg<'k, u32>,
    /// Lines.
    count: u32,
}

impl<'k> Gemm<'k, '_> {
    /// The first row and column of this warpgroup's part of a tile.
    fn first(&self, tile: Tile<'k>, group: Reg<'k, u32>) -> [Reg<'k, u32>; 2] {
        let c = self.c;
        let first_col = tile.col * c.cols;
        let first_row = match c.pingpong {
            false => tile.row * c.rows + group * c.warpgroup_tile()[0],
            true => tile.row * c.rows,
        };
        [first_row, first_col]
    }

    /// Begins to copy a tile's scales to shared memory, if it has any: they are there when its sums are. From
    /// memory, each for itself, they would take too many registers or too much time.
    pub(super) fn copy_scales(
        &self,
        tile: Tile<'k>,
        thread: Reg<'k, u32>,
        group: Reg<'k, u32>,
    ) -> Option<TileScales<'k>> {
        let (k, c) = (self.k, self.c);
        let start = self.smem.scales?;
        let (first, counts) = (self.first(tile, group), c.warpgroup_tile());
        let bytes = c.orient.order(c.epilogue.vector_bytes()?);
        let mut to = self.base + start + group * c.scale_bytes();
        let mut side = |side: usize, lines: Lines| {
            let (vectors, at, count) = (self.terms.vectors(lines), to, counts[side]);
            vectors.copy(count, (thread % WARPGROUP, WARPGROUP), at, |line| {
                let line = first[side] + line;
                let [rows, cols] = self.size;
                match lines {
                    Lines::Rows => (tile.batch_row(c.batched, rows, line), line.lt(rows)),
                    Lines::Columns => (line, line.lt(cols)),
                }
            });
            to = to + count * bytes[side];
            TileLines { vectors, at, count }
        };
        let [of_rows, of_columns] = c.orient.order([Lines::Rows, Lines::Columns]);
        let sides = [side(0, of_rows), side(1, of_columns)];
        k.cp_async_commit();
        Some(TileScales { sides })
    }

    /// Stores slab after slab: from registers to shared memory, from there by TMA.
    pub(super) fn store_slabs<S: Sum>(
        &self,
        accumulators: &[Vec<Reg<'k, S>>],
        tile: Tile<'k>,
        (thread, group): (Reg<'k, u32>, Reg<'k, u32>),
        leader: Reg<'k, bool>,
        scales: Option<TileScales<'k>>,
    ) {
        let c = self.c;
        let [first_row, first_col] = self.first(tile, group);
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
            map: self.out,
            out: c.epilogue.out,
            adds: c.epilogue.adds,
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
        if scales.is_some() {
            // This thread's copies are there; when the warpgroup has met, all are.
            self.k.cp_async_wait(0);
        }
        store.run(
            &slabs,
            |&(accumulators, row, col)| {
                let slab = Slab { first: [row, col], lane, scales };
                self.finish(accumulators, first_row + row, first_col + col, slab)
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
        first_row: Reg<'k, u32>,
        first_col: Reg<'k, u32>,
        slab: Slab<'k>,
    ) -> Vec<Reg<'k, f32>> {
        let terms = &self.terms;
        let Lane { lane, warp } = slab.lane;
        let mut out = Vec::with_capacity(accumulators.len());
        match self.c.orient {
            Orient::Plain => {
                let of_rows = [0, 8].map(|below| self.rows::<1>(slab, 0, below)[0]);
                for (block, quad) in (0..).zip(accumulators.chunks(4)) {
                    let n = first_col + (lane % 4 * 2 + 8 * block);
                    let of_cols = self.columns::<2>(n, slab, 1, 8 * block);
                    let finish = |(i, &sum)| terms.finish(sum, of_rows[i / 2], of_cols[i % 2]);
                    out.extend(quad.iter().enumerate().map(finish));
                }
            }
            Orient::Swapped => {
                let of_cols = [0, 8].map(|below| {
                    let n = first_row + (warp * 16 + lane / 4 + below);
                    self.columns::<1>(n, slab, 0, below)[0]
                });
                for (block, quad) in (0..).zip(accumulators.chunks(4)) {
                    let of_rows = self.rows::<2>(slab, 1, 8 * block);
                    let finish = |(i, &sum)| terms.finish(sum, of_rows[i % 2], of_cols[i / 2]);
                    out.extend(quad.iter().enumerate().map(finish));
                }
            }
        }
        out
    }

    /// `N` of the result's columns, the first of them `n`: those of the slab's side that are `further` lines
    /// after the thread's first.
    fn columns<const N: usize>(
        &self,
        n: Reg<'k, u32>,
        slab: Slab<'k>,
        side: usize,
        further: u32,
    ) -> [Line<'k>; N] {
        let cols = self.size[1];
        let copied = slab.lines(side, further, self.terms.line(Lines::Columns));
        copied.unwrap_or_else(|| self.terms.lines(Lines::Columns, n, || n.lt(cols)))
    }

    /// `N` of its rows, likewise. They have nothing of their own that is not copied.
    fn rows<const N: usize>(&self, slab: Slab<'k>, side: usize, further: u32) -> [Line<'k>; N] {
        let row = self.terms.line(Lines::Rows);
        slab.lines(side, further, row).unwrap_or([row; N])
    }
}

/// A slab of a warpgroup's tile, as one of its threads sees it.
#[derive(Clone, Copy)]
struct Slab<'k> {
    /// Its first row and column in the tile.
    first: [u32; 2],
    lane: Lane<'k>,
    scales: Option<TileScales<'k>>,
}

impl<'k> Slab<'k> {
    /// `N` lines of a side of the tile, rows (0) or columns (1), that are `further` lines after the thread's
    /// first in the slab: `line`, and what was copied of them, if the tile has that.
    fn lines<const N: usize>(
        &self,
        side: usize,
        further: u32,
        line: Line<'k>,
    ) -> Option<[Line<'k>; N]> {
        let TileLines { vectors, at, count } = self.scales?.sides[side];
        let Lane { lane, warp } = self.lane;
        let first = if side == 0 { warp * 16 + lane / 4 } else { lane % 4 * 2 };
        let mut lines = [line; N];
        vectors.add_copied(&mut lines, at, (first, self.first[side] + further), count);
        Some(lines)
    }
}
