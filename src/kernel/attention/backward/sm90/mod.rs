//! Hopper's kernels: dK and dV of tiles of keys, with shares of dQ that are added up, or without; and dQ of tiles
//! of queries.

pub mod keys;
pub mod queries;
mod store;
