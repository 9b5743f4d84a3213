//! Making an operand fit a kernel: row-major, aligned, padded, cast. What fits already is taken as it
//! is; otherwise one copy is made on candle's stream, with candle's own kernels where there are any.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::{CudaStorage, DType, Layout, Result, Shape};

use super::driver::memory::uninit;
use super::native;
pub(super) use crate::check::copyable;
use crate::stack::Stack;

/// What a kernel wants of an operand. `Want::default()` is row-major.
#[derive(Clone, Copy, Default)]
pub(super) struct Want {
    /// Bytes of the kernel's widest load, if more than an element: each matrix begins at a multiple.
    pub align: usize,
    /// Cast to this dtype.
    pub dtype: Option<DType>,
    /// Multiply by this.
    pub factor: Option<f32>,
    /// Zero rows before the first.
    pub rows_before: usize,
    /// Zero rows up to this number in all, if more than there are.
    pub rows: usize,
    /// Zero columns up to this number in all, if more than there are.
    pub cols: usize,
    /// One matrix: a stack that does not fold is packed.
    pub folded: bool,
}

enum Held<'a> {
    View(&'a CudaStorage),
    Copy(CudaStorage),
}

/// An operand that fits.
pub(super) struct Fitted<'a> {
    held: Held<'a>,
    pub stack: Stack,
}

impl<'a> Fitted<'a> {
    /// What is taken as it is.
    pub fn view(storage: &'a CudaStorage, stack: Stack) -> Self {
        Self { held: Held::View(storage), stack }
    }

    /// What was made for it.
    pub fn copy(storage: CudaStorage, stack: Stack) -> Self {
        Self { held: Held::Copy(storage), stack }
    }

    /// What was made for it, if anything was.
    pub fn into_copy(self) -> Option<CudaStorage> {
        match self.held {
            Held::View(_) => None,
            Held::Copy(storage) => Some(storage),
        }
    }

    pub fn storage(&self) -> &CudaStorage {
        match &self.held {
            Held::View(storage) => storage,
            Held::Copy(storage) => storage,
        }
    }

    /// Where matrix `i` begins; a single matrix serves all.
    pub fn offset(&self, i: usize) -> usize {
        self.stack.matrix_offset(if self.stack.count() == 1 { 0 } else { i })
    }
}

/// The operand as the kernel wants it. Repeated (broadcast) matrices are never copied twice.
pub(super) fn fit<'a>(
    op: &'static str,
    (storage, stack): (&'a CudaStorage, &Stack),
    want: Want,
) -> Result<Fitted<'a>> {
    let stack = match want.folded {
        true => stack.fold_rows().unwrap_or_else(|| stack.clone()),
        false => stack.clone(),
    };
    let dtype = want.dtype.unwrap_or(storage.dtype());
    let lines = if want.folded { stack.count() * stack.rows } else { stack.rows };
    let (rows, cols) = (want.rows.max(lines + want.rows_before), want.cols.max(stack.cols));
    let same_size = (rows, cols) == (lines, stack.cols);
    let fits = stack.is_row_major()
        && is_aligned(&stack, storage.dtype(), want.align)
        && !(want.folded && stack.count() != 1);
    if fits && same_size && dtype == storage.dtype() && want.factor.is_none() {
        return Ok(Fitted { held: Held::View(storage), stack });
    }
    let once = if want.folded { stack.clone() } else { stack.without_repeats() };
    copyable(op, once.elements().max(once.count().saturating_mul(rows).saturating_mul(cols)))?;
    let layout = once.layout();
    let mut copy = match (dtype == storage.dtype(), want.factor) {
        (true, Some(factor)) => storage.affine(&layout, f64::from(factor), 0.0)?,
        (true, None) if dtype == DType::F8E4M3 => native::packed_bytes(op, storage, &layout)?,
        (true, None) => pack(storage, &layout)?,
        (false, None) => storage.to_dtype(&layout, dtype)?,
        (false, Some(factor)) => {
            let cast = storage.to_dtype(&layout, dtype)?;
            cast.affine(&Layout::contiguous(layout.shape()), f64::from(factor), 0.0)?
        }
    };
    let count = if want.folded { 1 } else { once.count() };
    if cols != stack.cols {
        copy = pad(&copy, count * lines, stack.cols, 0, cols)?;
    }
    if rows != lines {
        copy = pad(&copy, count, lines * cols, want.rows_before * cols, rows * cols)?;
    }
    let stack = match want.folded {
        true => Stack::row_major(rows, cols),
        false => stack.packed_once(rows, cols),
    };
    Ok(Fitted { held: Held::Copy(copy), stack })
}

/// Whether each matrix and row begins at a multiple of `align` bytes.
pub(super) fn is_aligned(stack: &Stack, dtype: DType, align: usize) -> bool {
    let size = dtype.size_in_bytes();
    align <= size || stack.origins().all(|elements| (elements * size).is_multiple_of(align))
}

/// A contiguous copy of a view, but not of e4m3.
pub(super) fn pack(storage: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    let mut out = uninit(storage.device(), layout.shape(), storage.dtype())?;
    storage.copy_strided_src(&mut out, 0, layout)?;
    Ok(out)
}

/// `lines` contiguous lines of `len` elements, each put at `before` of a line of `to` zeros.
pub(super) fn pad(
    src: &CudaStorage,
    lines: usize,
    len: usize,
    before: usize,
    to: usize,
) -> Result<CudaStorage> {
    let mut out = src.device().zeros_impl(&Shape::from((lines, to)), src.dtype())?;
    src.copy2d(&mut out, lines, len, len, to, 0, before)?;
    Ok(out)
}
