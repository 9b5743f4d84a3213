//! What kernels for Ampere and everything later share: tiles in shared memory that `cp.async` fills and
//! `ldmatrix` reads, and their products.

pub mod copies;
pub mod product;
pub mod store;
pub mod swizzle;
pub mod tf32x3;
pub mod tile;
