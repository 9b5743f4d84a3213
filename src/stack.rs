//! A view as a stack of matrices: the one place where batch dimensions become offsets.

use candle_core::Layout;

/// Equally shaped matrices inside one storage, in elements.
///
/// Strides of dimensions with one element (or none) say nothing, so they are never trusted here.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Stack {
    offset: usize,
    /// Length and stride of each batch dimension, outermost first.
    batch: Vec<(usize, usize)>,
    pub rows: usize,
    pub cols: usize,
    pub row_stride: usize,
    pub col_stride: usize,
}

impl Stack {
    /// The stack of a layout with at least two dimensions.
    ///
    /// The offset of an empty view, which may lie past the end of its storage, becomes 0.
    pub fn new(layout: &Layout) -> Self {
        let (dims, strides) = (layout.dims(), layout.stride());
        let (b, r) = (dims.len() - 2, dims.len() - 1);
        Self {
            offset: if dims.contains(&0) { 0 } else { layout.start_offset() },
            batch: std::iter::zip(&dims[..b], &strides[..b]).map(|(&d, &s)| (d, s)).collect(),
            rows: dims[b],
            cols: dims[r],
            row_stride: strides[b],
            col_stride: strides[r],
        }
    }

    /// Repeats the stack, without copies, to the batch dimensions `batch`, which must fit.
    pub fn broadcast(mut self, batch: &[usize]) -> Self {
        self = self.with_batch_dims(batch.len());
        for (own, &len) in self.batch.iter_mut().zip(batch) {
            if own.0 != len {
                *own = (len, 0);
            }
        }
        self
    }

    /// With as many batch dimensions at least: those that are missing are of one matrix, before the others.
    pub fn with_batch_dims(mut self, count: usize) -> Self {
        let missing = count.saturating_sub(self.batch.len());
        self.batch.splice(..0, std::iter::repeat_n((1, 0), missing));
        self
    }

    /// Length and stride of each batch dimension, outermost first.
    pub fn batch(&self) -> &[(usize, usize)] {
        &self.batch
    }

    /// Number of matrices.
    pub fn count(&self) -> usize {
        self.batch.iter().map(|&(len, _)| len).product()
    }

    /// Number of elements that the view shows. Repeated over a result's batch dimensions, an operand
    /// may show more than a `usize` counts: then the largest.
    pub fn elements(&self) -> usize {
        let factors = self.batch.iter().map(|&(len, _)| len).chain([self.rows, self.cols]);
        factors.fold(1, usize::saturating_mul)
    }

    /// Where matrix `i` begins.
    pub fn matrix_offset(&self, mut i: usize) -> usize {
        let mut offset = self.offset;
        for &(len, stride) in self.batch.iter().rev() {
            offset += (i % len) * stride;
            i /= len;
        }
        offset
    }

    /// All matrices as one taller matrix, if the strides allow it without a copy.
    pub fn fold_rows(&self) -> Option<Self> {
        let mut dims = self.batch.clone();
        dims.push((self.rows, self.row_stride));
        let (rows, row_stride) = merge(&dims)?;
        Some(Self { offset: self.offset, batch: Vec::new(), rows, row_stride, ..*self })
    }

    /// Whether each matrix is row-major without gaps.
    pub fn is_row_major(&self) -> bool {
        (self.cols <= 1 || self.col_stride == 1) && (self.rows <= 1 || self.row_stride == self.cols)
    }

    /// Whether all elements lie in row-major order without gaps, beginning at the returned offset.
    pub fn contiguous(&self) -> Option<usize> {
        let folded = self.fold_rows()?;
        (folded.is_row_major() || self.elements() == 0).then_some(self.offset)
    }
}

/// The batch dimensions that `a` and `b` broadcast to as NumPy does, if they do.
pub(crate) fn broadcast_batch(a: &[usize], b: &[usize]) -> Option<Vec<usize>> {
    let rank = a.len().max(b.len());
    let size = |dims: &[usize], i: usize| (i + dims.len()).checked_sub(rank).map_or(1, |j| dims[j]);
    (0..rank)
        .map(|i| match (size(a, i), size(b, i)) {
            (x, y) if x == y || y == 1 => Some(x),
            (1, y) => Some(y),
            _ => None,
        })
        .collect()
}

/// The batch dimensions of a tensor of matrices.
pub(crate) fn batch_dims(dims: &[usize]) -> &[usize] {
    &dims[..dims.len() - 2]
}

/// One dimension that walks the same elements as `dims` do, if there is one.
fn merge(dims: &[(usize, usize)]) -> Option<(usize, usize)> {
    if dims.iter().any(|&(len, _)| len == 0) {
        return Some((0, 0));
    }
    let mut longer = dims.iter().copied().filter(|&(len, _)| len != 1);
    // Only ones: a single row, whose stride is never used.
    let first = longer.next().unwrap_or((1, 0));
    longer.try_fold(first, |(outer, outer_stride), (len, stride)| {
        (outer_stride == len * stride).then_some((outer * len, stride))
    })
}

/// What the GPU's engines ask besides.
#[cfg(feature = "cuda")]
impl Stack {
    /// One row-major matrix without gaps, at offset 0.
    pub fn row_major(rows: usize, cols: usize) -> Self {
        Self { offset: 0, batch: Vec::new(), rows, cols, row_stride: cols, col_stride: 1 }
    }

    /// The stack that the same elements make once they are packed row-major, without gaps.
    pub fn packed(&self) -> Self {
        let (rows, cols) = (self.rows, self.cols);
        let mut stride = rows * cols;
        let mut batch: Vec<_> = self.batch.iter().map(|&(len, _)| (len, 0)).collect();
        for (len, s) in batch.iter_mut().rev() {
            *s = stride;
            stride *= *len;
        }
        Self { batch, ..Self::row_major(rows, cols) }
    }

