//! How a weight is quantised.

use super::quantize::E4M3_MAX;
use crate::error::{Error, Result};
pub(crate) use crate::kernel::w4::NF4;

/// How a weight `[K, N]` is quantised: what its codes stand for, and which elements share a scale.
///
/// `W[k, n] = scale · (decode(code[k, n]) − zero)`, with the scale, and the zero point if there are any, of the
/// element's group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum QuantScheme {
    /// Integers of four bits (GPTQ, AWQ, compressed-tensors).
    Int4 {
        /// Rows of a column that share a scale: 32, 64 or 128, or −1 for all of them.
        group: i32,
        /// Whether groups have zero points from 0 to 15. Without, codes stand for −8 to 7.
        zero_points: bool,
    },
    /// The sixteen quantiles of a normal distribution (QLoRA, Dettmers et al. 2023; bitsandbytes).
    Nf4 {
        /// Rows of a column that share a scale, their largest magnitude: 32, 64 or 128.
        block: usize,
    },
    /// Integers of eight bits, from −127 to 127.
    Int8 {
        /// What shares a scale: [`Per::Tensor`] or [`Per::Channel`].
        per: Per,
    },
    /// Floats of eight bits with four of exponent and three of mantissa, up to 448 (OCP 8-bit floating point, e4m3).
    Fp8 {
        /// What shares a scale.
        per: Per,
    },
}

/// What shares a scale.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Per {
    /// All elements.
    Tensor,
    /// A column of the weight, which is an output channel.
    Channel,
    /// A block of 128 × 128 elements (DeepSeek-V3).
    Block,
}

/// Rows and columns of [`Per::Block`].
pub(crate) const BLOCK: usize = 128;

impl QuantScheme {
    /// It is one that exists, or what is wrong with it.
    pub(super) fn check(self, op: &'static str) -> Result<()> {
        let (name, got, want, fix) = match self {
            Self::Int4 { group: -1 | 32 | 64 | 128, .. } | Self::Nf4 { block: 32 | 64 | 128 } => {
                return Ok(());
            }
            Self::Int8 { per: Per::Tensor | Per::Channel } | Self::Fp8 { .. } => return Ok(()),
            Self::Int4 { group, .. } => (
                "group",
                group.to_string(),
                "32, 64, 128, or -1 for a whole column",
                "128 is what most checkpoints have",
            ),
            Self::Nf4 { block } => {
                ("block", block.to_string(), "32, 64 or 128", "64 is what bitsandbytes has")
            }
            Self::Int8 { per } => (
                "per",
                format!("Per::{per:?}"),
                "Per::Tensor or Per::Channel",
                "take `QuantScheme::Fp8` for scales of blocks",
            ),
        };
        Err(Error::Value { op, name, got, want: want.into(), fix })
    }

    /// Rows and columns that share a scale, of a weight `[k, n]`; at least 1.
    pub(crate) fn group(self, [k, n]: [usize; 2]) -> [usize; 2] {
        let per = |per| match per {
            Per::Tensor => [k, n],
            Per::Channel => [k, 1],
            Per::Block => [BLOCK, BLOCK],
        };
        let group = match self {
            Self::Int4 { group, .. } => [usize::try_from(group).unwrap_or(k), 1],
            Self::Nf4 { block } => [block, 1],
            Self::Int8 { per: of } | Self::Fp8 { per: of } => per(of),
        };
        group.map(|len| len.max(1))
    }

    /// Whether all rows, and all columns, share a scale.
    pub(crate) fn spans(self) -> [bool; 2] {
        match self {
            Self::Int4 { group, .. } => [group == -1, false],
            Self::Nf4 { .. } => [false; 2],
            Self::Int8 { per } | Self::Fp8 { per } => {
                [matches!(per, Per::Tensor | Per::Channel), per == Per::Tensor]
            }
        }
    }

    /// Whether groups have zero points.
    pub(crate) fn has_zero_points(self) -> bool {
        matches!(self, Self::Int4 { zero_points: true, .. })
    }

    /// Whether a code has four bits.
    pub(crate) fn is_4bit(self) -> bool {
        matches!(self, Self::Int4 { .. } | Self::Nf4 { .. })
    }

    /// The code that stands for 0, or for what is nearest to it without a zero point.
    pub(crate) fn zero_code(self) -> u8 {
        match self {
            Self::Int4 { zero_points: false, .. } => 8,
            Self::Nf4 { .. } => 7,
            Self::Int4 { zero_points: true, .. } | Self::Int8 { .. } | Self::Fp8 { .. } => 0,
        }
    }

    /// The largest magnitude of what codes stand for, less a zero point.
    pub(crate) fn farthest(self) -> f32 {
        match self {
            Self::Int4 { zero_points: false, .. } => 8.0,
            Self::Int4 { zero_points: true, .. } => 16.0,
            Self::Nf4 { .. } => 1.0,
            Self::Int8 { .. } => 128.0,
            Self::Fp8 { .. } => E4M3_MAX,
        }
    }

    /// What the codes of four bits stand for, before zero points are subtracted.
    pub(crate) fn table(self) -> [f32; 16] {
        match self {
            Self::Nf4 { .. } => NF4,
            Self::Int4 { zero_points: true, .. } => std::array::from_fn(|i| i as f32),
            _ => std::array::from_fn(|i| i as f32 - 8.0),
        }
    }
}
