//! Two warpgroups that have tiles in turn: one stores while the other multiplies.
//!
//! ```text
//! group 0   begin │ multiply tile 0 │ end   store tile 0       begin │ multiply tile 2 │ end
//! group 1            waits at begin         │ multiply tile 1 │ end    store tile 1
//! ```

use super::barriers::{Mbarrier, Mbarriers, Phase};
use crate::kernel::Arena;
use crate::ptx::{Kernel, Reg};

/// The offset of two barriers: each completes a phase when its warpgroup's turn begins.
#[derive(Clone, Copy, Debug)]
pub struct Pingpong {
    barriers: Mbarriers,
}

impl Pingpong {
    pub fn new(arena: &mut Arena) -> Self {
        Self { barriers: Mbarriers::new(arena, 2) }
    }

    /// For one thread of the block.
    pub fn init(&self, k: &Kernel, base: Reg<u32>) {
        for group in 0..2 {
            self.barriers.init(k, base, group, 1);
        }
    }

    /// Warpgroup `group`, 0 or 1, of which `leader` holds for one thread. The first turn is 0's.
    pub fn join<'k>(
        &self,
        base: Reg<'k, u32>,
        group: Reg<'k, u32>,
        leader: Reg<'k, bool>,
    ) -> PingpongTurn<'k> {
        let k = base.kernel();
        let at = |group: Reg<'k, u32>| self.barriers.of(base, group);
        let turn =
            PingpongTurn { mine: at(group), other: at(group ^ 1), phase: Phase::first(k), leader };
        k.when(group.eq(1) & leader, || turn.other.arrive());
        turn
    }
}

/// A warpgroup's place among two.
#[derive(Clone, Copy)]
pub struct PingpongTurn<'k> {
    mine: Mbarrier<'k>,
    other: Mbarrier<'k>,
    phase: Phase<'k>,
    leader: Reg<'k, bool>,
}

impl PingpongTurn<'_> {
    /// Waits until it is this warpgroup's turn.
    pub fn begin(&self) {
        self.mine.wait(self.phase);
        self.phase.advance();
    }

    /// Gives the turn to the other one.
    pub fn end(&self) {
        self.leader.kernel().when(self.leader, || self.other.arrive());
    }
}
