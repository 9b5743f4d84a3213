//! Weights of four or eight bits, `W[k, n] = scale · (decode(code[k, n]) − zero)`, by 16-bit activations on a GPU.
//!
//! Codes of eight bits are read where products of bytes by bytes read them, too: along K, a line for each column.
//!
//! # The packed form
//!
//! Codes of four bits lie as the tensor cores want a left operand `Wᵀ`, so that no kernel has to move them between lanes: in
//! blocks of 64 columns of `W` by 64 of its rows, 2 KiB each; those of the same columns follow each other. A block
//! has 16 bytes for each of 128 threads, a word for each 16 rows. A word's nibbles, the lowest first, are elements
//! of the registers `a0..a3` of `mma.m16n8k16`, or of `wgmma` with its left operand in registers:
//!
//! ```text
//!  nibble     0        1        2        3        4         5         6         7
//!  element  a0 low   a1 low   a2 low   a3 low   a0 high   a1 high   a2 high   a3 high
//!  column     g       g + 8     g       g + 8     g        g + 8      g        g + 8      g = 16 · warp + lane / 4
//!  row        r        r       r + 8    r + 8    r + 1     r + 1     r + 9     r + 9      r = 16 · word + 2 · (lane % 4)
//! ```
//!
//! Of nf4, whose values are looked up in pairs, those of a register are a byte: `a0 low, a0 high, a1 low, a1 high, ...`
//!
//! A lane needs the zero points of columns `g` and `g + 8`, so these follow each other: a row of them has of each 16 columns
//! first 0 and 8, then 1 and 9, and so on, and is as long as whole 16 columns.
//!
//! Past the weight's rows and columns is the code of zero. The same bytes serve all products. What comes from a
//! file or goes there is the plain form: words of eight rows of a column, the first row in the lowest nibble.
//! [`layout`] has the way from one to the other, and to elements.

mod bytes;
pub mod layout;
pub(super) mod nibbles;
pub(super) mod params;
mod plan;
pub mod stream;
pub mod tiles;
pub(super) mod weight;

pub use nibbles::{NF4, Table};
pub use params::{Arguments, Weight};
pub use plan::{Plan, Problem, candidates, together};

use super::Element;
use super::name::given;

/// Columns and rows of a block of codes.
pub const BLOCK: u32 = 64;
/// Weights that one kernel multiplies with, at most: those of queries, keys and values.
pub const MOST_WEIGHTS: usize = 3;
/// Columns of which a row of zero points has the first half and the other one in turn.
pub const INTERLEAVED: u32 = 16;
/// Bytes of a block.
pub const BLOCK_BYTES: u32 = BLOCK * BLOCK / 2;

/// What a code stands for, before its zero point is subtracted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Codes {
    /// The number from 0 to 15. Without zero points it is 8 less.
    Int4,
    /// A quantile of the normal distribution.
    Nf4,
    /// A byte of two's complement.
    Int8,
    /// A float of eight bits with four of exponent.
    E4m3,
}

impl Codes {
    /// Whether codes are bytes.
    pub fn are_bytes(self) -> bool {
        matches!(self, Self::Int8 | Self::E4m3)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Int4 => "int4",
            Self::Nf4 => "nf4",
            Self::Int8 => "int8",
            Self::E4m3 => "e4m3",
        }
    }

    /// The bits of a word at which those of both elements of register `a0`, `a1`, `a2` or `a3` begin.
    fn bits(self, register: u32) -> [u32; 2] {
        match self {
            Self::Int4 => [4 * register, 16 + 4 * register],
            Self::Nf4 => [8 * register, 8 * register + 4],
            Self::Int8 | Self::E4m3 => unreachable!("bytes are not packed"),
        }
    }
}

/// How a weight is quantised.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// What codes stand for.
    pub codes: Codes,
    /// Whether groups have zero points, a byte each.
    pub zeros: bool,
    /// The type of the scales.
    pub scale: Element,
    /// Rows of a column that share a scale: 32, 64 or 128; `None`: all of them. Of e4m3 128 with 128 columns, or all
    /// rows of a column or of the weight.
    pub group: Option<u32>,
}

impl Scheme {
    /// `int4 zeros g128`
    pub(super) fn name(&self) -> String {
        let codes = self.codes.name();
        let zeros = given(self.zeros, " zeros");
        let group = self.group.map_or("column".into(), |rows| format!("g{rows}"));
        format!("{codes}{zeros} {group}")
    }

    /// The code that stands for zero, or is nearest to it: what lies past a weight's end.
    pub fn zero_code(&self) -> u32 {
        match (self.codes, self.zeros) {
            (Codes::Int4, false) => 8,
            (Codes::Int4, true) | (Codes::Int8 | Codes::E4m3, _) => 0,
            (Codes::Nf4, _) => 7,
        }
    }

    /// Groups of a column of `k` rows.
    pub fn groups(&self, k: u64) -> u64 {
        self.group.map_or(1, |rows| k.div_ceil(rows.into()))
    }

    /// Whether there are such weights, or what is in the way.
    pub(super) fn check(&self) -> Result<(), String> {
        match (self.codes, self.zeros, self.group) {
            (Codes::Nf4, true, _) => Err("zero points of nf4".into()),
            (Codes::Int8 | Codes::E4m3, true, _) => Err("zero points of bytes".into()),
            (Codes::Int8, _, Some(rows)) | (Codes::E4m3, _, Some(rows @ (32 | 64))) => {
                Err(format!("groups of {rows} rows of bytes"))
            }
            (.., None | Some(32 | 64 | 128)) => Ok(()),
            (.., Some(rows)) => Err(format!("groups of {rows} rows (32, 64 or 128)")),
        }
    }
}

/// Blocks of a packed weight of `k` rows and `n` columns.
pub fn blocks(k: u64, n: u64) -> u64 {
    k.div_ceil(BLOCK.into()) * n.div_ceil(BLOCK.into())
}
