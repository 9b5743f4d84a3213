//! What the kernels cannot take.

use std::fmt;

use super::MAX_LENGTH;

/// The widest queries, keys and values.
const MAX_HEAD_DIM: u64 = 256;
/// The most rows of all heads, in tiles of 64: several blocks may share one.
const MAX_TILES: u64 = (u32::MAX / 256) as u64;

/// What of a problem is too large.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Limit {
    /// Elements of a query, key or value.
    HeadDim(u64),
    /// Queries or keys of a sequence.
    Length(u64),
    /// Heads of all sequences, each so long.
    Tiles {
        /// Heads.
        heads: u64,
        /// Queries or keys.
        length: u64,
    },
}

impl Limit {
    /// Of heads of all sequences, with queries, keys and values of up to `head_dim` elements, and of up
    /// to `length` queries or keys.
    pub fn of(heads: u64, head_dim: u64, length: u64) -> Option<Self> {
        if head_dim > MAX_HEAD_DIM {
            Some(Self::HeadDim(head_dim))
        } else if length >= MAX_LENGTH {
            Some(Self::Length(length))
        } else if heads.saturating_mul(length.div_ceil(64)) > MAX_TILES {
            Some(Self::Tiles { heads, length })
        } else {
            None
        }
    }
}

impl fmt::Display for Limit {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::HeadDim(dim) => write!(f, "a head dimension of {dim} (at most {MAX_HEAD_DIM})"),
            Self::Length(length) => write!(f, "{length} positions (less than {MAX_LENGTH})"),
            Self::Tiles { heads, length } => write!(f, "{heads} heads of {length} positions"),
        }
    }
}
