//! What becomes of the products of queries and keys before the softmax.

use crate::kernel::Element;

/// What becomes of scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Scores {
    /// The scale is 0 or less: its products are taken before the largest is looked for.
    pub shrunk: bool,
    /// `cap·tanh(score/cap)`.
    pub softcap: bool,
    /// The type of what is added.
    pub bias: Option<Element>,
    /// A slope of each head times the distance from the query's place is subtracted.
    pub alibi: bool,
}

impl Scores {
    /// Whether the softmax may multiply the products with the scale: nothing is done to them.
    pub fn plain(&self) -> bool {
        *self == Self::default()
    }
}
