//! Products of matrices, `C = act(A·B + bias)`, f16 and bf16 with f32 sums.

pub mod choose;
mod result;
mod share;
pub mod sm80;
pub mod sm90;

pub use super::epilogue::Epilogue;
use crate::ptx::Half;

/// Which dimension of an operand is contiguous in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Major {
    /// K: rows of `A`, columns of `B`.
    K,
    /// The other one, M or N.
    Outer,
}

/// A batch of products, as facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of `A` and `C`.
    pub m: u64,
    /// Columns of `B` and `C`.
    pub n: u64,
    /// Columns of `A`, rows of `B`.
    pub k: u64,
    /// Products.
    pub batch: u64,
    /// The operands' type.
    pub half: Half,
    /// How `A` lies.
    pub lhs: Major,
    /// How `B` lies.
    pub rhs: Major,
    /// What comes after the sum.
    pub epilogue: Epilogue,
}
