//! What the kernels of a backward pass compute, apart from the GPU that they are for.

use super::Problem;
use crate::kernel::Element;
use crate::kernel::attention::variant::scores;
use crate::kernel::attention::{Lengths, Mask, ScoreMod};

/// The facts of a problem that are in the text of its kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Variant {
    /// Elements of a query and of a key, at most 256.
    pub head_dim: u32,
    /// Elements of a value, at most 256.
    pub value_dim: u32,
    /// What hides keys.
    pub mask: Mask,
    /// The score modification.
    pub score_mod: ScoreMod,
    /// How long sequences are.
    pub lengths: Lengths,
}

impl Variant {
    /// The variant for a problem.
    pub fn new(problem: &Problem) -> Self {
        let attention = &problem.attention;
        Self {
            head_dim: attention.head_dim as u32,
            value_dim: attention.value_dim as u32,
            mask: attention.mask(),
            score_mod: attention.score_mod,
            lengths: attention.lengths,
        }
    }

    /// In a name: elements of a query and of a value.
    pub(super) fn widths(&self) -> String {
        format!("d{}/{}", self.head_dim, self.value_dim)
    }

    /// The end of a name: that of an attention of operands of a type.
    pub(super) fn describe(&self, operands: Element) -> String {
        format!(", {}{}", operands.name(), scores(self.mask, &self.score_mod, self.lengths))
    }
}
