//! Norms of rows, and their gradients: RMSNorm (Zhang and Sennrich, 2019), `x · rstd · weight` with
//! `rstd = 1/√(mean(x²) + eps)`, and LayerNorm (Ba, Kiros and Hinton, 2016), which subtracts the mean before and may add a
//! bias. One pass over memory each way where a row fits the registers of a team of threads.
//!
//! With `x̂ = (x − mean) · rstd` and `g = dy · weight`, gradients are `dx = rstd · (g − mean(g) − x̂ · mean(g·x̂))`, of which
//! RMSNorm has no `mean(g)`, `dweight = Σ dy·x̂` and `dbias = Σ dy` over all rows. A block sums the latter two over its
//! rows, and a second kernel adds the blocks' sums, in their order.

mod backward;
mod columns;
mod forward;
mod moments;
mod params;
mod plan;

pub use backward::{Backward, Sums, emit as emit_backward};
pub use columns::{Columns, emit as emit_columns};
pub use forward::{Forward, emit as emit_forward};
pub use moments::{Moments, emit as emit_moments};
pub use params::{Arguments, Name, Results};
pub use plan::{Pass, Plan, Problem};

use super::Element;
use super::rows::{Ring, Room, Tile, Walk, begin};
use crate::ptx::Reg;

/// What a norm is, and of what.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Norm {
    /// The rows' type.
    pub element: Element,
    /// The weight's type, and the bias's.
    pub weight: Element,
    /// Whether the mean is subtracted: LayerNorm.
    pub centred: bool,
}

impl Norm {
    fn shape(&self) -> String {
        format!("{}{}", if self.centred { "layer " } else { "rms " }, self.element.name())
    }
}

/// `sum + Σ f`.
fn add_to<'k>(sum: Reg<'k, f32>, terms: impl IntoIterator<Item = [Reg<'k, f32>; 2]>) {
    terms.into_iter().for_each(|[a, b]| sum.set(a.fma(b, sum)));
}
