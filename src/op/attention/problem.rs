//! The facts of one attention, as the CPU path and the engines take them.

use std::ops::Range;

use candle_core::{DType, Layout, Shape};

use crate::stack::{Stack, batch_dims, broadcast_batch};

/// The facts of one attention. In each stack of [`flash_attn`](super::flash_attn) matrices are those
/// of `[B, heads, rows, columns]`, whatever the tensor's rank and layout.
#[derive(Clone)]
pub(crate) struct AttentionProblem {
    /// `[B, Hq, Sq, D]`.
    pub q: Stack,
    /// `[B, Hkv, Sk, D]`.
    pub k: Stack,
    /// `[B, Hkv, Sk, Dv]`.
    pub v: Stack,
    /// `[B, Hq, Sq, Dv]`, in a storage that has no other elements.
    pub out: Stack,
    /// What the user sees of the result.
    pub shape: Shape,
    pub out_dtype: DType,
    /// Query heads in turn that share one key and value head.
    pub group: usize,
    pub mask: Mask,
    /// The factor on `q·kᵀ`.
    pub scale: f32,
    pub softcap: Option<f32>,
    /// Where the other operands lie, repeated by strides of 0.
    pub extras: Extras<Stack>,
    /// The number of sequences in a packed batch, where B is 1 and sequences are rows. Without one,
    /// each batch is a sequence, or the first rows of it.
    pub packed: Option<usize>,
}

impl AttentionProblem {
    /// Attention from f16 to f32 over batch dimensions that are broadcast.
    pub fn broadcast(q: &Layout, k: &Layout, v: &Layout, causal: bool) -> Self {
        let batch = [k, v].iter().fold(batch_dims(q.dims()).to_vec(), |batch, layout| {
            broadcast_batch(&batch, batch_dims(layout.dims()))
                .expect("checked before the op was made")
        });
        let [q, k, v] = [q, k, v].map(|layout| Stack::new(layout).broadcast(&batch));
        let shape = Shape::from([batch.as_slice(), &[q.rows, v.cols]].concat());
        Self {
            out: Stack::new(&Layout::contiguous(&shape)),
            shape,
            out_dtype: DType::F32,
            group: 1,
            mask: Mask::new(None, causal.then_some(0), q.rows, k.rows),
            scale: 1.0 / (q.cols as f32).sqrt(),
            softcap: None,
            extras: Extras::default(),
            packed: None,
            q,
            k,
            v,
        }
    }

    pub fn seq_q(&self) -> usize {
        self.q.rows
    }

    pub fn seq_k(&self) -> usize {
        self.k.rows
    }

    pub fn head_dim(&self) -> usize {
        self.q.cols
    }

    pub fn value_dim(&self) -> usize {
        self.v.cols
    }

    /// Whether there is nothing to compute for the result: it has no elements, or no key is visible.
    pub fn is_empty(&self) -> bool {
        self.value_dim() == 0 || !self.has_scores()
    }

    /// Whether any query has a key: then there are scores, and their log-sum-exp, also of values without columns.
    pub fn has_scores(&self) -> bool {
        self.q.elements() > 0 && self.seq_k() > 0 && self.packed != Some(0)
    }
}

/// Which keys a query sees. With `o = Sk − Sq`, query `i` sees the keys `i + o − left` to
/// `i + o + right`; `None` is no bound.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub(crate) struct Mask {
    pub left: Option<usize>,
    pub right: Option<usize>,
}

impl Mask {
    /// For at most `sq` queries and `sk` keys: a bound that hides nothing is none.
    pub fn new(left: Option<usize>, right: Option<usize>, sq: usize, sk: usize) -> Self {
        let bounds = |span: usize, len: usize| span.saturating_add(1) < len;
        Self {
            left: left.filter(|&left| bounds(left, sk)),
            right: right.filter(|&right| bounds(right, sq)),
        }
    }

    /// The keys that query `i` of `sq` sees of `sk`.
    pub fn visible(&self, i: usize, sq: usize, sk: usize) -> Range<usize> {
        let end = self.right.map_or(sk, |right| (i + sk + right + 1).saturating_sub(sq).min(sk));
        let start = self.left.map_or(0, |left| (i + sk).saturating_sub(sq + left));
        start.min(end)..end
    }
}

/// The operands besides q, k and v, or something about each.
#[derive(Clone, Debug)]
pub(crate) struct Extras<T> {
    /// `[B, Hq, Sq, Sk]`, f32 or the dtype of q.
    pub bias: Option<T>,
    /// f32 `[B, Hq, 1, 1]`, in a packed batch one for each sequence and head.
    pub slopes: Option<T>,
    /// u32, side by side: of q and of k, `[1, B]`, or both `[1, packed + 1]` where each sequence
    /// begins and the last ends. On a GPU they may be anything.
    pub lengths: [Option<T>; 2],
}

impl<T> Default for Extras<T> {
    fn default() -> Self {
        Self { bias: None, slopes: None, lengths: [None, None] }
    }
}

