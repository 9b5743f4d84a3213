//! Operands as the native kernels read them.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Layout, Result};

use super::super::Operand;
use super::super::fit::{Fitted, Want, fit, pack};
use crate::check;
use crate::kernel::Element;
use crate::kernel::gemm::Major;
use crate::ptx::{Factor, Half};
use crate::stack::Stack;

/// Bytes that a kernel's strides are multiples of.
pub(super) const ALIGN: usize = 16;

/// The matrices of an operand, `outer × depth`, as lines of contiguous elements.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lines {
    pub major: Major,
    /// M or N.
    pub outer: usize,
    /// K.
    pub depth: usize,
    /// Elements from line to line.
    pub stride: usize,
}

impl Lines {
    /// Of a stack whose rows are the outer dimension and whose columns the depth, and of whose elements
    /// 16 bytes hold `unit`; `None` if no dimension is contiguous, or lines do not begin at multiples of
    /// 16 bytes.
    pub fn of(stack: &Stack, unit: usize) -> Option<Self> {
        let (rows, cols) = (stack.rows, stack.cols);
        let lines = |major, contiguous: (usize, usize), lines: (usize, usize)| {
            // The stride of a single line or element is never used.
            let dense = contiguous.0 <= 1 || contiguous.1 == 1;
            let stride = match lines.0 {
                0 | 1 => contiguous.0.next_multiple_of(unit),
                _ => lines.1,
            };
            // Copies of 16 bytes read on to where the next line begins, and a repeated one has no next.
            let repeated = lines.0 > 1 && stride == 0;
            let whole = major == Major::K || !repeated || contiguous.0.is_multiple_of(unit);
            let fits = dense && stride.is_multiple_of(unit) && whole;
            fits.then_some(Self { major, outer: rows, depth: cols, stride })
        };
        let (row, col) = ((rows, stack.row_stride), (cols, stack.col_stride));
        let origins = stack.origins().all(|elements| elements.is_multiple_of(unit));
        let found = lines(Major::K, col, row).or_else(|| lines(Major::Outer, row, col));
        found.filter(|_| origins)
    }
}

/// An operand with lines: as it is, or a padded copy. Rows are the outer dimension.
pub(super) fn operand<'a>(
    op: &'static str,
    storage: &'a CudaStorage,
    stack: &Stack,
) -> Result<(Fitted<'a>, Lines)> {
    let unit = per_chunk(storage.dtype());
    if let Some(lines) = Lines::of(stack, unit) {
        return Ok((Fitted::view(storage, stack.clone()), lines));
    }
    // The copy keeps the order of the dimensions that is nearest to memory's.
    let transposed = stack.rows > 1 && stack.row_stride < stack.col_stride;
    let source = if transposed { stack.t() } else { stack.clone() };
    let cols = source.cols.next_multiple_of(unit);
    let want = Want { cols, align: ALIGN, ..Want::default() };
    let mut copy = fit(op, (storage, &source), want)?;
    let narrowed = copy.stack.narrow(source.rows, source.cols);
    copy.stack = if transposed { narrowed.t() } else { narrowed };
    let lines = Lines::of(&copy.stack, unit).expect("a padded copy has lines");
    Ok((copy, lines))
}

/// A vector without gaps that begins at a multiple of 16 bytes.
pub(super) fn row<'a>(
    op: &'static str,
    (storage, layout): (&'a CudaStorage, &Layout),
) -> Result<Fitted<'a>> {
    let (len, stride, offset) = (layout.dims()[0], layout.stride()[0], layout.start_offset());
    let layout = Layout::new((1, len).into(), vec![len, stride], offset);
    fit(op, (storage, &Stack::new(&layout)), Want { align: ALIGN, ..Want::default() })
}

/// The batch dimensions of a product, as few as walk both operands.
pub(super) struct Batch {
    /// Length and the strides of both operands, outermost first; none for a single product.
    dims: Vec<(usize, [usize; 2])>,
}

impl Batch {
    /// Batch dimensions that a kernel walks itself.
    const INNER: usize = 2;

    pub fn new(a: &Stack, b: &Stack) -> Self {
        let mut dims: Vec<(usize, [usize; 2])> = Vec::new();
        for (&(len, sa), &(other, sb)) in a.batch().iter().zip(b.batch()) {
            debug_assert_eq!(len, other);
            match dims.last_mut() {
                _ if len == 1 => {}
                Some((outer, strides)) if *strides == [len * sa, len * sb] => {
                    *outer *= len;
                    *strides = [sa, sb];
                }
                _ => dims.push((len, [sa, sb])),
            }
        }
        Self { dims }
    }

    fn inner(&self) -> &[(usize, [usize; 2])] {
        &self.dims[self.dims.len().saturating_sub(Self::INNER)..]
    }

    /// Products of one launch.
    pub fn count(&self) -> usize {
        self.inner().iter().map(|&(len, _)| len).product()
    }

    /// The innermost two dimensions of an operand, the innermost first.
    pub fn side(&self, operand: usize) -> [(usize, usize); 2] {
        let mut dims = self.inner().iter().rev().map(|&(len, strides)| (len, strides[operand]));
        std::array::from_fn(|_| dims.next().unwrap_or((1, 0)))
    }

    /// Where each launch begins, in elements of both operands.
    pub fn launches(&self) -> impl Iterator<Item = [usize; 2]> + '_ {
        let outer = &self.dims[..self.dims.len() - self.inner().len()];
        let count = outer.iter().map(|&(len, _)| len).product::<usize>();
        (0..count).map(|mut i| {
            let mut at = [0; 2];
            for &(len, strides) in outer.iter().rev() {
                at[0] += i % len * strides[0];
                at[1] += i % len * strides[1];
                i /= len;
            }
            at
        })
    }
}

/// Elements of 16 bytes.
pub(super) fn per_chunk(dtype: DType) -> usize {
    ALIGN / dtype.size_in_bytes()
}

/// As what tensor cores multiply elements of a 16-bit dtype.
pub(super) fn factor(dtype: DType) -> Factor {
    match dtype {
        DType::BF16 => Factor::Half(Half::Bf16),
        _ => Factor::Half(Half::F16),
    }
}

pub(super) fn element(dtype: DType) -> Element {
    match dtype {
        DType::F32 => Element::F32,
        DType::BF16 => Element::Half(Half::Bf16),
        _ => Element::Half(Half::F16),
    }
}

/// All rows of an operand as those of one matrix, whose elements are contiguous.
pub(super) fn rows<'a>(op: &'static str, (storage, stack): Operand<'a>) -> Result<Fitted<'a>> {
    let folded = stack.fold_rows().filter(|folded| folded.cols <= 1 || folded.col_stride == 1);
    match folded {
        Some(folded) => Ok(Fitted::view(storage, folded)),
        None => {
            check::copyable(op, stack.elements())?;
            let copy = pack(storage, &stack.layout())?;
            let rows = stack.count() * stack.rows;
            Ok(Fitted::copy(copy, Stack::row_major(rows, stack.cols)))
        }
    }
}
