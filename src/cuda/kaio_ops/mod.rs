//! The engine `Engine::KaioOps`: problems cut and padded to what the kernels of the `kaio-ops` crate
//! take. README lists their limits.

mod attention;
mod matmul;

pub(crate) use attention::flash_attn;
pub(crate) use matmul::matmul;

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Layout, Result};

use super::empty::full;
use super::fit;
use super::{epilogue, session};
use crate::error::Error;

/// The kernels index with u32; this keeps every element index and byte offset of a matrix inside it.
const MAX_ELEMENTS: usize = 1 << 30;

/// A grid has 65535 rows of tiles, and a tile 64 rows of the result: taller problems go in slabs.
const MAX_ROWS: usize = 65_535 * 64;

/// `problem` is over a limit, which it names.
fn unsupported(op: &'static str, problem: &str, fix: &str) -> Error {
    let (what, limit) = ("Engine::KaioOps".into(), format!("cannot take {problem}"));
    Error::Unsupported { op, what, limit, fix: fix.into() }
}

/// A matrix that the kernels can index.
fn indexable(op: &'static str, name: &str, rows: usize, cols: usize) -> Result<()> {
    if rows.saturating_mul(cols) <= MAX_ELEMENTS {
        return Ok(());
    }
    let problem = format!("`{name}` with {rows} x {cols} elements (at most {MAX_ELEMENTS})");
    Err(unsupported(op, &problem, "split it and join the results with `Tensor::cat`").into())
}

/// A product `[m, k] · [k, n]` whose operands and result the kernels can index, slab by slab.
fn product_indexable(
    op: &'static str,
    (lhs, m): (&str, usize),
    k: usize,
    (rhs, n): (&str, usize),
) -> Result<()> {
    let slab = m.min(slab_rows(k.max(n)));
    indexable(op, lhs, slab, k)?;
    indexable(op, rhs, k, n)?;
    indexable(op, "result", slab, n)
}

/// A packed f32 result in the dtype that was asked for.
fn cast(op: &'static str, src: CudaStorage, len: usize, dtype: DType) -> Result<CudaStorage> {
    if dtype == DType::F32 {
        return Ok(src);
    }
    fit::copyable(op, len)?;
    src.to_dtype(&Layout::contiguous(len), dtype)
}

/// The first `rows`, from row `first` on, and `cols` of each of `count` packed `[height, width]`.
fn crop(
    op: &'static str,
    src: CudaStorage,
    count: usize,
    (height, width): (usize, usize),
    first: usize,
    (rows, cols): (usize, usize),
) -> Result<CudaStorage> {
    if (first, rows, cols) == (0, height, width) {
        return Ok(src);
    }
    fit::copyable(op, count * rows * cols)?;
    let strides = vec![height * width, width, 1];
    fit::pack(&src, &Layout::new((count, rows, cols).into(), strides, first * width))
}

/// Rows of a slab of a product whose operands and result are at most `width` wide: whole tiles.
fn slab_rows(width: usize) -> usize {
    (MAX_ELEMENTS / width / 64 * 64).clamp(64, MAX_ROWS)
}

/// Where each slab of a `rows` tall product begins, and its height.
fn slabs(rows: usize, width: usize) -> impl Iterator<Item = (usize, usize)> {
    let height = slab_rows(width);
    (0..rows).step_by(height).map(move |start| (start, height.min(rows - start)))
}
