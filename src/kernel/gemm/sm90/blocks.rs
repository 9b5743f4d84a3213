//! Sums of e4m3 in two places: those of a stage are added up in f32, of which tensor cores keep fewer bits. Where scales
//! change along the depth, they are multiplied with them before.
//!
//! Where there are registers for sums of two stages, those of one are added up while the products of the next are made:
//!
//! ```text
//! tensor cores   stage 0 │ stage 1       │ stage 2       │ ..
//! registers              │ add stage 0   │ add stage 1   │ ..
//! ```

use super::{Gemm, descriptor};
use crate::kernel::gemm::BLOCK;
use crate::kernel::gemm::share::Share;
use crate::kernel::gemm::sm90::Orient;
use crate::kernel::hopper::SLAB_BYTES;
use crate::kernel::hopper::barriers::Mbarrier;
use crate::kernel::hopper::product::{LeftStep, products};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{Lane, SLAB};
use crate::kernel::raster::Tile;
use crate::ptx::{Kernel, Reg};

/// The parameters: f32 `[rows, depth]` of the left operand and `[depth, blocks of columns]` of the right one.
#[derive(Clone, Copy)]
pub(super) struct BlockScales<'k> {
    pub rows: Reg<'k, u64>,
    pub cols: Reg<'k, u64>,
}

/// Where a thread finds the scales of a tile: those of its rows or columns of the left operand, and those of the right
/// one's blocks: one for the tile, or for each 64 of its columns.
struct TileScales<'k> {
    lines: Vec<Reg<'k, u64>>,
    blocks: Vec<Reg<'k, u64>>,
    /// Bytes from a block to the next along the depth.
    stride: Reg<'k, u64>,
}

impl<'k> TileScales<'k> {
    /// Loads those of a stage and goes to the next: of each block, a product of both for each line.
    fn next(&self, k: &'k Kernel) -> Vec<Vec<Reg<'k, f32>>> {
        let load = |&from: &Reg<'k, u64>| {
            let [scale] = k.ld_global_nc::<f32, 1>(from);
            scale
        };
        let blocks: Vec<_> = self.blocks.iter().map(load).collect();
        let lines: Vec<_> = self.lines.iter().map(load).collect();
        self.blocks.iter().for_each(|block| block.increase(self.stride));
        self.lines.iter().for_each(|line| line.increase(4u64));
        let of_block = |&block| lines.iter().map(|&line| line * block).collect();
        blocks.iter().map(of_block).collect()
    }
}

/// The sums of a stage, and what they are multiplied with: of each block of columns, a scale for each line.
struct Part<'k> {
    sums: Vec<Reg<'k, f32>>,
    scales: Vec<Reg<'k, f32>>,
}

