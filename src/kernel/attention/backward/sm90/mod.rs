//! Hopper's kernels: dK and dV of tiles of keys, with shares of dQ that are added up, or without; and dQ of tiles
//! of queries.

mod choose;
pub mod keys;
pub mod queries;
mod schedule;
mod store;

pub use choose::choose;
