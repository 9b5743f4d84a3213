//! Tensor cores: `mma.sync` (sm_80) and `wgmma` (sm_90a): f16, bf16, tf32 and e4m3 with f32 sums, int8 with
//! i32 sums.
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

use std::fmt::Arguments;

use super::memory::list;
use super::{Kernel, Reg, Scalar, Value};

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

/// What tensor cores multiply. An instruction takes 32 bytes along K: 16 elements of 16 bits, 32 of 8 bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Factor {
    /// 16-bit floats, with f32 sums.
    Half(Half),
    /// Signed bytes, with exact i32 sums.
    S8,
    /// Floats of 4 bits of exponent and 3 of mantissa, with f32 sums. Their `mma.sync` needs sm_89.
    E4m3,
}

impl Factor {
    /// What instructions call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Half(half) => half.name(),
            Self::S8 => "s8",
            Self::E4m3 => "e4m3",
        }
    }

    /// Elements along K of an instruction.
    pub(crate) fn step(self) -> u32 {
        match self {
            Self::Half(_) => 16,
            Self::S8 | Self::E4m3 => 32,
        }
    }

    /// What instructions call its sums, whose registers are of type `S`.
    fn sums<S: Scalar>(self) -> &'static str {
        let sums = match self {
            Self::Half(_) | Self::E4m3 => f32::SUFFIX,
            Self::S8 => i32::SUFFIX,
        };
        assert_eq!(S::SUFFIX, sums, "the sums of {}", self.name());
        sums
    }
}

impl From<Half> for Factor {
    fn from(half: Half) -> Self {
        Self::Half(half)
    }
}

/// The registers of one `mma.sync.m16n8k16`, or of a `.m16n8k32` of 8-bit elements.
#[derive(Clone, Copy, Debug)]
pub struct Mma<'k> {
    /// Lane `l` has rows `l/4` and `l/4 + 8`, k `2(l%4)..` and `2(l%4) + 8..`: (row, k), (row + 8, k),
    /// (row, k + 8), (row + 8, k + 8). Of 8-bit elements twice as many along K.
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

/// One `wgmma.m64nNk16`, or `.m64nNk32` of 8-bit elements: `sum = a·b`, or `sum += a·b` where `accumulate`
/// holds.
#[derive(Clone, Copy, Debug)]
pub struct Wgmma<'k> {
    /// The operands' type. Those of 8 bits are contiguous along K.
    pub factor: Factor,
    /// 64 rows.
    pub a: Operand<'k>,
    /// N columns.
    pub b: Operand<'k>,
    /// Whether the sum so far counts.
    pub accumulate: Value<'k, bool>,
}

/// One [`Wgmma`] whose left operand is in registers.
#[derive(Clone, Copy, Debug)]
pub struct WgmmaRegs<'k> {
    /// The operands' type.
    pub factor: Factor,
    /// A fragment as [`Mma`] has it; warp `w` of the warpgroup has rows `16w..`. Sums of a product before it are in
    /// this order when they are packed in pairs.
    pub a: [Reg<'k, u32>; 4],
    /// N columns.
    pub b: Operand<'k>,
    /// Whether the sum so far counts.
    pub accumulate: Value<'k, bool>,
}

impl Kernel {
    /// `mma.sync.m16n8k16`, or `.m16n8k32` of 8-bit elements: `sum += a·b`. Lane `l` has the sums of (row
    /// `l/4`, columns `2(l%4)..+2`) and of row `l/4 + 8`.
    pub fn mma<'k, S: Scalar>(
        &'k self,
        factor: impl Into<Factor>,
        sum: [Reg<'k, S>; 4],
        m: Mma<'k>,
    ) {
        let factor = factor.into();
        if factor == Factor::E4m3 {
            self.needs(8, 4);
        }
        let (t, s, step) = (factor.name(), factor.sums::<S>(), factor.step());
        let (d, a, b) = (list(&sum), list(&m.a), list(&m.b));
        self.emit(format_args!(
            "mma.sync.aligned.m16n8k{step}.row.col.{s}.{t}.{t}.{s} {d}, {a}, {b}, {d}"
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
    pub fn wgmma<'k, S: Scalar>(&'k self, sum: &[Reg<'k, S>], m: Wgmma<'k>) {
        let flags = flags(m.factor, &[m.a.transposed, m.b.transposed]);
        let (a, b) = (m.a.descriptor, m.b.descriptor);
        self.multiply(m.factor, sum, format_args!("{a}, {b}, {}{flags}", m.accumulate));
    }

    /// [`wgmma`](Self::wgmma) with the left operand in registers.
    pub fn wgmma_regs<'k, S: Scalar>(&'k self, sum: &[Reg<'k, S>], m: WgmmaRegs<'k>) {
        let flags = flags(m.factor, &[m.b.transposed]);
        let (a, b) = (list(&m.a), m.b.descriptor);
        self.multiply(m.factor, sum, format_args!("{a}, {b}, {}{flags}", m.accumulate));
    }

    fn multiply<'k, S: Scalar>(&'k self, factor: Factor, sum: &[Reg<'k, S>], of: Arguments) {
        self.needs(8, 0);
        let (n, d) = (2 * sum.len(), list(sum));
        let (t, s, step) = (factor.name(), factor.sums::<S>(), factor.step());
        self.emit(format_args!(
            "wgmma.mma_async.sync.aligned.m64n{n}k{step}.{s}.{t}.{t} {d}, {of}"
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

/// What follows the predicate of a wgmma: for floats that no operand is negated, for those of 16 bits which
/// operands lie across K.
fn flags(factor: Factor, transposed: &[bool]) -> String {
    let across = || transposed.iter().map(|&t| format!(", {}", u8::from(t)));
    match factor {
        Factor::Half(_) => across().fold(", 1, 1".into(), |flags, flag| flags + &flag),
        Factor::S8 | Factor::E4m3 => {
            assert!(!transposed.contains(&true), "{} lies along K", factor.name());
            (if factor == Factor::S8 { "" } else { ", 1, 1" }).into()
        }
    }
}