impl<'k> Gemm<'k, '_> {
    /// [`multiply`](Self::multiply), stage by stage, with scales of blocks if there are any.
    pub(super) fn promote(
        &self,
        sums: &[Reg<'k, f32>],
        place: Cursor<'k>,
        tile: Tile<'k>,
        (thread, group, leader): (Reg<'k, u32>, Reg<'k, u32>, Reg<'k, bool>),
    ) {
        let (k, c) = (self.k, self.c);
        let first_rows = group * SLAB_BYTES;
        let lhs = descriptor(self.base + self.smem.lhs + first_rows, c.lhs, c.rows, c.depth());
        let rhs = descriptor(self.base + self.smem.rhs, c.rhs, c.cols, c.depth());
        let Share { first, count } = self.share();
        let of_tile = |blocks| self.tile_scales(blocks, tile, Lane::new(thread), group, first);
        let scales = self.blocks.map(of_tile);
        // Begins a stage's products, and fetches its scales meanwhile.
        let begin = |part: &Part<'k>| {
            place.wait();
            let a = lhs.stage(place.stage, c.lhs_boxes().bytes);
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            products(c.factor(), &[&part.sums], c.depth(), false, |step| {
                ([LeftStep::Shared(a.operand(step))], b.operand(step))
            });
            if let Some(scales) = &scales {
                let next = scales.next(k).into_iter().flatten();
                part.scales.iter().zip(next).for_each(|(to, from)| to.set(from));
            }
        };
        let add = |part: &Part<'k>| {
            let lines = scales.as_ref().map(|scales| scales.lines.len());
            for (i, (sum, of_stage)) in sums.iter().zip(&part.sums).enumerate() {
                let line = match c.orient {
                    Orient::Plain => i / 2 % 2,
                    Orient::Swapped => i / 4 * 2 + i % 2,
                };
                sum.set(match lines {
                    Some(lines) => {
                        let block = i / 32 % (part.scales.len() / lines);
                        of_stage.fma(part.scales[block * lines + line], *sum)
                    }
                    None => *of_stage + *sum,
                });
            }
        };
        let part = || Part {
            sums: sums.iter().map(|_| k.reg()).collect(),
            scales: {
                let count =
                    scales.as_ref().map_or(0, |scales| scales.lines.len() * scales.blocks.len());
                (0..count).map(|_| k.reg()).collect()
            },
        };
        sums.iter().for_each(|sum| sum.set(0.0));
        if !c.two_parts() {
            let part = part();
            k.for_(0, count, 1, |_| {
                begin(&part);
                k.wgmma_wait(0);
                k.when(leader, || place.done().arrive());
                place.advance();
                add(&part);
            });
            return;
        }
        let (even, odd) = (part(), part());
        // The barrier of the stage whose products were begun last.
        let before = Mbarrier::unset(k);
        let go_on = |next: &Part<'k>, last: &Part<'k>| {
            begin(next);
            let done = place.done();
            place.advance();
            k.wgmma_wait(1);
            k.when(leader, || before.arrive());
            before.set(done);
            add(last);
        };
        let end = |last: &Part<'k>| {
            k.wgmma_wait(0);
            k.when(leader, || before.arrive());
            add(last);
        };
        begin(&even);
        before.set(place.done());
        place.advance();
        let others = count - 1;
        k.for_(0, others / 2, 1, |_| {
            go_on(&odd, &even);
            go_on(&even, &odd);
        });
        k.if_else(
            (others % 2).eq(0),
            || end(&even),
            || {
                go_on(&odd, &even);
                end(&odd);
            },
        );
    }

    fn tile_scales(
        &self,
        BlockScales { rows, cols }: BlockScales<'k>,
        tile: Tile<'k>,
        Lane { lane, warp }: Lane<'k>,
        group: Reg<'k, u32>,
        first: Reg<'k, u32>,
    ) -> TileScales<'k> {
        let c = self.c;
        let [m, n] = self.size;
        let tile_row = tile.row * c.rows + group * SLAB;
        let tile_col = tile.col * c.cols;
        let (lines, col): (Vec<_>, _) = match c.orient {
            Orient::Plain => {
                let row = tile_row + (warp * 16 + lane / 4);
                (vec![row, row + 8], tile_col)
            }
            Orient::Swapped => {
                let col = tile_col + lane % 4 * 2;
                let pairs = (0..c.cols / 8).flat_map(|j| [0, 1].map(|i| col + (8 * j + i)));
                (pairs.collect(), tile_row)
            }
        };
        let at = |line: Reg<'k, u32>| {
            // Sums of rows that do not exist are not stored: any row will do.
            let row = tile.batch_row(c.batched, m, line.min(m - 1));
            let k = row.kernel();
            k.var(rows + (row.wide() * self.depth.wide() + first.wide()) * 4u64)
        };
        let blocks = n.div_ceil(BLOCK);
        let of_column = |col: Reg<'k, u32>| {
            let block = (col / BLOCK).min(blocks - 1);
            let block = first.wide() * blocks.wide() + block.wide();
            self.k.var(cols + block * 4u64)
        };
        let [_, extent] = c.orient.order([c.rows, c.cols]);
        let each = if BLOCK.is_multiple_of(extent) { extent } else { SLAB };
        TileScales {
            lines: lines.into_iter().map(at).collect(),
            blocks: (0..extent / each).map(|i| of_column(col + i * each)).collect(),
            stride: blocks.wide() * 4u64,
        }
    }
}
