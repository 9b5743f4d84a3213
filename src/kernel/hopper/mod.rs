//! What kernels for Hopper share: a producer's loads, the ring that they fill, products, the stores of
//! their sums, and who waits for whom.

pub mod barriers;
pub mod load;
pub mod pingpong;
pub mod product;
pub mod ring;
pub mod store;

use crate::ptx::Reg;
use barriers::Named;

/// Bytes of a swizzled line: 64 16-bit elements.
pub const LINE: u32 = 128;
/// Eight lines: what the swizzle repeats after.
pub const ATOM: u32 = 8 * LINE;
/// Rows of a wgmma, and lines of a slab.
pub const SLAB: u32 = 64;
pub const SLAB_BYTES: u32 = SLAB * LINE;
pub const WARPGROUP: u32 = 128;

/// A multiplying warpgroup, as one of its threads sees it.
#[derive(Clone, Copy)]
pub struct Warpgroup<'k> {
    /// Its number among those that multiply.
    pub number: Reg<'k, u32>,
    pub lane: Lane<'k>,
    /// Holds for one of its threads.
    pub leader: Reg<'k, bool>,
    /// Where the threads of each warpgroup meet.
    pub meeting: Named,
}

impl Warpgroup<'_> {
    /// Its threads meet.
    pub fn sync(&self) {
        self.meeting.of(self.number).sync(self.number.kernel());
    }
}

/// Zeroes lines from line `first` on, of columns of `lines` lines that begin at `to`: what they are is another
/// sequence's or nobody's, and 0 times that need not be 0. Products that this warpgroup begins afterwards see it.
pub fn clear_lines<'k>(
    group: Warpgroup<'k>,
    to: Reg<'k, u32>,
    columns: u32,
    lines: u32,
    first: Reg<'k, i32>,
) {
    const UNIT: u32 = 16;
    let (k, units) = (to.kernel(), LINE / UNIT);
    let thread = group.lane.warp * 32 + group.lane.lane;
    let to = to + thread % units * UNIT;
    let zero = k.var(0u32);
    k.for_(first.or_zero() + thread / units, lines, WARPGROUP / units, |line| {
        let at = to + line * LINE;
        for column in 0..columns {
            k.st_shared(at.at((column * lines * LINE).into()), [zero; 4]);
        }
    });
    k.fence_proxy_async();
    group.sync();
}

/// A thread's place in its warpgroup.
#[derive(Clone, Copy)]
pub struct Lane<'k> {
    pub lane: Reg<'k, u32>,
    /// 0 to 3.
    pub warp: Reg<'k, u32>,
}

impl<'k> Lane<'k> {
    /// The place of a thread, counted among those that multiply.
    pub fn new(thread: Reg<'k, u32>) -> Self {
        Self { lane: thread % 32, warp: thread / 32 % 4 }
    }
}
