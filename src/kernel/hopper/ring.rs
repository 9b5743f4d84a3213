//! A ring of stages in shared memory that TMA fills and warpgroups empty.
//!
//! ```text
//!            ┌─────────┬─────────┬─────────┬─────────┐
//!  stages    │    0    │    1    │    2    │    3    │   and again 0: a new phase, the other parity
//!            └─────────┴─────────┴─────────┴─────────┘
//!  full[i]    1 arrival (the producer's, with a promise of bytes) and the bytes: the stage can be read
//!  empty[i]   an arrival of each consumer: the stage can be overwritten
//!
//!  producer   wait empty[i] · expect bytes at full[i] · TMA into stage i           · i + 1
//!  consumer                   wait full[i]            · wgmma reads stage i · wait · arrive at empty[i] · i + 1
//! ```
//!
//! A fresh ring is empty: the producer starts one phase earlier than the consumers, in a phase that
//! counts as complete, so that its first waits pass.

use super::barriers::{Mbarrier, Mbarriers, Phase};
use crate::kernel::Arena;
use crate::ptx::{Kernel, Reg};

/// The offsets of a ring's barriers.
#[derive(Clone, Copy, Debug)]
pub struct Ring {
    pub stages: u32,
    full: Mbarriers,
    empty: Mbarriers,
    /// Arrivals that make a stage full.
    producers: u32,
}

impl Ring {
    pub fn new(arena: &mut Arena, stages: u32) -> Self {
        Self::filled_by(arena, stages, 1)
    }

    /// A ring that so many threads fill, each with stores of its own.
    pub fn filled_by(arena: &mut Arena, stages: u32, producers: u32) -> Self {
        let full = Mbarriers::new(arena, stages);
        let empty = Mbarriers::new(arena, stages);
        Self { stages, full, empty, producers }
    }

    /// For one thread of the block: a full stage has an arrival of each producer (and bytes), an empty one
    /// an arrival of each consumer.
    pub fn init(&self, k: &Kernel, base: Reg<u32>, consumers: u32) {
        for stage in 0..self.stages {
            self.full.init(k, base, stage, self.producers);
            self.empty.init(k, base, stage, consumers);
        }
        k.fence_mbarrier_init();
    }

    /// The producer's place: a fresh ring is empty, so that its first waits pass.
    pub fn producer<'k>(&self, k: &'k Kernel, base: Reg<'k, u32>) -> Cursor<'k> {
        Cursor { ring: *self, base, stage: k.var(0), phase: Phase::before_first(k) }
    }

    /// The place of one of several consumers that take the stages in turn, which [skips](Cursor::skip)
    /// those of the others.
    pub fn owner<'k>(&self, k: &'k Kernel, base: Reg<'k, u32>, stage: Reg<'k, u32>) -> Cursor<'k> {
        Cursor { ring: *self, base, stage: k.var(stage), phase: Phase::first(k) }
    }

    /// A consumer's place.
    pub fn consumer<'k>(&self, k: &'k Kernel, base: Reg<'k, u32>) -> Cursor<'k> {
        Cursor { ring: *self, base, stage: k.var(0), phase: Phase::first(k) }
    }
}

/// Where a producer or consumer is in the ring.
#[derive(Clone, Copy)]
pub struct Cursor<'k> {
    ring: Ring,
    base: Reg<'k, u32>,
    /// The stage's index.
    pub stage: Reg<'k, u32>,
    phase: Phase<'k>,
}

impl<'k> Cursor<'k> {
    /// What the barriers' offsets are added to.
    fn barriers(&self) -> Reg<'k, u32> {
        self.base + self.stage * Mbarriers::BYTES
    }

    /// Waits until the stage is empty, and promises `bytes`; gives the barrier at which they count.
    pub fn fill(&self, bytes: Reg<'k, u32>) -> Mbarrier<'k> {
        let at = self.barriers();
        self.ring.empty.wait(at, self.phase);
        let full = self.ring.full.at(at);
        full.expect(bytes);
        full
    }

    /// Waits until the stage is empty, for a thread that fills it with stores of its own.
    pub fn wait_empty(&self) {
        self.ring.empty.wait(self.barriers(), self.phase);
    }

    /// The barrier at which such a thread says that it has.
    pub fn filled(&self) -> Mbarrier<'k> {
        self.ring.full.at(self.barriers())
    }

    /// The same place of another ring, of as many stages.
    pub fn of(&self, ring: Ring) -> Self {
        debug_assert_eq!(self.ring.stages, ring.stages);
        Self { ring, ..*self }
    }

    /// Waits until the stage is full.
    pub fn wait(&self) {
        self.ring.full.wait(self.barriers(), self.phase);
    }

    /// The barrier at which a consumer says that it is done with the stage.
    pub fn done(&self) -> Mbarrier<'k> {
        self.ring.empty.at(self.barriers())
    }

    /// Leaves out `stages` stages, which others take.
    ///
    /// A wait sees a phase's parity, so that whoever waits must know that the round before the one waited for is over. Who fills
    /// each `stages`-th stage knows that what was in its last one is read; that all before it are as well, if they are read in order;
    /// and so the stage of two rounds before, if a round has at least as many stages. Of readers who read each `stages`-th in turn,
    /// each knows only of its own: a round has to have whole turns.
    pub fn skip(&self, stages: Reg<'k, u32>) {
        let at = self.stage + stages;
        let rounds = at / self.ring.stages;
        self.stage.set(at - rounds * self.ring.stages);
        self.phase.skip(rounds);
    }

    /// Goes to the next stage.
    pub fn advance(&self) {
        let k = self.stage.kernel();
        if self.ring.stages == 1 {
            return self.phase.advance();
        }
        self.stage.increase(1);
        let wrapped = self.stage.eq(self.ring.stages);
        k.when(wrapped, || self.stage.set(0));
        self.phase.advance_if(wrapped);
    }
}
