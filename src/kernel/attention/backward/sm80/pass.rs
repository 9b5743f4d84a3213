//! Tiles of rows, each against all of its blocks of columns.

use super::Gradients;
use super::config::Config;
use super::scores::{Block, By};
use crate::kernel::Element;
use crate::kernel::ampere::copies::{Copies, Operand};
use crate::kernel::ampere::swizzle::MatrixOrder;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::backward::Side;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::attention::mask::BlockRange;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Kernel, Reg};

/// A thread, with the registers and addresses that it keeps.
pub(super) struct Thread<'k> {
    pub m16_tiles: Vec<M16Tile<'k>>,
    /// Where this lane finds its part of the rows, but for their region.
    pub left: Reg<'k, u32>,
    /// The same of the columns of the first stage, as lines that are multiplied and as such that are added.
    pub right: Reg<'k, u32>,
    pub added: Reg<'k, u32>,
    /// Bytes from the first stage to the current one.
    pub stage: Reg<'k, u32>,
}

/// A thread's place. It is computed where it is needed: what is kept all the time takes registers.
#[derive(Clone, Copy)]
pub(super) struct Lane<'k> {
    pub thread: Reg<'k, u32>,
    pub lane: Reg<'k, u32>,
    pub warp: Reg<'k, u32>,
}

impl<'k> Lane<'k> {
    pub fn new(k: &'k Kernel) -> Self {
        let thread = k.thread();
        Self { thread, lane: thread % WARP, warp: thread / WARP }
    }

    /// The first of a lane's rows in a tile.
    pub fn row(&self, c: &Config) -> Reg<'k, u32> {
        self.warp / c.sharers() * c.warp_rows() + self.lane / 4
    }

    /// `each` for the second of two paired warps, and otherwise nothing.
    pub fn second(&self, c: &Config, each: u32) -> Option<Reg<'k, u32>> {
        c.paired.then(|| self.warp % 2 * each)
    }
}

/// 16 of a warp's rows.
pub(super) struct M16Tile<'k> {
    /// S: products of queries and keys.
    pub scores: Vec<Reg<'k, f32>>,
    /// dP: products of the result's gradient and values.
    pub grads: Vec<Reg<'k, f32>>,
    /// What is as wide as a key, and what is as wide as a value; for a bias what is as wide as a block.
    pub sums: [Vec<Reg<'k, f32>>; 2],
}

/// Where a tile's walk is: it goes over the blocks of each of some heads of the queries, from the last to the
/// first.
struct Walk<'k> {
    /// The current head.
    head: Reg<'k, u32>,
    /// The current block.
    block: Reg<'k, i32>,
}

