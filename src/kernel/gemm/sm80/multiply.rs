//! The loop over the depth.

use super::config::Config;
use super::copies::{Copies, Copy16, Operand};
use super::layout::Layout;
use crate::kernel::ampere::swizzle::{CHUNK, Fragments};
use crate::kernel::gemm::share::Share;
use crate::kernel::gemm::terms::Sum;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Address, Kernel, Mma, Reg};

/// The elements of both operands for one step along K: blocks of 16 lines by 32 bytes.
type Step<'k> = [Vec<[Reg<'k, u32>; 4]>; 2];

/// An operand in shared memory, as a warp reads it.
#[derive(Clone, Copy)]
struct Tiles<'k> {
    layout: Layout,
    /// Bytes from the start of a stage.
    offset: u32,
    /// What this lane gives `ldmatrix` in stage 0, without the offset.
    lane: Reg<'k, u32>,
    /// Blocks of 16 lines of the warp.
    blocks: u32,
}

impl<'k> Tiles<'k> {
    /// The fragments of the stage that begins `stage` bytes after the first.
    fn of_stage(&self, stage: Reg<'k, u32>, steps: u32) -> Fragments<'k> {
        let start = self.lane + stage;
        let xors = (0..self.blocks)
            .flat_map(|block| (0..steps).map(move |step| (block, step)))
            .map(|(block, step)| self.layout.block(block, step).0);
        Fragments::new(start, 1 + xors.max().expect("there are blocks"))
    }

    /// Where a lane finds its part of a block.
    fn fragment(&self, from: &Fragments<'k>, block: u32, step: u32) -> Address<'k, u32> {
        let (xor, add) = self.layout.block(block, step);
        from.at((xor, self.offset + add))
    }
}

/// A warp's part of a tile of the result.
pub struct Multiply<'k, 'c, S> {
    k: &'k Kernel,
    c: &'c Config,
    /// Both operands.
    tiles: [Tiles<'k>; 2],
    operands: [Operand<'k>; 2],
    base: Reg<'k, u32>,
    thread: Reg<'k, u32>,
    /// The fragments of the current step and of the next.
    fragments: [Step<'k>; 2],
    /// Blocks of 16 rows, of 8 columns.
    accumulators: Vec<Vec<[Reg<'k, S>; 4]>>,
}

/// What is done while products are under way.
#[derive(Clone, Copy)]
enum Aside<'k> {
    /// A block's fragment.
    Load { to: [Reg<'k, u32>; 4], from: Address<'k, u32>, transposed: bool },
    /// Part of a stage to come.
    Copy(Copy16<'k>),
}

/// Puts copies after the first of a step's loads.
///
/// The assembler hoists a load up to the last product that reads its registers, but not past a copy.
/// The first load's registers are free last: after the copies the other loads stay in their step,
/// while else those of two steps crowd after the barrier.
fn with_copies<'k>(mut loads: Vec<Aside<'k>>, copies: &[Copy16<'k>]) -> Vec<Aside<'k>> {
    loads.splice(1..1, copies.iter().copied().map(Aside::Copy));
    loads
}

impl<'k> Aside<'k> {
    fn emit(&self, k: &'k Kernel) {
        match *self {
            Self::Load { to, from, transposed } => k.ldmatrix_to(to, from, transposed),
            Self::Copy(copy) => copy.emit(k, CHUNK),
        }
    }
}

impl<'k, 'c, S: Sum> Multiply<'k, 'c, S> {
    pub fn new(
        k: &'k Kernel,
        c: &'c Config,
        base: Reg<'k, u32>,
        thread: Reg<'k, u32>,
        lhs: Operand<'k>,
        rhs: Operand<'k>,
    ) -> Self {
        let (lane, warp) = (thread % WARP, thread / WARP);
        let (rows, cols) = (c.warp_rows(), c.warp_cols());
        let tiles = |layout: Layout, offset, first: Reg<'k, u32>, extent: u32| Tiles {
            layout,
            offset,
            lane: base + layout.fragment(first, lane),
            blocks: extent / 16,
        };
        let row = warp / c.warps[1] * rows;
        let col = warp % c.warps[1] * cols;
        let fragments = || [rows, cols].map(|extent| (0..extent / 16).map(|_| k.regs()).collect());
        let zeros = |_| std::array::from_fn(|_| k.var(S::ZERO));
        Self {
            k,
            c,
            tiles: [
                tiles(lhs.layout, 0, row, rows),
                tiles(rhs.layout, lhs.layout.bytes(), col, cols),
            ],
            operands: [lhs, rhs],
            base,
            thread,
            fragments: [fragments(), fragments()],
            accumulators: (0..rows / 16).map(|_| (0..cols / 8).map(zeros).collect()).collect(),
        }
    }

    /// The accumulators over a share of the depth.
    pub fn run(self, share: Share<'k>) -> Vec<Vec<[Reg<'k, S>; 4]>> {
        let (k, c) = (self.k, self.c);
        let (steps, stages) = (c.steps(), c.stages);
        let before_last = share.count - 1;
        let at = (share.first + before_last) * c.depth;
        let mut region = 0;
        let copies = self.operands.map(|operand| {
            let start = region;
            region += operand.layout.bytes();
            Copies::new(&operand, c.threads(), self.thread, at, self.base, start)
        });

        // The last tile of the depth, then the others from the first on.
        for copies in &copies {
            copies.copy_last(k);
            copies.back(before_last);
        }
        k.cp_async_commit();
        for stage in 1..stages {
            k.if_(share.count.gt(stage), || {
                let stage = k.var(stage * c.stage_bytes());
                for copies in &copies {
                    copies.to_stage(stage).for_each(|copy| copy.emit(k, CHUNK));
                    copies.advance();
                }
            });
            k.cp_async_commit();
        }

        k.cp_async_wait(stages - 1);
        k.sync_block();
        let (stage, freed) = (k.var(0u32), k.var(0u32));
        let from = self.of_stage(stage);
        self.loads(0, &from).into_iter().for_each(|load| load.emit(k));
        for step in 0..steps - 1 {
            self.step(step, self.loads(step + 1, &from));
        }
        // A stage is free once its last fragments are loaded, with their products still to do: an
        // iteration begins with the last step of the tile before.
        let iteration = |copy: bool| {
            k.cp_async_wait(stages - 2);
            k.sync_block();
            freed.set(stage);
            let next = stage + c.stage_bytes();
            let zero = k.var(0u32);
            stage.set(k.select(next.ge(stages * c.stage_bytes()), zero, next));
            let from = self.of_stage(stage);
            let copying: Vec<_> =
                if copy { copies.iter().flat_map(|c| c.to_stage(freed)).collect() } else { vec![] };
            for step in 0..steps {
                let part = |step: u32| copying.len() * step as usize / steps as usize;
                let copies = &copying[part(step)..part(step + 1)];
                self.step((step + steps - 1) % steps, with_copies(self.loads(step, &from), copies));
            }
            if copy {
                copies.iter().for_each(Copies::advance);
            }
            k.cp_async_commit();
        };
        let with_copies = share.count - share.count.min(stages);
        k.for_(0, with_copies, 1, |_| iteration(true));
        k.for_(with_copies + 1, share.count, 1, |_| iteration(false));
        self.step(steps - 1, vec![]);
        self.accumulators
    }

    fn of_stage(&self, stage: Reg<'k, u32>) -> [Fragments<'k>; 2] {
        self.tiles.map(|tiles| tiles.of_stage(stage, self.c.steps()))
    }

    /// The loads of a step's fragments: that of the left block which the last product of the step
    /// before the current one reads, then as the products need them.
    fn loads(&self, step: u32, from: &[Fragments<'k>; 2]) -> Vec<Aside<'k>> {
        let to = &self.fragments[step as usize % 2];
        let load = |i: usize| {
            let (tiles, from) = (self.tiles[i], &from[i]);
            to[i].iter().zip(0..).map(move |(&to, block)| {
                let (from, transposed) =
                    (tiles.fragment(from, block, step), tiles.layout.transposed());
                Aside::Load { to, from, transposed }
            })
        };
        let (mut lhs, mut rhs) = (load(0), load(1));
        lhs.next().into_iter().chain(rhs.next()).chain(lhs).chain(rhs).collect()
    }

    /// The products of a step, with other instructions among them.
    fn step(&self, step: u32, aside: Vec<Aside<'k>>) {
        let [lhs, rhs] = &self.fragments[step as usize % 2];
        let products = self.accumulators.len() * self.accumulators[0].len();
        // Early, so that the loads are done when the next step begins.
        let (pace, asides) = ((products * 3 / 4).max(1), aside.len());
        let mut aside =
            aside.iter().enumerate().map(|(i, other)| (i * pace / asides, other)).peekable();
        let mut done = 0;
        for col in 0..self.accumulators[0].len() {
            for i in 0..self.accumulators.len() {
                while let Some((_, other)) = aside.next_if(|(when, _)| *when <= done) {
                    other.emit(self.k);
                }
                // Down, then up: each product shares an operand with the one before.
                let row = if col % 2 == 0 { i } else { self.accumulators.len() - 1 - i };
                let b = rhs[col / 2];
                let b = if col % 2 == 0 { [b[0], b[1]] } else { [b[2], b[3]] };
                self.k.mma(self.c.factor(), self.accumulators[row][col], Mma { a: lhs[row], b });
                done += 1;
            }
        }
        assert!(aside.next().is_none(), "all is done before the last product");
    }
}
