//! Tiles of rows, each against all of its blocks of columns.

use super::Gradients;
use super::config::{Config, KeySums, Pass};
use super::scores::{Block, By, FragmentRows};
use crate::kernel::Element;
use crate::kernel::ampere::copies::Copies;
use crate::kernel::ampere::swizzle::MatrixOrder;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::backward::Side;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Kernel, Reg};

/// A thread, with the registers and addresses that it keeps.
pub(super) struct Thread<'k> {
    pub m16_tiles: Vec<M16Tile<'k>>,
    copies: [Copies<'k>; 2],
    /// Where this lane finds its part of the rows.
    pub left: [Reg<'k, u32>; 2],
    /// The same of the columns of the first stage, as lines that are multiplied and as such that are added.
    pub right: [Reg<'k, u32>; 2],
    pub added: [Reg<'k, u32>; 2],
    /// Bytes from the first stage to the current one.
    stage: Reg<'k, u32>,
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
        self.warp * c.warp_rows() + self.lane / 4
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

/// The blocks of a tile: those of each of some heads of the queries, from the last to the first.
struct Walk<'k, 'w> {
    work: &'w WorkTile<'k>,
    /// The current head, and the last.
    head: Reg<'k, u32>,
    last_head: Reg<'k, u32>,
    /// The current block.
    block: Reg<'k, i32>,
}

impl<'k> Gradients<'k, '_> {
    /// This block's tiles.
    pub(super) fn run(&self) {
        let columns = self.c.sum_columns();
        let t = self.thread(columns);
        self.tiles.for_each(|work| {
            self.tile(&t, &work);
            self.store(&t, &work);
        });
    }

    /// `columns`: of the sums.
    pub(super) fn thread(&self, columns: [u32; 2]) -> Thread<'k> {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let Lane { thread, lane, warp } = Lane::new(k);
        let regs = |count: u32| (0..count).map(|_| k.reg()).collect::<Vec<Reg<f32>>>();
        let grads = if c.pass.has_score_grads() { c.cols / 2 } else { 0 };
        let m16 = || M16Tile {
            scores: regs(c.cols / 2),
            grads: regs(grads),
            sums: columns.map(|columns| regs(columns / 2)),
        };
        let right = smem.right.map(|region| self.base + region);
        let tiles = c.right_tiles();
        let copies = |i: usize| Copies::new(self.right[i], tiles[i], c.threads(), thread, right[i]);
        let rows = warp * (c.warp_rows() * SwizzledTile::BYTES)
            + SwizzledTile::fragment(MatrixOrder::Lines, lane);
        let chunks = SwizzledTile::fragment(MatrixOrder::Chunks, lane);
        let lines = match c.element {
            Element::Half(_) => SwizzledTile::fragment(MatrixOrder::Lines, lane),
            Element::F32 => SwizzledTile::quads(lane),
        };
        Thread {
            m16_tiles: (0..c.m16_tiles).map(|_| m16()).collect(),
            copies: [copies(0), copies(1)],
            left: smem.left.map(|region| self.base + region + rows),
            right: right.map(|region| region + chunks),
            added: right.map(|region| region + lines),
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
        k.if_(work.blocks.some(), || {
            let (head, last_head) = match self.c.pass.side() {
                Side::Queries => (k.var(work.head), work.head),
                Side::Keys => {
                    let group = self.tiles.heads[1];
                    let head = k.var(work.head * group);
                    (head, head + group - 1)
                }
            };
            let block = k.var(work.blocks.end - 1);
            let walk = Walk { work, head, last_head, block };
            self.copy_rows(work);
            self.copy_block(t, work, head, block, t.stage);
            k.cp_async_commit();
            k.loop_(|exit| {
                let rows = self.rows(work, head);
                work.blocks.walk(block, |masked| self.step(t, &walk, &rows, masked));
                head.increase(1);
                exit.when(head.gt(last_head));
                block.set(work.blocks.end - 1);
            });
        });
    }

    /// Copies a tile's rows.
    pub(super) fn copy_rows(&self, work: &WorkTile<'k>) {
        let (k, c) = (self.k, self.c);
        let span = work.span(c.pass.side());
        let thread = k.thread();
        for (i, operand) in self.left.iter().enumerate() {
            let Some(operand) = *operand else { continue };
            let to = self.base + self.smem.left[i];
            let copies = Copies::new(operand, c.left_tiles()[i], c.threads(), thread, to);
            let from = copies.begin(work.batch, work.head, span.at(work.first));
            copies.lines(from, k.var(0), Some(span.count - work.first));
        }
    }

    /// Copies a block of columns, with their numbers, to a stage. `head` is one of the queries.
    pub(super) fn copy_block(
        &self,
        t: &Thread<'k>,
        work: &WorkTile<'k>,
        head: Reg<'k, u32>,
        block: Reg<'k, i32>,
        stage: Reg<'k, u32>,
    ) {
        let (k, c) = (self.k, self.c);
        let (of_columns, head_of_columns) = match c.pass.side() {
            Side::Queries => (Side::Keys, head / self.tiles.heads[1]),
            Side::Keys => (Side::Queries, head),
        };
        let span = work.span(of_columns);
        let first = block * c.cols as i32;
        let (position, left) = (span.at(first), span.count - first);
        for copies in &t.copies {
            let from = copies.begin(work.batch, head_of_columns, position);
            copies.lines(from, stage, Some(left));
        }
        if c.numbers() > 0 {
            let thread = k.thread();
            let from = self.query_index(work, head, position + thread) * 4u64;
            let to = self.base + stage + thread * 4;
            let bytes = k.select(left.gt(thread.cast::<i32>()), k.var(4), 0);
            for (i, &numbers) in (0..c.numbers()).zip(&self.numbers) {
                let (to, from) =
                    (to.at((self.smem.numbers + i * c.cols * 4).into()), numbers + from);
                match c.cols == c.threads() {
                    true => k.cp_async_4(to, from, bytes),
                    false => k.when(thread.lt(c.cols), || k.cp_async_4(to, from, bytes)),
                }
            }
        }
    }

    /// One block of columns.
    fn step(&self, t: &Thread<'k>, walk: &Walk<'k, '_>, rows: &[FragmentRows<'k>], masked: bool) {
        let (k, c, work) = (self.k, self.c, walk.work);
        // The block is there, and with two stages all warps are done with the one before.
        k.cp_async_wait(0);
        k.sync_block();
        if c.stages > 1 {
            self.copy_next(t, walk, t.stage ^ self.smem.stage_bytes);
        }
        let block = Block { number: walk.block, stage: t.stage, masked };
        let values = |p: &[Vec<Reg<'k, f32>>]| {
            if c.pass.sums()[1] {
                self.add(t, 1, p, t.stage);
            }
        };
        let grads = self.block(t, work, rows, block, values, By::Products);
        if c.pass != Pass::Keys(KeySums::Values) {
            self.add(t, 0, &grads, t.stage);
        }
        match c.stages {
            1 => {
                k.sync_block();
                self.copy_next(t, walk, t.stage);
            }
            _ => t.stage.set(t.stage ^ self.smem.stage_bytes),
        }
        walk.block.increase(-1);
    }

    /// Copies the block after the current one, if there is one: the last of the next head after a head's first.
    fn copy_next(&self, t: &Thread<'k>, walk: &Walk<'k, '_>, stage: Reg<'k, u32>) {
        let (k, work) = (self.k, walk.work);
        let same = walk.block.gt(work.blocks.begin);
        let block = k.select(same, walk.block - 1, work.blocks.end - 1);
        let (head, more) = match self.c.pass.side() {
            Side::Queries => (walk.head, same),
            Side::Keys => {
                let head = k.select(same, walk.head, walk.head + 1);
                (head, head.le(walk.last_head))
            }
        };
        k.if_(more, || self.copy_block(t, work, head, block, stage));
        k.cp_async_commit();
    }
}
