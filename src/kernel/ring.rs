//! A ring of stages in shared memory that the copy engine fills and warpgroups empty.

use super::Arena;
use crate::ptx::{Kernel, Reg};

/// The offsets of a ring's barriers.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub stages: u32,
    full: u32,
    empty: u32,
}

pub(super) const BARRIER_BYTES: u32 = 8;

impl Ring {
    pub fn new(arena: &mut Arena, stages: u32) -> Self {
        let full = arena.region(stages * BARRIER_BYTES, BARRIER_BYTES);
        let empty = arena.region(stages * BARRIER_BYTES, BARRIER_BYTES);
        Self { stages, full, empty }
    }

    /// For one thread of the block: a full stage has one arrival (and bytes), an empty one an arrival
    /// of each consumer.
    pub fn init(&self, k: &Kernel, base: Reg<u32>, consumers: u32) {
        for stage in 0..self.stages {
            let at = |barriers: u32| i64::from(barriers + stage * BARRIER_BYTES);
            k.mbarrier_init(base.at(at(self.full)), 1);
            k.mbarrier_init(base.at(at(self.empty)), consumers);
        }
        k.fence_mbarrier_init();
    }

    /// The producer's place: a fresh ring is empty, so that its first waits pass.
    pub fn producer<'k>(&self, k: &'k Kernel, base: Reg<'k, u32>) -> Cursor<'k> {
        Cursor { ring: *self, base, stage: k.var(0), parity: k.var(1) }
    }

    /// The place of one of several consumers that take the stages in turn, which [skips](Cursor::skip)
    /// those of the others.
    pub fn owner<'k>(&self, k: &'k Kernel, base: Reg<'k, u32>, stage: Reg<'k, u32>) -> Cursor<'k> {
        Cursor { ring: *self, base, stage: k.var(stage), parity: k.var(0) }
    }

    /// A consumer's place.
    pub fn consumer<'k>(&self, k: &'k Kernel, base: Reg<'k, u32>) -> Cursor<'k> {
        Cursor { ring: *self, base, stage: k.var(0), parity: k.var(0) }
    }
}

/// Where a producer or consumer is in the ring.
#[derive(Clone, Copy)]
pub struct Cursor<'k> {
    ring: Ring,
    base: Reg<'k, u32>,
    /// The stage's index.
    pub stage: Reg<'k, u32>,
    parity: Reg<'k, u32>,
}

impl<'k> Cursor<'k> {
    fn barriers(&self) -> Reg<'k, u32> {
        self.base + self.stage * BARRIER_BYTES
    }

    /// Waits until the stage is empty, and promises `bytes`; gives the barrier at which they count.
    pub fn fill(&self, bytes: Reg<'k, u32>) -> Reg<'k, u32> {
        let (k, at) = (self.stage.kernel(), self.barriers());
        k.mbarrier_wait(at.at(self.ring.empty.into()), self.parity);
        let full = at + self.ring.full;
        k.mbarrier_expect(full, bytes);
        full
    }

    /// Waits until the stage is full.
    pub fn wait(&self) {
        let (k, at) = (self.stage.kernel(), self.barriers());
        k.mbarrier_wait(at.at(self.ring.full.into()), self.parity);
    }

    /// The barrier at which a consumer says that it is done with the stage.
    pub fn done(&self) -> Reg<'k, u32> {
        self.barriers() + self.ring.empty
    }

    /// Leaves out `stages` stages, which another consumer takes.
    pub fn skip(&self, stages: Reg<'k, u32>) {
        let at = self.stage + stages;
        let rounds = at / self.ring.stages;
        self.stage.set(at - rounds * self.ring.stages);
        self.parity.set(self.parity ^ (rounds & 1));
    }

    /// Goes to the next stage.
    pub fn advance(&self) {
        let k = self.stage.kernel();
        self.stage.increase(1);
        let wrapped = self.stage.eq(self.ring.stages);
        k.when(wrapped, || self.stage.set(0));
        let flipped = self.parity ^ 1;
        k.when(wrapped, || self.parity.set(flipped));
    }
}
