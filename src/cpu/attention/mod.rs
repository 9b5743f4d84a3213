//! Flash attention, forward and backward, in blocks (FlashAttention-2, Dao 2023): O(S·D) memory.

mod backward;
mod block;
mod forward;

pub(crate) use backward::attention_backward;
pub(crate) use forward::{Attended, attention};

use std::borrow::Cow;
use std::ops::Range;

use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::widen::packed;
use crate::op::{AttentionInputs, AttentionProblem, Mask};
use crate::stack::Stack;

/// Queries and keys of one block: the scores (64 KB) stay in a core's cache.
const BLOCK_Q: usize = 64;
const BLOCK_K: usize = 256;

/// The problem but for its matrices, which are row-major: `q [heads][sq, d]`, `k [heads/group][sk, d]`.
struct Heads<'a> {
    count: usize,
    group: usize,
    sq: usize,
    sk: usize,
    scale: f32,
    softcap: Option<f32>,
    mask: Mask,
    /// Of each batch; one of all where they are the same.
    sequences: Vec<Vec<Sequence>>,
    bias: Option<(&'a CpuStorage, &'a Stack)>,
    /// Of each head, in a packed batch of each sequence and head.
    slopes: Option<Cow<'a, [f32]>>,
    packed: bool,
    /// Whether a hidden key may be multiplied by its zero probability: not if it is infinite or NaN.
    zeros_hide: bool,
}

/// Rows of a head's q, and of its k and v, that are a problem of their own.
struct Sequence {
    /// Among those of its batch.
    index: usize,
    rows: Range<usize>,
    keys: Range<usize>,
}

impl<'a> Heads<'a> {
    /// `summed` are the matrices that probabilities are multiplied with.
    fn new(
        p: &'a AttentionProblem,
        inputs: &AttentionInputs<'a, CpuStorage>,
        summed: &[&[f32]],
    ) -> Result<Self> {
        let slopes = inputs.extras.slopes.zip(p.extras.slopes.as_ref());
        let finite = |data: &&[f32]| data.par_iter().all(|x| x.is_finite());
        Ok(Self {
            count: p.q.count(),
            group: p.group,
            sq: p.seq_q(),
            sk: p.seq_k(),
            scale: p.scale,
            softcap: p.softcap,
            mask: p.mask,
            sequences: sequences(p, inputs)?,
            bias: inputs.extras.bias.zip(p.extras.bias.as_ref()),
            slopes: slopes.map(|(storage, stack)| packed(storage, stack)).transpose()?,
            packed: p.packed.is_some(),
            zeros_hide: p.mask == Mask::default() || summed.iter().all(finite),
        })
    }

    /// The sequences of head `h` of `count`.
    fn sequences(&self, h: usize, count: usize) -> &[Sequence] {
        &self.sequences[h * self.sequences.len() / count]
    }

    /// The slope of query head `h` in a sequence.
    fn slope(&self, h: usize, sequence: &Sequence) -> Option<f32> {
        let first = if self.packed { sequence.index * self.count } else { 0 };
        self.slopes.as_ref().map(|slopes| slopes[first + h])
    }

    /// The keys of a sequence that any of its queries `q0..q0 + m` sees, from the first to the last.
    fn seen(&self, sequence: &Sequence, q0: usize, m: usize) -> Range<usize> {
        let row = |i| self.mask.visible(i, sequence.rows.len(), sequence.keys.len());
        row(q0).start..row(q0 + m - 1).end
    }

    /// All sequences' rows among those of `count` heads with `len` rows each, cut into pieces.
    fn pieces(
        &self,
        count: usize,
        len: usize,
        size: usize,
        rows: fn(&Sequence) -> &Range<usize>,
    ) -> Vec<Piece<'_>> {
        let all = (0..count).flat_map(|h| self.sequences(h, count).iter().map(move |s| (h, s)));
        let cut = all.flat_map(|(h, sequence)| {
            let Range { start, end } = *rows(sequence);
            blocks(0..end - start, size).map(move |(first, n)| {
                let at = h * len + start + first;
                Piece { h, sequence, first, place: at..at + n }
            })
        });
        cut.collect()
    }
}

/// The sequences of each batch, or one list for all of them.
fn sequences(
    p: &AttentionProblem,
    inputs: &AttentionInputs<CpuStorage>,
) -> Result<Vec<Vec<Sequence>>> {
    let values = |i: usize| -> Result<Option<Vec<usize>>> {
        let given = inputs.extras.lengths[i].zip(p.extras.lengths[i].as_ref());
        let values = given.map(|(storage, stack)| {
            let values = &storage.as_slice::<u32>()?[stack.matrix_offset(0)..][..stack.cols];
            Ok(values.iter().map(|&x| x as usize).collect())
        });
        values.transpose()
    };
    let (q, k, sq, sk) = (values(0)?, values(1)?, p.seq_q(), p.seq_k());
    Ok(match (q, k) {
        (Some(q), Some(k)) if p.packed.is_some() => {
            let each = q.windows(2).zip(k.windows(2)).enumerate();
            let each =
                each.map(|(index, (q, k))| Sequence { index, rows: q[0]..q[1], keys: k[0]..k[1] });
            vec![each.collect()]
        }
        (None, None) => vec![vec![Sequence { index: 0, rows: 0..sq, keys: 0..sk }]],
        (q, k) => {
            let first =
                |of: &Option<Vec<usize>>, b: usize, all| 0..of.as_ref().map_or(all, |of| of[b]);
            let each = 0..p.q.batch()[0].0;
            each.map(|b| {
                vec![Sequence { index: 0, rows: first(&q, b, sq), keys: first(&k, b, sk) }]
            })
            .collect()
        }
    })
}

/// Rows of one sequence of one head, whose results one thread makes.
struct Piece<'a> {
    h: usize,
    sequence: &'a Sequence,
    /// The first row, counted in the sequence.
    first: usize,
    /// The rows, counted over all heads.
    place: Range<usize>,
}

/// What of rows of `width` belongs to each piece.
fn cut<'a>(mut data: &'a mut [f32], width: usize, pieces: &[Piece]) -> Vec<&'a mut [f32]> {
    let mut at = 0;
    let part = |piece: &Piece| {
        let (_, rest) = std::mem::take(&mut data).split_at_mut((piece.place.start - at) * width);
        let (part, rest) = rest.split_at_mut(piece.place.len() * width);
        (at, data) = (piece.place.end, rest);
        part
    };
    pieces.iter().map(part).collect()
}

/// Where each block of a range begins, and its length.
fn blocks(range: Range<usize>, size: usize) -> impl Iterator<Item = (usize, usize)> {
    range.clone().step_by(size).map(move |start| (start, size.min(range.end - start)))
}
