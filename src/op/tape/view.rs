//! Views of contiguous tensors: which of the elements they have, and in which order.

use std::cmp::Reverse;

use candle_core::{Layout, Result, Shape, Tensor};

use crate::op::checkpoint::copy;
use crate::op::tensor;

/// A view of a contiguous tensor: with its dimensions in another order, it is some columns of the tensor as a matrix. What
/// `reshape`, `squeeze`, `transpose`, `permute` and one `narrow` make of a tensor, in any order, is one; what `broadcast_as` makes
/// is not.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct View {
    /// The view's dimensions, as they follow each other in memory.
    order: Vec<usize>,
    /// The tensor's shape.
    pub(super) shape: Shape,
    pub(super) columns: Columns,
}

/// Columns of a matrix.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Columns {
    rows: usize,
    pub(super) first: usize,
    pub(super) count: usize,
    /// Columns of the whole matrix.
    pub(super) of: usize,
}

impl View {
    /// What `view` is of `base`, with which it shares memory.
    pub(super) fn between(view: &Layout, base: &Layout) -> Option<Self> {
        let (Some((0, elements)), dims) = (base.contiguous_offsets(), view.dims()) else {
            return None;
        };
        let mut order: Vec<_> = (0..dims.len()).collect();
        // The stride of a dimension of one element says nothing.
        order.sort_by_key(|&i| Reverse(if dims[i] == 1 { usize::MAX } else { view.stride()[i] }));
        // From the innermost: elements without a gap, then rows of them.
        let (mut count, mut rows, mut of) = (1, 1, None);
        for &i in order.iter().rev().filter(|&&i| dims[i] != 1) {
            match of {
                None if view.stride()[i] == count => count *= dims[i],
                None => (rows, of) = (dims[i], Some(view.stride()[i])),
                Some(of) if view.stride()[i] == rows * of => rows *= dims[i],
                Some(_) => return None,
            }
        }
        let (of, first) = (of.unwrap_or(elements), view.start_offset());
        let fits = count > 0 && rows * of == elements && first + count <= of;
        let columns = Columns { rows, first, count, of };
        fits.then(|| Self { order, shape: base.shape().clone(), columns })
    }

    /// A gradient of the view, in the order of the tensor's elements: of its shape, or a matrix of its columns.
    pub(super) fn arrange(&self, grad: &Tensor) -> Result<Tensor> {
        let ordered = self.order.iter().copied().eq(0..self.order.len());
        let grad = if ordered { grad.clone() } else { grad.permute(&self.order[..])? };
        match self.is_all() {
            true if *grad.shape() == self.shape => Ok(grad),
            true => packed(grad)?.reshape(&self.shape),
            false => packed(grad)?.reshape((self.columns.rows, self.columns.count)),
        }
    }

    /// Whether it has all elements.
    pub(super) fn is_all(&self) -> bool {
        self.columns.count == self.columns.of
    }
}

/// Without gaps.
fn packed(t: Tensor) -> Result<Tensor> {
    if t.is_contiguous() { Ok(t) } else { Ok(tensor(copy(&t)?)) }
}

/// Whether two tensors are in the same memory.
pub(super) fn share(a: &Tensor, b: &Tensor) -> bool {
    let place = |t: &Tensor| std::ptr::from_ref(&*t.storage_and_layout().0).addr();
    place(a) == place(b)
}
