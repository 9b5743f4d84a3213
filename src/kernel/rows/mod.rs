//! What kernels that go over rows have in common: what a thread loads and stores at once, how a team of threads holds a row,
//! and sums over its threads.

mod ring;
mod team;
mod tile;
mod unit;
mod walk;

pub(super) use ring::Ring;
pub(super) use team::{Team, across_lanes};
pub use tile::Tile;
pub(super) use tile::{Room, Slots};
pub(super) use unit::{Loaded, Place, Unit};
pub(super) use walk::{Walk, begin};

/// What of some rows is beyond what kernels count, and the most that they do: steps go on beyond the last row or unit.
pub(super) fn limit(rows: u64, cols: u64) -> Option<(String, u32)> {
    const MOST: u32 = i32::MAX as u32;
    let over = rows > MOST.into() || cols > MOST.into();
    over.then(|| (format!("{rows} rows of {cols} elements"), MOST))
}
