//! The backward pass.

use std::ops::Range;

use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::super::exp::exp_minus;
use super::super::widen::packed;
use super::block::{Block, Rows};
use super::{BLOCK_K, BLOCK_Q, Heads, Piece, blocks, cut};
use crate::op::{AttentionGrads, AttentionInputs, AttentionProblem, AttentionUpstream};

/// The gradients of q, k and v, packed, heads before rows, and of a bias of shape `bias` (up to
/// `[B, Hq, Sq, Sk]`); in f32.
pub(crate) fn attention_backward(
    p: &AttentionProblem,
    inputs: &AttentionInputs<CpuStorage>,
    upstream: &AttentionUpstream<CpuStorage>,
    bias: Option<&[usize]>,
) -> Result<AttentionGrads<Vec<f32>>> {
    let (q, k, v) = (packed(inputs.q, &p.q)?, packed(inputs.k, &p.k)?, packed(inputs.v, &p.v)?);
    let out = packed(upstream.out, &p.out)?;
    let grad = packed(upstream.grad.0, &upstream.grad.1)?;
    let zeros = |len| vec![0f32; len];
    let mut grads = AttentionGrads {
        q: zeros(q.len()),
        k: zeros(k.len()),
        v: zeros(v.len()),
        bias: bias.map(|dims| zeros(dims.iter().product())),
    };
    if p.is_empty() {
        return Ok(grads);
    }
    let heads = Heads::new(p, inputs, &[&q, &k, &v, &grad])?;
    let (d, dv) = (p.head_dim(), p.value_dim());
    // Dᵢ = Σ dO·O, the part of dS that all keys of a row share, less the log-sum-exp's gradient, whose
    // slope by a score is the score's probability.
    let mut delta: Vec<f32> = std::iter::zip(out.chunks(dv), grad.chunks(dv))
        .map(|(out, grad)| std::iter::zip(out, grad).map(|(o, g)| o * g).sum())
        .collect();
    if let Some((storage, stack)) = &upstream.lse_grad {
        let lse_grad = packed(storage, stack)?;
        delta.iter_mut().zip(&*lse_grad).for_each(|(delta, grad)| *delta -= grad);
    }
    let backward = Backward {
        heads: &heads,
        q: Rows { data: &q, width: d },
        k: Rows { data: &k, width: d },
        v: Rows { data: &v, width: dv },
        grad: Rows { data: &grad, width: dv },
        max: upstream.stats[0].as_slice()?,
        sum: upstream.stats[1].as_slice()?,
        delta: &delta,
    };
    let rows = heads.pieces(heads.count, heads.sq, BLOCK_Q, |sequence| &sequence.rows);
    let dq = cut(&mut grads.q, d, &rows);
    rows.par_iter().zip(dq).for_each(|(piece, dq)| backward.queries(piece, dq));
    let kv_heads = heads.count / heads.group;
    let keys = heads.pieces(kv_heads, heads.sk, BLOCK_K, |sequence| &sequence.keys);
    keys.par_iter()
        .zip(cut(&mut grads.k, d, &keys))
        .zip(cut(&mut grads.v, dv, &keys))
        .for_each(|((piece, dk), dv)| backward.keys(piece, dk, dv));
    if let Some((dims, dbias)) = bias.zip(grads.bias.as_mut()) {
        backward.bias(p.q.batch()[1].0, dims, dbias);
    }
    Ok(grads)
}

/// What the passes read. Each block of dq has one owner, and each of dk and dv, and of the bias, so that
/// nothing is added atomically and results do not depend on the number of threads.
struct Backward<'a> {
    heads: &'a Heads<'a>,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
    grad: Rows<'a>,
    max: &'a [f32],
    sum: &'a [f32],
    delta: &'a [f32],
}

/// A block's probabilities and gradients.
struct Scratch {
    p: Vec<f32>,
    ds: Vec<f32>,
    /// Scores' slopes by their products, under a softcap.
    bends: Vec<f32>,
}

/// What the gradients of a block are by.
#[derive(Clone, Copy, PartialEq)]
enum By {
    /// The scores, to which a bias is added.
    Scores,
    /// The products of queries and keys, times the scale.
    Products,
}

