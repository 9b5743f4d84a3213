//! Products of matrices, `C = act(A·B + bias)`, f16 and bf16 with f32 sums.

pub mod choose;
mod params;
mod plan;
pub(super) mod result;
pub(super) mod share;
pub mod sm80;
pub mod sm90;

pub use super::epilogue::Epilogue;
pub use params::{Arguments, Name, Operand};
pub use plan::Plan;

use crate::kernel::Element;
use crate::ptx::Half;

/// Which dimension of an operand is contiguous in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Major {
    /// K: rows of `A`, columns of `B`.
    K,
    /// The other one, M or N.
    Outer,
}

impl Major {
    /// Layouts of `A` and `B` as BLAS names them.
    fn names([a, b]: [Self; 2]) -> &'static str {
        match (a, b) {
            (Self::K, Self::Outer) => "nn",
            (Self::K, Self::K) => "nt",
            (Self::Outer, Self::Outer) => "tn",
            (Self::Outer, Self::K) => "tt",
        }
    }
}

/// As what two operands are multiplied, where their types are that: both f16 or both bf16.
fn multiplied([a, b]: [Element; 2]) -> Option<Half> {
    match (a, b) {
        (Element::Half(a), Element::Half(b)) => (a == b).then_some(a),
        _ => None,
    }
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
    /// The types of `A` and `B`.
    pub elements: [Element; 2],
    /// How `A` lies.
    pub lhs: Major,
    /// How `B` lies.
    pub rhs: Major,
    /// What is done to a sum before it is stored.
    pub epilogue: Epilogue,
}

impl Problem {
    /// What is too large for the kernels, whose coordinates and numbers of tiles have 32 bits, and the
    /// most that they take.
    pub fn limit(&self) -> Option<(String, u64)> {
        const MOST: u64 = i32::MAX as u64;
        // Tiles are down to an eighth of these, and several blocks may share one.
        const MOST_TILES: u64 = MOST / 64;
        let &Self { m, n, k, batch, .. } = self;
        let sizes = [("M", m), ("N", n), ("K", k), ("a batch", batch)];
        if let Some((name, size)) = sizes.into_iter().find(|&(_, size)| size > MOST) {
            return Some((format!("{name} of {size}"), MOST));
        }
        let tiles = m.div_ceil(64).saturating_mul(n.div_ceil(64)).saturating_mul(batch);
        (tiles > MOST_TILES).then(|| (format!("a result of {tiles} tiles of 64 x 64"), MOST_TILES))
    }
}
