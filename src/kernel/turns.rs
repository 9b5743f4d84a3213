//! Two warpgroups that take turns.

use super::Arena;
use super::ring::BARRIER_BYTES;
use crate::ptx::{Kernel, Reg};

/// The offset of two barriers: each completes a phase when its warpgroup's turn begins.
#[derive(Clone, Copy, Debug)]
pub struct Turns {
    barriers: u32,
}

impl Turns {
    pub fn new(arena: &mut Arena) -> Self {
        Self { barriers: arena.region(2 * BARRIER_BYTES, BARRIER_BYTES) }
    }

    /// For one thread of the block.
    pub fn init(&self, k: &Kernel, base: Reg<u32>) {
        for group in 0..2 {
            k.mbarrier_init(base.at((self.barriers + group * BARRIER_BYTES).into()), 1);
        }
    }

    /// Warpgroup `group`, 0 or 1, of which `leader` holds for one thread. The first turn is 0's.
    pub fn join<'k>(
        &self,
        base: Reg<'k, u32>,
        group: Reg<'k, u32>,
        leader: Reg<'k, bool>,
    ) -> Turn<'k> {
        let k = base.kernel();
        let at = |group: Reg<'k, u32>| base + self.barriers + group * BARRIER_BYTES;
        let turn = Turn { mine: at(group), other: at(group ^ 1), parity: k.var(0), leader };
        k.when(group.eq(1) & leader, || k.mbarrier_arrive(turn.other));
        turn
    }
}

/// A warpgroup's place among two.
#[derive(Clone, Copy)]
pub struct Turn<'k> {
    mine: Reg<'k, u32>,
    other: Reg<'k, u32>,
    parity: Reg<'k, u32>,
    leader: Reg<'k, bool>,
}

impl Turn<'_> {
    /// Waits until it is this warpgroup's turn.
    pub fn begin(&self) {
        let k = self.mine.kernel();
        k.mbarrier_wait(self.mine, self.parity);
        self.parity.set(self.parity ^ 1);
    }

    /// Gives the turn to the other one.
    pub fn end(&self) {
        let k = self.mine.kernel();
        k.when(self.leader, || k.mbarrier_arrive(self.other));
    }
}