impl Backward<'_> {
    fn scratch(&self) -> Scratch {
        let zeros = || vec![0f32; BLOCK_Q * BLOCK_K.min(self.heads.sk)];
        let bends = if self.heads.softcap.is_some() { zeros() } else { vec![] };
        Scratch { p: zeros(), ds: zeros(), bends }
    }

    /// Probabilities P and gradients dS of one block, zero where hidden.
    fn block<'s>(&self, block: &Block, by: By, scratch: &'s mut Scratch) -> (&'s [f32], &'s [f32]) {
        let Block { m, n, .. } = *block;
        let (p, ds) = (&mut scratch.p[..m * n], &mut scratch.ds[..m * n]);
        block.inner(p, self.q, self.k, self.heads.scale);
        block.inner(ds, self.grad, self.v, 1.0);
        for (r, (p, ds)) in p.chunks_mut(n).zip(ds.chunks_mut(n)).enumerate() {
            let i = block.query() + r;
            // A row that sees no key, because of the mask or of its bias.
            let visible = if self.max[i] == f32::NEG_INFINITY { 0..0 } else { block.visible(r) };
            for row in [&mut *p, &mut *ds] {
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
            }
            let (p, ds) = (&mut p[visible.clone()], &mut ds[visible.clone()]);
            let bends = &mut scratch.bends[..];
            let bends = if bends.is_empty() { bends } else { &mut bends[..p.len()] };
            block.score(r, visible.start, p, bends);
            exp_minus(p, self.max[i]);
            for (p, ds) in p.iter_mut().zip(&mut *ds) {
                *p /= self.sum[i];
                *ds = *p * (*ds - self.delta[i]);
            }
            if by == By::Products {
                ds.iter_mut().zip(bends).for_each(|(ds, bend)| *ds *= *bend);
            }
        }
        (p, ds)
    }

    /// The rows of a piece of dq.
    fn queries(&self, piece: &Piece, dq: &mut [f32]) {
        let &Piece { h, sequence, first: q0, ref place } = piece;
        let (m, heads, mut scratch) = (place.len(), self.heads, self.scratch());
        for (k0, n) in blocks(heads.seen(sequence, q0, m), BLOCK_K) {
            let block = Block { heads, sequence, h, q0, k0, m, n };
            let (_, ds) = self.block(&block, By::Products, &mut scratch);
            block.add_keys(dq, ds, self.k, heads.scale);
        }
    }

    /// The rows of a piece of dk and dv, summed over the query heads that share its key head.
    fn keys(&self, piece: &Piece, dk: &mut [f32], dv: &mut [f32]) {
        let &Piece { h, sequence, first: k0, ref place } = piece;
        let (n, heads, mut scratch) = (place.len(), self.heads, self.scratch());
        for h in h * heads.group..(h + 1) * heads.group {
            for (q0, m) in blocks(0..sequence.rows.len(), BLOCK_Q) {
                let seen = heads.seen(sequence, q0, m);
                if seen.end <= k0 || seen.start >= k0 + n {
                    continue;
                }
                let block = Block { heads, sequence, h, q0, k0, m, n };
                let (p, ds) = self.block(&block, By::Products, &mut scratch);
                block.add_queries(dv, p, self.grad, 1.0);
                block.add_queries(dk, ds, self.q, heads.scale);
            }
        }
    }

    /// The gradient of a bias of shape `dims`, summed over what it was broadcast along.
    fn bias(&self, heads_of_batch: usize, dims: &[usize], out: &mut [f32]) {
        let mut shape = [1; 4];
        shape[4 - dims.len()..].copy_from_slice(dims);
        let [batch, heads, rows, sk] = shape;
        // The matrix of the bias that head h reads.
        let matrix = |h: usize| {
            let (b, h) = (h / heads_of_batch, h % heads_of_batch);
            b % batch * heads + h % heads
        };
        // An owner has whole rows or, where all rows share one, some of its columns.
        let owned = if rows == 1 { BLOCK_K } else { BLOCK_Q * sk };
        out.par_chunks_mut(rows * sk).enumerate().for_each(|(i, out)| {
            out.par_chunks_mut(owned).enumerate().for_each(|(part, out)| {
                let (q, k, stride) = match rows {
                    1 => (0..self.heads.sq, part * owned..part * owned + out.len(), 0),
                    _ => (part * BLOCK_Q..part * BLOCK_Q + out.len() / sk, 0..sk, sk),
                };
                let mut scratch = self.scratch();
                for h in (0..self.heads.count).filter(|&h| matrix(h) == i) {
                    self.bias_part(h, [q.clone(), k.clone()], out, stride, &mut scratch);
                }
            });
        });
    }

    /// Adds the gradients of one head's scores, queries `q` by keys `k`, to rows `stride` apart.
    fn bias_part(
        &self,
        h: usize,
        [q, k]: [Range<usize>; 2],
        out: &mut [f32],
        stride: usize,
        scratch: &mut Scratch,
    ) {
        let heads = self.heads;
        for sequence in heads.sequences(h, heads.count) {
            for (q0, m) in blocks(q.start..q.end.min(sequence.rows.len()), BLOCK_Q) {
                let seen = heads.seen(sequence, q0, m);
                for (k0, n) in blocks(k.start.max(seen.start)..k.end.min(seen.end), BLOCK_K) {
                    let block = Block { heads, sequence, h, q0, k0, m, n };
                    let (_, ds) = self.block(&block, By::Scores, scratch);
                    for (r, ds) in ds.chunks(n).enumerate() {
                        let out = &mut out[(q0 - q.start + r) * stride + k0 - k.start..][..n];
                        out.iter_mut().zip(ds).for_each(|(sum, ds)| *sum += ds);
                    }
                }
            }
        }
    }
}
