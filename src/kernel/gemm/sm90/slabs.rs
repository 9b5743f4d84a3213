//! From registers to the result by TMA, slab after slab.

use super::Gemm;
use super::config::Orient;
use crate::kernel::gemm::terms::{Line, Lines, Sum, Vectors, WORD};
use crate::kernel::hopper::store::{Direction, SlabStore};
use crate::kernel::hopper::{LINE, Lane, SLAB, WARPGROUP, Warpgroup};
use crate::kernel::raster::Tile;
use crate::ptx::{Address, Reg};

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
            false => tile.row * c.rows + group * SLAB,
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
        let mut to = self.base + start + group * c.scale_bytes();
        let mut side = |side: usize, lines: Lines| {
            let (vectors, at, count) = (self.terms.vectors(lines)?, to, counts[side]);
            vectors.copy(count, (thread % WARPGROUP, WARPGROUP), at, |line| {
                let line = first[side] + line;
                let [rows, cols] = self.size;
                match lines {
                    Lines::Rows => (tile.batch_row(c.batched, rows, line), line.lt(rows)),
                    Lines::Columns => (line, line.lt(cols)),
                }
            });
            to = to + count * c.epilogue.scale.words() * WORD;
            Some(TileLines { vectors, at, count })
        };
        let [of_rows, of_columns] = c.orient.order([Lines::Rows, Lines::Columns]);
        let sides = [side(0, of_rows)?, side(1, of_columns)?];
        k.cp_async_commit();
        Some(TileScales { sides })
    }

    /// Stores slab after slab: from registers to shared memory, from there by TMA.
    pub(super) fn store_slabs<S: Sum>(
        &self,
        accumulators: &[Vec<Reg<'k, S>>],
        map: Reg<'k, u64>,
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
        if scales.is_some() {
            // This thread's copies are there; when the warpgroup has met, all are.
            self.k.cp_async_wait(0);
        }
        store.run(
            &slabs,
            |&(accumulators, row, col)| {
                let slab = Slab { row, col, lane, scales };
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
        let (terms, cols) = (&self.terms, self.size[1]);
        let [rows_scales, cols_scales] = slab.scales();
        let Lane { lane, warp } = slab.lane;
        let mut out = Vec::with_capacity(accumulators.len());
        match self.c.orient {
            Orient::Plain => {
                let of_rows = [0, 8].map(|below| {
                    let mut row = [terms.plain_row()];
                    rows_scales.add(&mut row, below);
                    row[0]
                });
                for (block, quad) in (0..).zip(accumulators.chunks(4)) {
                    let n = first_col + (lane % 4 * 2 + 8 * block);
                    let mut of_cols = terms.plain_columns::<2>(n, || n.lt(cols));
                    cols_scales.add(&mut of_cols, 8 * block);
                    let finish = |(i, &sum)| terms.finish(sum, of_rows[i / 2], of_cols[i % 2]);
                    out.extend(quad.iter().enumerate().map(finish));
                }
            }
            Orient::Swapped => {
                let of_cols = [0, 8].map(|below| {
                    let n = first_row + (warp * 16 + lane / 4 + below);
                    let mut col = terms.plain_columns::<1>(n, || n.lt(cols));
                    rows_scales.add(&mut col, below);
                    col[0]
                });
                for (block, quad) in (0..).zip(accumulators.chunks(4)) {
                    let mut of_rows = [terms.plain_row(); 2];
                    cols_scales.add(&mut of_rows, 8 * block);
                    let finish = |(i, &sum)| terms.finish(sum, of_rows[i % 2], of_cols[i / 2]);
                    out.extend(quad.iter().enumerate().map(finish));
                }
            }
        }
        out
    }
}

/// A slab of a warpgroup's tile, as one of its threads sees it.
#[derive(Clone, Copy)]
struct Slab<'k> {
    /// Its first row and column in the tile.
    row: u32,
    col: u32,
    lane: Lane<'k>,
    scales: Option<TileScales<'k>>,
}

impl<'k> Slab<'k> {
    /// Of the thread's rows and columns of the tile, from its first on.
    fn scales(&self) -> [SlabScales<'k>; 2] {
        let Lane { lane, warp } = self.lane;
        let of = |side: usize, slab: u32, first: &dyn Fn() -> Reg<'k, u32>| {
            SlabScales(self.scales.map(|TileScales { sides }| {
                let TileLines { vectors, at, count } = sides[side];
                (vectors, (at + first() * WORD).at((slab * WORD).into()), count)
            }))
        };
        [of(0, self.row, &|| warp * 16 + lane / 4), of(1, self.col, &|| lane % 4 * 2)]
    }
}

/// The scales of the tile's rows or columns from a thread's first on: where they are, and how many there are.
struct SlabScales<'k>(Option<(Vectors<'k>, Address<'k, u32>, u32)>);

impl<'k> SlabScales<'k> {
    /// Adds those of the lines that follow `further` lines after the first.
    fn add<const N: usize>(&self, lines: &mut [Line<'k>; N], further: u32) {
        if let Some((vectors, from, count)) = self.0 {
            vectors.add_copied(lines, from.at((further * WORD).into()), count);
        }
    }
}
