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

pub mod delta;
pub mod dq;
mod launch;
mod params;
mod plan;
pub mod sm80;
pub mod sm90;
pub mod sums;
mod variant;
mod work;

pub use launch::{Launch, TileShape};
pub use params::{Arguments, Gradient};
pub use plan::{Part, Plan, Zeroed};
pub use variant::Variant;

use super::Problem as Attention;

/// A backward pass, as facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// The attention. `out` is the type of its result; the gradient of that is of the operands' type.
    /// `value_dim` is any number up to 256.
    pub attention: Attention,
    /// Rows of the result and of its gradient begin at multiples of so many elements, up to 8.
    pub aligned: u32,
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
