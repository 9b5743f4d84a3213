//! The gradient of a bias: that of the scores, summed over the sequences and heads that share it and, if all do,
//! over the queries.

use super::Gradients;
use super::pass::{Lane, Thread};
use super::scores::{Block, By};
use crate::kernel::Element;
use crate::kernel::ampere::product::M16;
use crate::kernel::attention::Name;
use crate::kernel::attention::scheduler::TileCoord;
use crate::ptx::{Kernel, Reg};

/// The destination.
struct BiasGrad<'k> {
    address: Reg<'k, u64>,
    /// Heads that it has.
    heads: Reg<'k, u32>,
    /// Sequences and heads that share one.
    repeat: [Reg<'k, u32>; 2],
    element: Element,
}

impl<'k> BiasGrad<'k> {
    fn params(k: &'k Kernel, element: Element) -> Self {
        Self {
            address: k.pointer(Name::DbiasAt),
            heads: k.param(Name::BiasHeads),
            repeat: [k.param(Name::RepeatBatch), k.param(Name::RepeatHeads)],
            element,
        }
    }

    /// Stores a number at an index.
    fn store(&self, index: Reg<'k, u64>, value: Reg<'k, f32>) {
        let k = value.kernel();
        let at = self.address + index * u64::from(self.element.size());
        match self.element {
            Element::F32 => k.st_global(at, [value]),
            Element::Half(half) => k.st_global(at, [k.cvt_rn(half, value)]),
        }
    }

    /// Stores two neighbours.
    fn store_pair(&self, index: Reg<'k, u64>, [a, b]: [Reg<'k, f32>; 2]) {
        let k = a.kernel();
        let at = self.address + index * u64::from(self.element.size());
        match self.element {
            Element::F32 => k.st_global(at, [a, b]),
            Element::Half(half) => k.st_global(at, [k.cvt_rn_x2(half, a, b)]),
        }
    }
}

impl<'k> Gradients<'k, '_> {
    /// This block's tiles of the gradient. `pairs`: there is an even number of keys. `shared`: by all queries.
    pub(super) fn run_bias(&self, pairs: bool, shared: bool) {
        let (k, c) = (self.k, self.c);
        let bias = c.variant.score_mod.bias.expect("there is one");
        let out = BiasGrad::params(k, bias.element);
        // As wide as a block.
        let t = self.thread([c.cols, 0]);
        let TileCoord { head: matrix, column, .. } = self.tiles.own();
        let [queries, keys] = self.tiles.size.map(|size| size.cast::<u32>());
        let key_blocks = keys.div_ceil(c.cols);
        let row = column / key_blocks;
        let block = column - row * key_blocks;
        let (from, to) = match shared {
            true => (k.var(0), queries.div_ceil(c.rows())),
            false => (row, row + 1),
        };
        let first = [matrix / out.heads, matrix % out.heads];
        t.m16_tiles.iter().flat_map(|m16| &m16.sums[0]).for_each(|sum| sum.set(0.0));
        let [(batch, batches), (head, heads)] =
            [0, 1].map(|i| (first[i], first[i] + out.repeat[i]));
        k.for_(batch, batches, 1, |batch| {
            k.for_(head, heads, 1, |head| {
                k.for_(from, to, 1, |row| self.add_scores(&t, [batch, head, row], block.cast()));
            });
        });
        let col = block * c.cols + k.lane() % 4 * 2;
        match shared {
            false => self.store_bias_rows(&t, &out, pairs, [matrix, row, col]),
            true => self.store_bias_row(&t, &out, [matrix, block]),
        }
    }

    /// Adds the gradients of scores of a tile of a sequence and head.
    fn add_scores(
        &self,
        t: &Thread<'k>,
        [batch, head, row]: [Reg<'k, u32>; 3],
        number: Reg<'k, i32>,
    ) {
        let (k, c) = (self.k, self.c);
        let work = self.tiles.tile(batch, head, (row * c.rows()).cast());
        let counts = number.ge(work.blocks.begin) & number.lt(work.blocks.end);
        k.if_(counts, || {
            // All warps are done with what was there.
            k.sync_block();
            let stage = k.var(0u32);
            self.copy_rows(&work, head);
            self.copy_block(&work, (head, number), stage);
            k.cp_async_commit();
            k.cp_async_wait(0);
            k.sync_block();
            let block = Block { number, stage, masked: true };
            let [_, grads] = self.block(t, (&work, head), block, By::Scores);
            for (m16, grads) in t.m16_tiles.iter().zip(grads) {
                m16.sums[0].iter().zip(grads).for_each(|(sum, grad)| sum.increase(grad));
            }
        });
    }

    /// Stores a tile.
    fn store_bias_rows(
        &self,
        t: &Thread<'k>,
        out: &BiasGrad<'k>,
        pairs: bool,
        [matrix, row, col]: [Reg<'k, u32>; 3],
    ) {
        let (k, c) = (self.k, self.c);
        let [queries, keys] = self.tiles.size.map(|size| size.cast::<u32>());
        let first = row * c.rows() + Lane::new(k).row(c);
        for (m16, block) in t.m16_tiles.iter().zip(0..) {
            for h in 0..2 {
                let row = first + (M16 * block + 8 * h);
                let start = matrix.mul_wide(queries) + row.wide();
                let start = start * keys.wide() + col.wide();
                let inside = row.lt(queries);
                for (quad, i) in m16.sums[0].chunks(4).zip(0..) {
                    let pair = [quad[2 * h as usize], quad[2 * h as usize + 1]];
                    let (at, col) = (start + u64::from(8u32 * i), col + 8 * i);
                    match pairs {
                        true => k.if_(inside & col.lt(keys), || out.store_pair(at, pair)),
                        false => {
                            k.if_(inside & col.lt(keys), || out.store(at, pair[0]));
                            k.if_(inside & (col + 1).lt(keys), || out.store(at + 1u64, pair[1]));
                        }
                    }
                }
            }
        }
    }

    /// Stores the sums of all rows of a block of keys.
    fn store_bias_row(
        &self,
        t: &Thread<'k>,
        out: &BiasGrad<'k>,
        [matrix, block]: [Reg<'k, u32>; 2],
    ) {
        let (k, c) = (self.k, self.c);
        let keys = self.tiles.size[1].cast::<u32>();
        let Lane { thread, lane, warp } = Lane::new(k);
        // All warps are done with their rows, where the warps' sums are put now.
        k.sync_block();
        let to = self.base + warp * (c.cols * 4) + lane % 4 * 8;
        for quad in 0..c.cols as usize / 8 {
            let pair = [0, 1].map(|i| {
                let rows = t
                    .m16_tiles
                    .iter()
                    .flat_map(|m16| [0, 2].map(|h| m16.sums[0][4 * quad + h + i]));
                let sum = rows.reduce(|a, b| a + b).expect("a tile has rows");
                // Over the lanes that have the same columns.
                [4, 8, 16].into_iter().fold(sum, |sum, xor| sum + k.shfl_bfly(sum, xor))
            });
            k.when(lane.lt(4), || k.st_shared(to.at(32 * quad as i64), pair));
        }
        k.sync_block();
        let col = block * c.cols + thread;
        k.if_(thread.lt(c.cols) & col.lt(keys), || {
            let from = self.base + thread * 4;
            let of_warp = |warp: u32| {
                let [sum] = k.ld_shared::<f32, 1>(from.at((warp * c.cols * 4).into()));
                sum
            };
            let sum = (0..c.warps).map(of_warp).reduce(|a, b| a + b).expect("there are warps");
            out.store(matrix.mul_wide(keys) + col.wide(), sum);
        });
    }
}
