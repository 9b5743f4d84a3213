//! What kernels that go over rows have in common: what a thread loads and stores at once, and sums over the threads
//! of a row.

mod team;
mod unit;

pub(super) use team::{Team, across_lanes};
pub(super) use unit::{Loaded, Place, Unit};
