//! Threads that share a row.

use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Reg, Scalar};

/// Combines a value of each of `lanes` lanes that follow each other, a power of two up to a warp: all of them get the
/// result.
pub(in crate::kernel) fn across_lanes<'k, T: Scalar>(
    mut value: Reg<'k, T>,
    lanes: u32,
    combine: impl Fn(Reg<'k, T>, Reg<'k, T>) -> Reg<'k, T>,
) -> Reg<'k, T> {
    let mut apart = lanes / 2;
    while apart > 0 {
        value = combine(value, value.kernel().shfl_bfly(value, apart));
        apart /= 2;
    }
    value
}

/// Threads of a block that follow each other and share a row: a power of two. Those of several warps meet at a named
/// barrier of theirs, so that each team of a block goes its own way.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Team<'k> {
    /// Threads.
    size: u32,
    /// Of the block.
    threads: u32,
    /// The thread's number in its block.
    thread: Reg<'k, u32>,
}

impl<'k> Team<'k> {
    /// The team of a thread, of those of a block of `threads`: at most 15 of several warps.
    pub fn new(thread: Reg<'k, u32>, size: u32, threads: u32) -> Self {
        debug_assert!(size.is_power_of_two() && threads.is_multiple_of(size));
        debug_assert!(size <= WARP || threads / size <= 15);
        Self { size, threads, thread }
    }

    /// Bytes of shared memory that combining `values` values at a time takes: a power of two, or 0.
    pub fn shared(size: u32, threads: u32, values: u32) -> u32 {
        if size <= WARP { 0 } else { (threads / WARP * values * 4).next_power_of_two() }
    }

    /// Combines some values of all threads, which all of them get. In `shared` are as many bytes as
    /// [`shared`](Self::shared) says, or nothing. Those of the time before may still be read: take turns with two
    /// places.
    pub fn combine<const N: usize>(
        &self,
        shared: Option<Reg<'k, u32>>,
        values: [Reg<'k, f32>; N],
        combine: impl Fn(Reg<'k, f32>, Reg<'k, f32>) -> Reg<'k, f32> + Copy,
    ) -> [Reg<'k, f32>; N] {
        let values = values.map(|value| across_lanes(value, self.size.min(WARP), combine));
        let Some(shared) = shared.filter(|_| self.size > WARP) else { return values };
        let (k, warps) = (self.thread.kernel(), self.size / WARP);
        let (lane, each) = (self.thread % WARP, self.threads / WARP * 4);
        let at = shared + self.thread / WARP * 4;
        for (i, &value) in (0..).zip(&values) {
            k.when(lane.eq(0), || k.st_shared(at.at(i * i64::from(each)), [value]));
        }
        self.meet();
        let first = self.thread / self.size * warps;
        let at = shared + (first + lane % warps) * 4;
        std::array::from_fn(|i| {
            let [value] = k.ld_shared::<f32, 1>(at.at(i as i64 * i64::from(each)));
            across_lanes(value, warps, combine)
        })
    }

    /// Waits for the team's threads.
    fn meet(&self) {
        let k = self.thread.kernel();
        match self.threads == self.size {
            true => k.sync_block(),
            // Barrier 0 is the block's.
            false => k.bar_sync(self.thread / self.size + 1, self.size),
        }
    }
}