    /// The first rows and columns of each matrix.
    pub fn narrow(self, rows: usize, cols: usize) -> Self {
        Self { rows, cols, ..self }
    }

    /// The transposed matrices.
    pub fn t(&self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self.clone()
        }
    }

    /// Each matrix without its rows before `first`.
    pub fn skip_rows(&self, first: usize) -> Self {
        Self {
            offset: self.offset + first * self.row_stride,
            rows: self.rows - first,
            ..self.clone()
        }
    }

    /// The layout that shows the same elements to candle.
    pub fn layout(&self) -> Layout {
        let batch = self.batch.iter().copied();
        let matrix = [(self.rows, self.row_stride), (self.cols, self.col_stride)];
        let (dims, strides): (Vec<_>, Vec<_>) = batch.chain(matrix).unzip();
        Layout::new(dims.into(), strides, self.offset)
    }

    /// Each matrix of a broadcast stack once.
    pub fn without_repeats(&self) -> Self {
        let once =
            |&(len, stride): &(usize, usize)| (if stride == 0 { len.min(1) } else { len }, stride);
        Self { batch: self.batch.iter().map(once).collect(), ..self.clone() }
    }

    /// The stack after each of its matrices was packed once, with new sizes, and is repeated as before.
    pub fn packed_once(&self, rows: usize, cols: usize) -> Self {
        let packed = Self { rows, cols, ..self.without_repeats() }.packed();
        let repeated = |(&(len, stride), &(_, packed)): (&(usize, usize), &(usize, usize))| {
            (len, if stride == 0 { 0 } else { packed })
        };
        let batch = self.batch.iter().zip(&packed.batch).map(repeated).collect();
        Self { batch, ..packed }
    }

    /// The same matrices with the batch dimensions merged to two, `None` if these strides cannot be.
    pub fn in_two_dims(&self, inner: usize) -> Option<Self> {
        let split = self.batch.len().checked_sub(inner)?;
        let (outer, inner) = self.batch.split_at(split);
        Some(Self { batch: vec![merge(outer)?, merge(inner)?], ..self.clone() })
    }

    /// Numbers that all share an alignment exactly if all matrices begin at multiples of it.
    pub fn origins(&self) -> impl Iterator<Item = usize> + '_ {
        let strides = self.batch.iter().filter(|&&(len, _)| len > 1).map(|&(_, stride)| stride);
        std::iter::once(self.offset).chain(strides)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Shape;

    fn stack(dims: &[usize], strides: &[usize], offset: usize) -> Stack {
        Stack::new(&Layout::new(Shape::from_dims(dims), strides.to_vec(), offset))
    }

    fn offsets(s: &Stack) -> Vec<usize> {
        (0..s.count()).map(|i| s.matrix_offset(i)).collect()
    }

    #[test]
    fn offsets_walk_the_batch_in_row_major_order() {
        let s = stack(&[2, 3, 4, 5], &[60, 20, 5, 1], 7);
        assert_eq!(offsets(&s), [7, 27, 47, 67, 87, 107]);
        assert_eq!(s.contiguous(), Some(7));
    }

    #[test]
    fn broadcast_repeats_by_stride_zero() {
        let s = stack(&[1, 4, 5], &[99, 5, 1], 0).broadcast(&[2, 3]);
        assert_eq!(offsets(&s), [0; 6]);
        assert_eq!(s.contiguous(), None);
    }

    #[test]
    fn batches_broadcast_as_numpy_does() {
        assert_eq!(broadcast_batch(&[], &[]), Some(vec![]));
        assert_eq!(broadcast_batch(&[3], &[]), Some(vec![3]));
        assert_eq!(broadcast_batch(&[1, 3], &[5, 1]), Some(vec![5, 3]));
        assert_eq!(broadcast_batch(&[3], &[4, 1]), Some(vec![4, 3]));
        assert_eq!(broadcast_batch(&[0], &[1]), Some(vec![0]));
        assert_eq!(broadcast_batch(&[3], &[2]), None);
    }

    #[test]
    fn folds_where_strides_meet() {
        let folded = stack(&[2, 3, 4, 5], &[60, 20, 5, 1], 0).fold_rows().unwrap();
        assert_eq!((folded.rows, folded.row_stride, folded.count()), (24, 5, 1));
        // [B, S, H, D] read as [B, H, S, D] cannot be folded.
        assert_eq!(stack(&[2, 3, 4, 5], &[60, 5, 15, 1], 0).fold_rows(), None);
        // A row slice of a wider matrix can.
        assert_eq!(stack(&[2, 4, 5], &[32, 8, 1], 3).fold_rows().unwrap().row_stride, 8);
        // Broadcast batches cannot, ones always can.
        assert_eq!(stack(&[2, 4, 5], &[0, 5, 1], 0).fold_rows(), None);
        assert_eq!(stack(&[1, 4, 5], &[77, 5, 1], 0).fold_rows().unwrap().row_stride, 5);
    }

    #[test]
    fn strides_of_single_rows_are_not_trusted() {
        assert!(stack(&[1, 5], &[99, 1], 0).is_row_major());
        assert!(stack(&[5, 1], &[1, 99], 0).is_row_major());
        assert!(!stack(&[5, 3], &[1, 5], 0).is_row_major());
        assert_eq!(stack(&[2, 0, 5], &[0, 5, 1], 4).contiguous(), Some(0));
        // Repeated so often that a product of the sizes would wrap to 0.
        assert_eq!(stack(&[1 << 32, 1 << 31, 2], &[0, 2, 1], 0).elements(), usize::MAX);
    }
}
