//! The gradients of attention (FlashAttention-2, Dao 2023, algorithm 2), of a result `O` whose gradient is
//! `dO`:
//!
//! ```text
//! P  = exp2(S - max - log)      rebuilt from what the forward pass saved of each query
//! dV = Pᵀ·dO
//! dP = dO·Vᵀ
//! dS = P∘(dP - D)               D = Σ O∘dO of a query, less the gradient of its log-sum-exp
//! dK = dSᵀ·Q·scale
//! dQ = dS·K·scale
//! ```

pub mod dq;
mod launch;
pub mod sm90;
pub mod sums;
mod work;

pub use launch::{Launch, TileShape};

use super::{Lengths, Mask, Problem as Attention, ScoreMod};
use crate::kernel::name::given;

/// Words of a name.
fn describe(mask: Mask, scores: &ScoreMod, lengths: Lengths) -> String {
    let mask = match mask {
        Mask::None => "",
        Mask::Right => " causal",
        Mask::Window => " window",
    };
    let bias = scores.bias.map_or(String::new(), |bias| {
        format!(" +{}{}", bias.element.name(), given(bias.pairs, "x2"))
    });
    let lengths = match lengths {
        Lengths::Full => "",
        Lengths::Padded => " padded",
        Lengths::Packed => " packed",
    };
    let words = [
        given(scores.scale_first, " shrunk"),
        given(scores.softcap, " softcap"),
        given(scores.alibi, " alibi"),
    ];
    format!("{mask}{bias}{lengths}{}", words.concat())
}

/// A backward pass, as facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// The attention. `out` is the type of its result; the gradient of that is of the operands' type.
    pub attention: Attention,
    /// Whether the log-sum-exp has a gradient.
    pub lse_grad: bool,
    /// The bias's gradient, if it is wanted.
    pub bias_grad: Option<BiasGrad>,
    /// Whether the results are the same from run to run, to the last bit.
    pub deterministic: bool,
}

/// The gradient of a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct BiasGrad {
    /// Sequences, heads and queries that share one: 1 or all of each.
    pub repeated: [u64; 3],
}

/// What the rows of a tile are: the blocks that it walks are of the other side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Side {
    /// Queries, against blocks of keys.
    Queries,
    /// Keys, against blocks of queries, of all heads that share them.
    Keys,
}
