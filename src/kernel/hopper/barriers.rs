//! Who waits for whom within a block: named barriers and mbarriers, handed out as shared memory is, so
//! that no number and no phase is typed in.

use crate::kernel::Arena;
use crate::ptx::{Kernel, Reg, Value};

/// The named barriers of a block (`bar.sync`), each handed out once. Number 0 is the whole block's.
#[derive(Debug)]
pub struct NamedBarriers {
    used: u32,
}

impl NamedBarriers {
    /// What the hardware has for a block.
    const LIMIT: u32 = 16;

    pub fn new() -> Self {
        Self { used: 1 }
    }

    /// A barrier for each of `groups` groups of threads, at which `threads` threads meet.
    pub fn each(&mut self, groups: u32, threads: u32) -> Named {
        let first = self.used;
        self.used += groups;
        Named { first, threads }
    }

    /// How many are handed out.
    pub fn used(&self) -> u32 {
        self.used
    }

    /// The rule of a configuration's check: whether that many are there, or else what is wrong.
    pub fn rule(used: u32) -> (bool, String) {
        let limit = Self::LIMIT;
        (used <= limit, format!("{used} named barriers (at most {limit})"))
    }
}

/// Named barriers in a row, one for each group of threads.
#[derive(Clone, Copy, Debug)]
pub struct Named {
    first: u32,
    threads: u32,
}

impl Named {
    /// The barrier of the only group.
    pub fn only(&self) -> NamedBarrier<'static> {
        NamedBarrier { id: self.first.into(), threads: self.threads }
    }

    /// The barrier of group `group`.
    pub fn of<'k>(&self, group: Reg<'k, u32>) -> NamedBarrier<'k> {
        NamedBarrier { id: (group + self.first).into(), threads: self.threads }
    }
}

/// One named barrier.
#[derive(Clone, Copy, Debug)]
pub struct NamedBarrier<'k> {
    id: Value<'k, u32>,
    threads: u32,
}

impl NamedBarrier<'_> {
    /// Waits until all of its threads are here or have arrived.
    pub fn sync(&self, k: &Kernel) {
        k.bar_sync(self.id, self.threads);
    }

    /// Counts without waiting.
    pub fn arrive(&self, k: &Kernel) {
        k.bar_arrive(self.id, self.threads);
    }
}

/// The right to issue products, which goes round from warpgroup to warpgroup: one's softmax runs while
/// another's products do.
///
/// ```text
/// group 0   sync(0) │ products │ arrive(1)     softmax          sync(0) │ products │ …
/// group 1              waits at sync(1)        │ products │ arrive(0)     softmax
/// ```
#[derive(Clone, Copy)]
pub struct RoundRobin<'k> {
    /// Where this warpgroup waits, and where the next one does.
    pub mine: NamedBarrier<'k>,
    pub next: NamedBarrier<'k>,
}

impl RoundRobin<'_> {
    pub fn wait(&self, k: &Kernel) {
        self.mine.sync(k);
    }

    pub fn pass(&self, k: &Kernel) {
        self.next.arrive(k);
    }
}

/// Mbarriers side by side in shared memory: their offset.
#[derive(Clone, Copy, Debug)]
pub struct Mbarriers {
    offset: u32,
}

impl Mbarriers {
    pub const BYTES: u32 = 8;

    pub fn new(arena: &mut Arena, count: u32) -> Self {
        Self { offset: arena.region(count * Self::BYTES, Self::BYTES) }
    }

    /// For one thread of the block: phases of barrier `index` complete after `arrivals`.
    pub fn init(&self, k: &Kernel, base: Reg<u32>, index: u32, arrivals: u32) {
        k.mbarrier_init(base.at((self.offset + index * Self::BYTES).into()), arrivals);
    }

    /// Barrier `index`.
    pub fn of<'k>(&self, base: Reg<'k, u32>, index: Reg<'k, u32>) -> Mbarrier<'k> {
        Mbarrier { address: base + self.offset + index * Self::BYTES }
    }

    /// The barrier that lies where these begin, seen from `base`.
    pub fn at<'k>(&self, base: Reg<'k, u32>) -> Mbarrier<'k> {
        Mbarrier { address: base + self.offset }
    }

    /// Waits at the barrier that [`at`](Self::at) gives, whose address needs no register of its own.
    pub fn wait<'k>(&self, base: Reg<'k, u32>, phase: Phase<'k>) {
        base.kernel().mbarrier_wait(base.at(self.offset.into()), phase.parity);
    }
}

/// A barrier in shared memory that counts arrivals and the bytes of copies.
#[derive(Clone, Copy)]
pub struct Mbarrier<'k> {
    address: Reg<'k, u32>,
}

impl<'k> Mbarrier<'k> {
    /// A register for one to come.
    pub fn unset(k: &'k Kernel) -> Self {
        Self { address: k.reg() }
    }

    /// Becomes another one.
    pub fn set(&self, other: Self) {
        self.address.set(other.address);
    }

    pub fn address(&self) -> Reg<'k, u32> {
        self.address
    }

    pub fn wait(&self, phase: Phase<'k>) {
        self.address.kernel().mbarrier_wait(self.address, phase.parity);
    }

    pub fn arrive(&self) {
        self.address.kernel().mbarrier_arrive(self.address);
    }

    /// Arrives, and promises `bytes` of copies.
    pub fn expect(&self, bytes: Reg<'k, u32>) {
        self.address.kernel().mbarrier_arrive_expect_tx(self.address, bytes);
    }
}

/// Which phase of an mbarrier is waited for next, as its parity.
#[derive(Clone, Copy)]
pub struct Phase<'k> {
    parity: Reg<'k, u32>,
}

impl<'k> Phase<'k> {
    /// The first phase: complete once all have arrived.
    pub fn first(k: &'k Kernel) -> Self {
        Self { parity: k.var(0) }
    }

    /// The phase before the first one, which counts as complete: the first wait passes.
    pub fn before_first(k: &'k Kernel) -> Self {
        Self { parity: k.var(1) }
    }

    /// The next one.
    pub fn advance(&self) {
        self.parity.set(self.parity ^ 1);
    }

    /// The next one, if the predicate holds.
    pub fn advance_if(&self, holds: Reg<'k, bool>) {
        let flipped = self.parity ^ 1;
        self.parity.kernel().when(holds, || self.parity.set(flipped));
    }

    /// The one that many phases on.
    pub fn skip(&self, phases: Reg<'k, u32>) {
        self.parity.set(self.parity ^ (phases & 1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn named_barriers_do_not_overlap() {
        let mut all = NamedBarriers::new();
        let (two, three) = (all.each(2, 128), all.each(3, 256));
        assert_eq!([two.first, three.first, all.used()], [1, 3, 6]);
    }

    #[test]
    fn a_block_has_sixteen_named_barriers() {
        let mut all = NamedBarriers::new();
        all.each(15, 128);
        assert!(NamedBarriers::rule(all.used()).0);
        all.each(1, 128);
        let (holds, what) = NamedBarriers::rule(all.used());
        assert!(!holds);
        assert_eq!(what, "17 named barriers (at most 16)");
    }
}