impl<'k> Gradients<'k, '_> {
    /// This block's tile.
    pub(super) fn run(&self) {
        let columns = self.c.sum_columns();
        let t = self.thread(columns);
        self.tiles.with_own(|work| {
            self.tile(&t, &work);
            self.store(&t, &self.kept());
        });
    }

    /// The current tile, from shared memory.
    fn kept(&self) -> WorkTile<'k> {
        self.tiles.kept(self.base + self.smem.kept)
    }

    /// `columns`: of the sums.
    pub(super) fn thread(&self, columns: [u32; 2]) -> Thread<'k> {
        let (k, c) = (self.k, self.c);
        let place @ Lane { lane, warp, .. } = Lane::new(k);
        let regs = |count: u32| (0..count).map(|_| k.reg()).collect::<Vec<Reg<f32>>>();
        let grads = if c.pass.has_score_grads() { c.warp_cols() / 2 } else { 0 };
        let m16 = || M16Tile {
            scores: regs(c.warp_cols() / 2),
            grads: regs(grads),
            sums: columns.map(|columns| regs(columns / 2)),
        };
        let rows = warp / c.sharers() * (c.warp_rows() * SwizzledTile::BYTES)
            + SwizzledTile::fragment(MatrixOrder::Lines, lane);
        let chunks = SwizzledTile::fragment(MatrixOrder::Chunks, lane);
        let lines = match c.element {
            Element::Half(_) => SwizzledTile::fragment(MatrixOrder::Lines, lane),
            Element::F32 => SwizzledTile::quads(lane),
        };
        Thread {
            m16_tiles: (0..c.m16_tiles).map(|_| m16()).collect(),
            left: self.base + rows,
            right: plus(self.base + chunks, place.second(c, c.warp_cols() * SwizzledTile::BYTES)),
            added: plus(self.base + lines, place.second(c, c.half_of_panels())),
            stage: k.var(0u32),
        }
    }

    /// Sums over a tile's blocks.
    fn tile(&self, t: &Thread<'k>, work: &WorkTile<'k>) {
        let k = self.k;
        for m16 in &t.m16_tiles {
            m16.sums.iter().flatten().for_each(|sum| sum.set(0.0));
        }
        // All warps are done with the tile before.
        k.sync_block();
        self.tiles.keep(work, self.base + self.smem.kept);
        k.sync_block();
        k.if_(work.blocks.some(), || {
            let walk = Walk { head: k.var(self.heads(work)[0]), block: k.var(work.blocks.end - 1) };
            self.copy_rows(work, walk.head);
            self.copy_block(work, (walk.head, walk.block), t.stage);
            k.cp_async_commit();
            k.loop_(|exit| {
                let blocks = || self.kept().blocks;
                walk.block.set(blocks().end - 1);
                BlockRange::walk_of(blocks, walk.block, |masked| self.step(t, &walk, masked));
                walk.head.increase(1);
                exit.when(walk.head.ge(self.heads(&self.kept())[1]));
            });
        });
    }

    /// The heads of the queries whose blocks a tile walks over: the first, and the one after the last.
    fn heads(&self, work: &WorkTile<'k>) -> [Reg<'k, u32>; 2] {
        match self.c.pass.side() {
            Side::Queries => [work.head, work.head + 1],
            Side::Keys => {
                let group = self.tiles.heads[1];
                let first = work.head * group;
                [first, first + group]
            }
        }
    }

    /// A thread's copies of an operand to a region of shared memory.
    fn copies(&self, operand: Operand<'k>, tile: SwizzledTile, region: u32) -> Copies<'k> {
        Copies::new(operand, tile, self.c.threads(), self.k.thread(), self.base).at(region)
    }

    /// Copies a tile's rows, with their numbers if they are queries, of this head.
    pub(super) fn copy_rows(&self, work: &WorkTile<'k>, head: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let span = work.span(c.pass.side());
        let (position, left) = (span.at(work.first), span.count - work.first);
        for (i, operand) in self.left.iter().enumerate() {
            let Some(operand) = *operand else { continue };
            let copies = self.copies(operand, c.left_tiles()[i], self.smem.left[i]);
            let from = copies.begin(work.batch, work.head, position);
            copies.lines(from, k.var(0), Some(left));
        }
        if c.pass.side() == Side::Queries {
            self.copy_numbers(work, head, (position, left), k.var(0));
        }
    }

    /// Copies a block of columns, with their numbers if they are queries, to a stage. The head is one of the
    /// queries.
    pub(super) fn copy_block(
        &self,
        work: &WorkTile<'k>,
        (head, block): (Reg<'k, u32>, Reg<'k, i32>),
        stage: Reg<'k, u32>,
    ) {
        let c = self.c;
        let (of_columns, head_of_columns) = match c.pass.side() {
            Side::Queries => (Side::Keys, head / self.tiles.heads[1]),
            Side::Keys => (Side::Queries, head),
        };
        let span = work.span(of_columns);
        let first = block * c.cols as i32;
        let (position, left) = (span.at(first), span.count - first);
        for (i, &operand) in self.right.iter().enumerate() {
            let copies = self.copies(operand, c.right_tiles()[i], self.smem.right[i]);
            let from = copies.begin(work.batch, head_of_columns, position);
            copies.lines(from, stage, Some(left));
        }
        if of_columns == Side::Queries {
            self.copy_numbers(work, head, (position, left), stage);
        }
    }

    /// Copies the numbers of queries from a position on, of which `left` are left in their sequence: others' are
    /// 0.
    fn copy_numbers(
        &self,
        work: &WorkTile<'k>,
        head: Reg<'k, u32>,
        (position, left): (Reg<'k, u32>, Reg<'k, i32>),
        stage: Reg<'k, u32>,
    ) {
        let (k, c) = (self.k, self.c);
        let thread = k.thread();
        let head = work.batch * self.tiles.heads[0] + head;
        let index = head.mul_wide(self.tiles.size[0].cast::<u32>()) + (position + thread).wide();
        let from = index * 4u64;
        let to = self.base + stage + thread * 4;
        let bytes = k.select(left.gt(thread.cast::<i32>()), k.var(4), 0);
        for (i, &numbers) in (0..c.numbers()).zip(&self.numbers) {
            let to = to.at((self.smem.numbers + i * c.queries() * 4).into());
            let from = numbers + from;
            match c.queries() == c.threads() {
                true => k.cp_async_4(to, from, bytes),
                false => k.when(thread.lt(c.queries()), || k.cp_async_4(to, from, bytes)),
            }
        }
    }

    /// One block of columns.
    fn step(&self, t: &Thread<'k>, walk: &Walk<'k>, masked: bool) {
        let (k, c) = (self.k, self.c);
        // The block is there, and with two stages all warps are done with the one before.
        k.cp_async_wait(0);
        k.sync_block();
        let work = self.kept();
        if c.stages > 1 {
            self.copy_next(&work, walk, t.stage ^ self.smem.stage_bytes);
        }
        let block = Block { number: walk.block, stage: t.stage, masked };
        let both = self.block(t, (&work, walk.head), block, By::Products);
        self.add(t, both);
        if let Some(sums) = self.dq_sums {
            // All of dS is there.
            k.sync_block();
            self.add_share(sums, &self.kept(), (walk.head, walk.block));
        }
        match c.stages {
            1 => {
                k.sync_block();
                self.copy_next(&self.kept(), walk, t.stage);
            }
            _ => t.stage.set(t.stage ^ self.smem.stage_bytes),
        }
        walk.block.increase(-1);
    }

    /// Copies the block after the current one, if there is one: the last of the next head after a head's first.
    fn copy_next(&self, work: &WorkTile<'k>, walk: &Walk<'k>, stage: Reg<'k, u32>) {
        let k = self.k;
        let same = walk.block.gt(work.blocks.begin);
        let block = k.select(same, walk.block - 1, work.blocks.end - 1);
        let (head, more) = match self.c.pass.side() {
            Side::Queries => (walk.head, same),
            Side::Keys => {
                let head = walk.head + k.select(same, k.var(0), 1);
                (head, head.lt(self.heads(work)[1]))
            }
        };
        k.if_(more, || self.copy_block(work, (head, block), stage));
        k.cp_async_commit();
    }
}

/// A sum, of which one term may be nothing.
pub(super) fn plus<'k>(a: Reg<'k, u32>, b: Option<Reg<'k, u32>>) -> Reg<'k, u32> {
    b.map_or(a, |b| a + b)
}