impl<T> Extras<T> {
    /// In the order in which they follow q, k and v.
    pub fn map<'a, U>(&'a self, mut f: impl FnMut(&'a T) -> U) -> Extras<U> {
        let mut each = |t: &'a Option<T>| t.as_ref().map(&mut f);
        let (bias, slopes) = (each(&self.bias), each(&self.slopes));
        let [q, k] = &self.lengths;
        Extras { bias, slopes, lengths: [each(q), each(k)] }
    }

    pub fn list(&self) -> Vec<&T> {
        let mut list = vec![];
        self.map(|t| list.push(t));
        list
    }
}

/// The storages of one attention; the problem says where in them the operands lie.
pub(crate) struct AttentionInputs<'a, S> {
    pub q: &'a S,
    pub k: &'a S,
    pub v: &'a S,
    pub extras: Extras<&'a S>,
}

/// What is wanted of an attention on a GPU beside its result.
#[derive(Clone, Copy, Debug)]
// CUDA's fields, in a build without it.
#[cfg_attr(not(feature = "cuda"), allow(dead_code))]
pub(crate) struct AttentionWants {
    /// The log-sum-exp.
    pub lse: bool,
    /// What a backward pass rebuilds the probabilities from.
    pub stats: bool,
}

/// The result of an attention on a GPU, which lies as the problem says, and what was wanted besides: f32
/// `[B, Hq, Sq]` each.
pub(crate) struct AttentionResults<S> {
    pub out: S,
    /// −∞ where a row sees no key.
    pub lse: Option<S>,
    /// P = 2^(score − max − log), scores to base 2; 0 and ∞ where a row sees no key. (They are apart: where
    /// scores are huge, the sum of both in f32 has lost the logarithm.)
    pub stats: Option<[S; 2]>,
}

/// What a backward pass has besides.
pub(crate) struct AttentionUpstream<'a, S> {
    /// The result, which lies as the problem says.
    pub out: &'a S,
    /// Its gradient, and where that lies: in the result's dtype, on a GPU in the operands'.
    pub grad: (&'a S, Stack),
    /// What the forward pass saved of each row, f32 `[B, Hq, Sq]` without gaps.
    ///
    /// On the CPU its largest score, −∞ where it sees no key, and the sum of exp(score − that); on a GPU those of
    /// [`AttentionResults`]. They are apart: the log-sum-exp in f32 has lost the sum where scores are near −10⁹,
    /// as under a mask of such a number.
    pub stats: [&'a S; 2],
    /// f32 `[B, Hq, Sq, 1]`, on a GPU without gaps: the gradient of the log-sum-exp.
    pub lse_grad: Option<(&'a S, Stack)>,
}

/// What the backward pass gives.
pub(crate) struct AttentionGrads<T> {
    pub q: T,
    pub k: T,
    pub v: T,
    /// Where it is tracked.
    pub bias: Option<T>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(left: Option<usize>, right: Option<usize>, sq: usize, sk: usize) -> Vec<Range<usize>> {
        let mask = Mask::new(left, right, sq, sk);
        (0..sq).map(|i| mask.visible(i, sq, sk)).collect()
    }

    #[test]
    fn masks_are_aligned_bottom_right() {
        assert_eq!(seen(None, Some(0), 2, 4), [0..3, 0..4]);
        assert_eq!(seen(None, Some(0), 3, 2), [0..0, 0..1, 0..2]);
        assert_eq!(seen(Some(1), Some(0), 3, 3), [0..1, 0..2, 1..3]);
        assert_eq!(seen(Some(0), Some(1), 2, 3), [1..3, 2..3]);
        assert_eq!(seen(Some(0), None, 4, 2), [0..2, 0..2, 0..2, 1..2]);
        // A window before the first key.
        assert_eq!(seen(Some(0), Some(0), 4, 2), [0..0, 0..0, 0..1, 1..2]);
    }

    #[test]
    fn bounds_that_hide_nothing_are_none() {
        let none = Mask::default();
        assert_eq!(Mask::new(None, Some(0), 1, 9), none);
        assert_eq!(Mask::new(Some(usize::MAX), Some(usize::MAX), 9, 9), none);
        assert_eq!(Mask::new(Some(8), Some(8), 9, 9), none);
        assert_ne!(Mask::new(Some(7), None, 9, 9), none);
        assert_ne!(Mask::new(None, Some(7), 9, 9), none);
        for (sq, sk) in [(1, 1), (3, 5), (5, 3), (4, 4), (1, 4), (4, 1)] {
            for bound in 0..6 {
                for (left, right) in [(Some(bound), None), (None, Some(bound))] {
                    let exact = Mask { left, right };
                    let all = (0..sq).map(|i| exact.visible(i, sq, sk)).collect::<Vec<_>>();
                    assert_eq!(seen(left, right, sq, sk), all, "{exact:?} {sq} x {sk}");
                }
            }
        }
    }
}
