//! What kernels for Ampere and everything later share: tiles in shared memory that `cp.async` fills and
//! `ldmatrix` reads.

pub mod swizzle;
