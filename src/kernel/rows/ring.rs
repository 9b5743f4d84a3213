//! Rows on their way through shared memory: those to come are copied while one is worked on, into places of which each
//! thread has its own, so that no thread waits for another.

use super::{Loaded, Slots, Tile};
use crate::kernel::Element;
use crate::ptx::{Kernel, Reg};

/// Bytes of a unit.
const UNIT: u32 = 16;

/// The units of a thread's rows that are on their way or there.
#[derive(Debug)]
pub(in crate::kernel) struct Ring<'k> {
    k: &'k Kernel,
    element: Element,
    chunks: u32,
    threads: u32,
    stages: u32,
    /// The address of the thread's first place.
    base: Reg<'k, u32>,
    /// Bytes of a stage.
    stage: u32,
    /// Where the next row goes, and where the oldest is, in bytes.
    write: Reg<'k, u32>,
    read: Reg<'k, u32>,
}

impl<'k> Ring<'k> {
    /// Bytes of shared memory: of `operands` rows at a time.
    pub fn bytes(tile: Tile, threads: u32, operands: u32, stages: u32) -> u32 {
        stages * operands * tile.chunks * threads * UNIT
    }

    /// In memory that begins at `shared`, of units of 16 bytes.
    pub fn new(
        (k, shared): (&'k Kernel, Reg<'k, u32>),
        (tile, element): (Tile, Element),
        threads: u32,
        operands: u32,
        stages: u32,
    ) -> Self {
        debug_assert_eq!(tile.unit * element.size(), UNIT);
        let base = shared + k.thread() * UNIT;
        let stage = Self::bytes(tile, threads, operands, 1);
        let (write, read) = (k.var(0u32), k.var(0u32));
        Self { k, element, chunks: tile.chunks, threads, stages, base, stage, write, read }
    }

    fn next(&self, at: Reg<'k, u32>) {
        let next = at + self.stage;
        at.set(self.k.select(next.lt(self.stage * self.stages), next, 0));
    }

    fn place(&self, operand: u32, chunk: u32) -> i64 {
        ((operand * self.chunks + chunk) * self.threads * UNIT).into()
    }

    /// Sends for a row of each operand, given where they begin. What is not there becomes zeros.
    pub fn send(&self, slots: &Slots<'k>, rows: &[Reg<'k, u64>]) {
        let to = self.base + self.write;
        for (operand, &row) in (0..).zip(rows) {
            for (chunk, (from, valid)) in (0..).zip(slots.sources(self.element, row)) {
                let bytes = valid.map(|valid| self.k.select(valid, self.k.var(UNIT), 0));
                let to = to.at(self.place(operand, chunk));
                match bytes {
                    None => self.k.cp_async(to, from, UNIT),
                    Some(bytes) => self.k.cp_async(to, from, bytes),
                }
            }
        }
        self.k.cp_async_commit();
        self.next(self.write);
    }

    /// Waits for the oldest row, and gives where it is. One row more than the others is on its way.
    pub fn arrive(&self) -> Reg<'k, u32> {
        self.k.cp_async_wait(self.stages - 1);
        let at = self.base + self.read;
        self.next(self.read);
        at
    }

    /// Waits for what is on its way past the last row.
    pub fn drain(&self) {
        self.k.cp_async_wait(0);
    }

    /// A unit of the row that is at a place.
    pub fn unit(&self, at: Reg<'k, u32>, operand: u32, chunk: u32) -> Loaded<'k> {
        let from = at.at(self.place(operand, chunk));
        match self.element {
            Element::F32 => Loaded::Floats(self.k.ld_shared::<f32, 4>(from).into()),
            Element::Half(half) => Loaded::Pairs(half, self.k.ld_shared::<u32, 4>(from).into()),
        }
    }
}
