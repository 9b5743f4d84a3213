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
