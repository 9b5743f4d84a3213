//! Attention, `softmax(mask(scores))·V`, f16, bf16 and f32 with f32 sums, and a score for each pair of a
//! query and a key: `scale·q·k`, then a soft cap, then a bias, then ALiBi.

mod launch;
mod lengths;
mod limit;
pub mod mask;
mod params;
mod plan;
mod scheduler;
pub mod scores;
mod softmax;
mod variant;
mod work;

pub mod backward;
pub mod choose;
pub mod combine;
pub mod sm80;
pub mod sm90;

pub use launch::{Launch, MAX_LENGTH, TileShape};
pub use lengths::Lengths;
pub use limit::Limit;
pub use mask::Mask;
pub use params::{Arguments, Extra, Inputs, Name, Operand, Output};
pub use plan::{Attend, Plan, by_tma};
pub use scheduler::TileOrder;
pub use scores::{Bias, ScoreMod};
pub use variant::Variant;

use super::Element;

/// Elements that a value's are a multiple of, with zeros at its end.
pub const VALUE_UNIT: u64 = 8;

/// An attention, as facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Sequences.
    pub batch: u64,
    /// Heads of the queries.
    pub heads: u64,
    /// Heads of the keys and values, a divisor of the others.
    pub kv_heads: u64,
    /// Queries of a sequence, or of all together if they are packed.
    pub queries: u64,
    /// Keys of a sequence, or of all together if they are packed.
    pub keys: u64,
    /// Elements of a query and of a key.
    pub head_dim: u64,
    /// Elements of a value.
    pub value_dim: u64,
    /// The operands' type.
    pub element: Element,
    /// The result's type.
    pub out: Element,
    /// Query `i` sees keys from `i + o - left` on, `o` being keys minus queries of its sequence.
    pub left: Option<u64>,
    /// Query `i` sees keys up to `i + o + right`. Causal is 0.
    pub right: Option<u64>,
    /// The score modification.
    pub score_mod: ScoreMod,
    /// How long sequences are.
    pub lengths: Lengths,
    /// Whether the logarithm of the sum of the exponentials is stored, too.
    pub lse: bool,
    /// Whether what the backward pass rebuilds probabilities from is stored.
    pub stats: bool,
}

impl Problem {
    /// What hides keys.
    pub fn mask(&self) -> Mask {
        match (self.left, self.right) {
            (None, None) => Mask::None,
            (None, Some(_)) => Mask::Right,
            (Some(_), _) => Mask::Window,
        }
    }

    /// Queries of all heads and sequences.
    pub fn rows(&self) -> u64 {
        let sequences = match self.lengths {
            Lengths::Full | Lengths::Padded => self.batch,
            Lengths::Packed => 1,
        };
        sequences * self.heads * self.queries
    }

    /// Sequences of the mean length in place of packed ones.
    pub fn each(&self) -> Self {
        match self.lengths {
            Lengths::Full | Lengths::Padded => *self,
            Lengths::Packed => Self {
                queries: self.queries.div_ceil(self.batch),
                keys: self.keys.div_ceil(self.batch),
                lengths: Lengths::Padded,
                ..*self
            },
        }
    }

    /// About how many keys `count` queries from `first` on see together.
    pub fn keys_of(&self, first: u64, count: u64) -> u64 {
        // Positions from -queries on, so that none is below 0.
        let at = |query: u64| self.keys + query;
        let end = self.right.map_or(u64::MAX, |right| at(first + count).saturating_add(right));
        let end = end.clamp(self.queries, self.queries + self.keys);
        let begin = self.left.map_or(0, |left| at(first).saturating_sub(left));
        end - begin.clamp(self.queries, end)
    }

    /// About how many keys the queries of a tile see, at most.
    pub fn seen_keys(&self, queries: u64) -> u64 {
        match (self.left, self.right) {
            (Some(left), Some(right)) => {
                self.keys.min(left.saturating_add(right).saturating_add(queries))
            }
            _ => self.keys,
        }
    }
}
