//! Products of matrices, `C = act(scale · A·B + bias)`: f16, bf16 and e4m3 with f32 sums, int8 with exact ones.

pub mod choose;
mod params;
mod plan;
pub(super) mod result;
pub(super) mod share;
pub mod sm80;
pub mod sm90;
pub(super) mod terms;

pub use super::epilogue::{Epilogue, Scale};
pub use params::{Arguments, Name, Operand, PerRow, Scales};
pub use plan::Plan;

use crate::ptx::Factor;

/// Elements along the depth, and columns of the right operand, of blocks that share a scale: those of a stage of
/// bytes.
pub const BLOCK: u32 = 128;

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

/// As what two operands are multiplied: as what both are.
fn multiplied([a, b]: [Factor; 2]) -> Option<Factor> {
    (a == b).then_some(a)
}

/// The rule of a configuration's check that operands of 8 bits lie along K, or else what is wrong.
fn lies_along_k(elements: [Factor; 2], majors: [Major; 2]) -> (bool, String) {
    let holds = elements.iter().zip(majors).all(|(e, major)| e.size() > 1 || major == Major::K);
    (holds, format!("operands of {} that do not lie along K", elements[0].name()))
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
    pub elements: [Factor; 2],
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
