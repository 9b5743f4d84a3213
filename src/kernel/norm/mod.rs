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
use super::multiprocessor::WARP;
use super::rows::{Room, Slots, Team, Tile};
use crate::ptx::{Kernel, Reg};

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

/// Rows of which a team has one at a time, by what is parallel to a warp: threads of a warp go together.
struct Walk<'k> {
    k: &'k Kernel,
    tile: Tile,
    rows: Reg<'k, u32>,
    /// The first of the warp's rows.
    first: Reg<'k, u32>,
    /// A thread's row after that, in a warp that has several.
    offset: Option<Reg<'k, u32>>,
    team: Team<'k>,
    /// The thread's number in its team.
    lane: Reg<'k, u32>,
}

/// A row, and whether it exists, in a warp that has several.
#[derive(Clone, Copy)]
struct Row<'k> {
    number: Reg<'k, u32>,
    exists: Option<Reg<'k, bool>>,
}

impl<'k> Walk<'k> {
    /// Of blocks of `threads` threads.
    fn new(k: &'k Kernel, tile: Tile, threads: u32, rows: Reg<'k, u32>) -> Self {
        let (thread, together) = (k.thread(), tile.team.max(WARP));
        let of_warp = together / tile.team;
        Self {
            k,
            tile,
            rows,
            first: k.block_x() * (threads / tile.team) + thread / together * of_warp,
            offset: (of_warp > 1).then(|| thread % WARP / tile.team),
            team: Team::new(thread, tile.team, threads),
            lane: thread % tile.team,
        }
    }

    /// The thread's row, where the warp's first one is `first`.
    fn row(&self, first: Reg<'k, u32>) -> Row<'k> {
        match self.offset {
            None => Row { number: first, exists: None },
            Some(offset) => {
                let number = first + offset;
                Row { number, exists: Some(number.lt(self.rows)) }
            }
        }
    }

    /// The thread's units of a part of its row.
    fn slots(&self, before: Option<Reg<'k, u32>>, units: Reg<'k, u32>) -> Slots<'k> {
        let first = before.map_or(self.lane, |before| before + self.lane);
        Slots::new(self.k, self.tile, first, units)
    }

    /// What a row has one f32 of.
    fn load(&self, from: Reg<'k, u64>, row: Row<'k>) -> Reg<'k, f32> {
        let number = row.exists.map_or(row.number, |_| row.number.min(self.rows - 1));
        let [x] = self.k.ld_global_nc::<f32, 1>(from.element(number, 4));
        x
    }

    /// Stores some f32 of a row.
    fn store<const N: usize>(&self, to: Reg<'k, u64>, row: Row<'k>, values: [Reg<'k, f32>; N]) {
        let first = self.lane.eq(0);
        let stores = row.exists.map_or(first, |exists| first & exists);
        let to = to.element(row.number, 4 * N as u32);
        self.k.when(stores, || self.k.st_global(to, values));
    }
}

/// The address of a row of elements of a size.
fn begin<'k>(
    (address, stride): (Reg<'k, u64>, Reg<'k, u64>),
    row: Reg<'k, u32>,
    element: Element,
) -> Reg<'k, u64> {
    address + row.wide() * stride * u64::from(element.size())
}

/// `sum + Σ f`.
fn add_to<'k>(sum: Reg<'k, f32>, terms: impl IntoIterator<Item = [Reg<'k, f32>; 2]>) {
    terms.into_iter().for_each(|[a, b]| sum.set(a.fma(b, sum)));
}
