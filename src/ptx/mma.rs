//! Tensor cores: `mma.sync` (sm_80) and `wgmma` (sm_90a), f16, bf16 and tf32 with f32 sums.
//!
//! # The order of accumulators
//!
//! Of 16 rows and N columns of a product a warp's lanes hold 8 rows by 8 columns after another: accumulator
//! `4j + 2h + c` of lane `l` is row `l/4 + 8h`, column `8j + 2(l%4) + c`.
//!
//! ```text
//!             columns 8j ..                               accumulators of lane 0
//!               0   1    2   3    4   5    6   7          column   0  1   8  9   16 ..
//!   row 0     lane 0   lane 1   lane 2   lane 3           row 0    0  1   4  5    8
//!   row 1     lane 4   lane 5   lane 6   lane 7           row 8    2  3   6  7   10
//!   ..
//!   row 7     lane 28  lane 29  lane 30  lane 31
//!   row 8     lane 0   lane 1   lane 2   lane 3           h = 1: the same lanes once more
//!   ..
//! ```
//!
//! So a lane has two rows, which it shares with its three neighbours of the same `l/4`. `mma.sync` has
//! N = 8, so `j` = 0. Of `wgmma`'s 64 rows each of the four warps has 16. Packed in pairs (`c` = 0, 1),
//! accumulators are a left operand of the next product as they are, with their columns as its K.

use super::memory::list;
use super::{Kernel, Reg, Value};

/// A 16-bit float.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Half {
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    Bf16,
}

impl Half {
    /// What instructions call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::F16 => "f16",
            Self::Bf16 => "bf16",
        }
    }
}

/// The registers of one `mma.sync.m16n8k16`.
#[derive(Clone, Copy, Debug)]
pub struct Mma<'k> {
    /// Lane `l` has rows `l/4` and `l/4 + 8`, k `2(l%4)..` and `2(l%4) + 8..`: (row, k), (row + 8, k),
    /// (row, k + 8), (row + 8, k + 8).
    pub a: [Reg<'k, u32>; 4],
    /// Column `l/4`, the same k.
    pub b: [Reg<'k, u32>; 2],
}

/// How wgmma finds an operand in shared memory.
#[derive(Clone, Copy, Debug)]
pub struct Operand<'k> {
    /// The matrix descriptor.
    pub descriptor: Reg<'k, u64>,
    /// M or N, not K, is contiguous in memory.
    pub transposed: bool,
}

/// One `wgmma.m64nNk16`: `sum = a·b`, or `sum += a·b` where `accumulate` holds.
#[derive(Clone, Copy, Debug)]
pub struct Wgmma<'k> {
    /// The operands' type.
    pub half: Half,
    /// 64 rows.
    pub a: Operand<'k>,
    /// N columns.
    pub b: Operand<'k>,
    /// Whether the sum so far counts.
    pub accumulate: Value<'k, bool>,
}

/// One `wgmma.m64nNk16` whose left operand is in registers.
#[derive(Clone, Copy, Debug)]
pub struct WgmmaRegs<'k> {
    /// The operands' type.
    pub half: Half,
    /// A fragment as [`Mma`] has it; warp `w` of the warpgroup has rows `16w..`. Sums of a product before it are in
    /// this order when they are packed in pairs.
    pub a: [Reg<'k, u32>; 4],
    /// N columns.
    pub b: Operand<'k>,
    /// Whether the sum so far counts.
    pub accumulate: Value<'k, bool>,
}

impl Kernel {
    /// `mma.sync.m16n8k16`: `sum += a·b`. Lane `l` has the sums of (row `l/4`, columns `2(l%4)..+2`)
    /// and of row `l/4 + 8`.
    pub fn mma<'k>(&'k self, half: Half, sum: [Reg<'k, f32>; 4], m: Mma<'k>) {
        let (t, d, a, b) = (half.name(), list(&sum), list(&m.a), list(&m.b));
        self.emit(format_args!(
            "mma.sync.aligned.m16n8k16.row.col.f32.{t}.{t}.f32 {d}, {a}, {b}, {d}"
        ));
    }

    /// `mma.sync.m16n8k8` of tf32: `sum += a·b`. Fragments are as of [`mma`](Self::mma), with a float in
    /// place of two halves: lane `l` has k `l%4` and `l%4 + 4`. The lower 13 bits of a float are not
    /// looked at.
    pub fn mma_tf32<'k>(&'k self, sum: [Reg<'k, f32>; 4], m: Mma<'k>) {
        let (d, a, b) = (list(&sum), list(&m.a), list(&m.b));
        self.emit(format_args!(
            "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {d}, {a}, {b}, {d}"
        ));
    }

    /// `wgmma.mma_async`, N = 2 · `sum.len()`. Warp `w` of the warpgroup has rows `16w..`; sum
    /// `4j + 2h + c` of lane `l` is row `l/4 + 8h`, column `8j + 2(l%4) + c`.
    pub fn wgmma<'k>(&'k self, sum: &[Reg<'k, f32>], m: Wgmma<'k>) {
        self.needs(8, 0);
        let (n, t, d) = (2 * sum.len(), m.half.name(), list(sum));
        let (a, b) = (m.a.descriptor, m.b.descriptor);
        let (ta, tb) = (u8::from(m.a.transposed), u8::from(m.b.transposed));
        self.emit(format_args!(
            "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t} {d}, {a}, {b}, {}, 1, 1, {ta}, {tb}",
            m.accumulate
        ));
    }

    /// [`wgmma`](Self::wgmma) with the left operand in registers.
    pub fn wgmma_regs<'k>(&'k self, sum: &[Reg<'k, f32>], m: WgmmaRegs<'k>) {
        self.needs(8, 0);
        let (n, t, d, a) = (2 * sum.len(), m.half.name(), list(sum), list(&m.a));
        let (b, tb) = (m.b.descriptor, u8::from(m.b.transposed));
        self.emit(format_args!(
            "wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{t}.{t} {d}, {a}, {b}, {}, 1, 1, {tb}",
            m.accumulate
        ));
    }

    /// `wgmma.fence`: before the first wgmma, and after other code touched its registers.
    pub fn wgmma_fence(&self) {
        self.emit(format_args!("wgmma.fence.sync.aligned"));
    }

    /// `wgmma.commit_group`
    pub fn wgmma_commit(&self) {
        self.emit(format_args!("wgmma.commit_group.sync.aligned"));
    }

    /// `wgmma.wait_group`: until at most `pending` groups are under way.
    pub fn wgmma_wait(&self, pending: u32) {
        self.emit(format_args!("wgmma.wait_group.sync.aligned {pending}"));
    }
}
