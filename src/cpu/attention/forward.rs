//! The forward pass.

use candle_core::{CpuStorage, Layout, Result};
use rayon::prelude::*;

use super::super::exp::exp_minus;
use super::super::widen::{packed, pick};
use super::block::{Block, Rows};
use super::{BLOCK_K, BLOCK_Q, Heads, Piece, blocks, cut};
use crate::op::{AttentionInputs, AttentionProblem};
use crate::stack::Stack;

/// What the forward pass computes.
pub(crate) struct Attended {
    /// In the order of the problem's `out`.
    pub out: Vec<f32>,
    /// `[heads, Sq]`: each row's largest score, −∞ where it sees no key.
    pub max: Vec<f32>,
    /// `[heads, Sq]`: the sum of each row's exp(score − max).
    pub sum: Vec<f32>,
}

/// The result, and what each row's probabilities can be rebuilt from.
pub(crate) fn attention(
    p: &AttentionProblem,
    inputs: &AttentionInputs<CpuStorage>,
) -> Result<Attended> {
    let (q, k, v) = (packed(inputs.q, &p.q)?, packed(inputs.k, &p.k)?, packed(inputs.v, &p.v)?);
    let heads = Heads::new(p, inputs, &[&v])?;
    let (d, dv) = (p.head_dim(), p.value_dim());
    let forward = Forward {
        heads: &heads,
        q: Rows { data: &q, width: d },
        k: Rows { data: &k, width: d },
        v: Rows { data: &v, width: dv },
    };
    let mut out = vec![0f32; heads.count * heads.sq * dv];
    let mut max = vec![f32::NEG_INFINITY; heads.count * heads.sq];
    let mut sum = vec![0f32; heads.count * heads.sq];
    let pieces = heads.pieces(heads.count, heads.sq, BLOCK_Q, |sequence| &sequence.rows);
    let (maxima, sums) = (cut(&mut max, 1, &pieces), cut(&mut sum, 1, &pieces));
    pieces
        .par_iter()
        .zip(cut(&mut out, dv, &pieces))
        .zip(maxima.into_par_iter().zip(sums))
        .for_each(|((piece, out), (maxima, sums))| forward.rows(piece, out, maxima, sums));
    if p.out.contiguous().is_none() {
        // Heads lie between rows.
        let [(batch, _), (count, _)] = *p.out.batch() else { unreachable!("batches and heads") };
        let heads_first = Layout::contiguous((batch, count, heads.sq, dv));
        out = pick(&Stack::new(&heads_first.transpose(1, 2)?), |i| out[i]);
    }
    Ok(Attended { out, max, sum })
}

struct Forward<'a> {
    heads: &'a Heads<'a>,
    q: Rows<'a>,
    k: Rows<'a>,
    v: Rows<'a>,
}

impl Forward<'_> {
    fn rows(&self, piece: &Piece, out: &mut [f32], maxima: &mut [f32], sums: &mut [f32]) {
        let &Piece { h, sequence, first: q0, .. } = piece;
        let (m, dv, heads) = (sums.len(), self.v.width, self.heads);
        let mut scores = vec![0f32; m * BLOCK_K.min(sequence.keys.len())];
        // Whether the row sees any key.
        let mut open = vec![false; m];
        for (k0, n) in blocks(heads.seen(sequence, q0, m), BLOCK_K) {
            let block = Block { heads, sequence, h, q0, k0, m, n };
            let scores = &mut scores[..m * n];
            block.inner(scores, self.q, self.k, heads.scale);
            for (r, row) in scores.chunks_mut(n).enumerate() {
                let visible = block.visible(r);
                row[..visible.start].fill(0.0);
                row[visible.end..].fill(0.0);
                let seen = &mut row[visible.clone()];
                if seen.is_empty() {
                    continue;
                }
                open[r] |= block.score(r, visible.start, seen, &mut []);
                let max = seen.iter().copied().fold(maxima[r], f32::max);
                if max == f32::NEG_INFINITY {
                    // Only −∞ and NaN so far. −∞ has no weight yet; if it stays so, 0/0 gives the plain
                    // formula's NaN.
                    seen.iter_mut().for_each(|x| *x = if x.is_nan() { *x } else { 0.0 });
                    sums[r] += seen.iter().sum::<f32>();
                    continue;
                }
                // exp(−∞) = 0 for the first block.
                let keep = (maxima[r] - max).exp();
                sums[r] = sums[r] * keep + exp_minus(seen, max);
                maxima[r] = max;
                if keep != 1.0 {
                    out[r * dv..][..dv].iter_mut().for_each(|x| *x *= keep);
                }
            }
            block.add_keys(out, scores, self.v, 1.0);
        }
        for r in 0..m {
            let out = &mut out[r * dv..][..dv];
            if open[r] {
                out.iter_mut().for_each(|x| *x /= sums[r]);
                if maxima[r] == f32::NEG_INFINITY {
                    // That is for rows without keys. Scores that are all −∞ or NaN are NaN as in the result.
                    maxima[r] = f32::NAN;
                }
            } else {
                out.fill(0.0);
                (maxima[r], sums[r]) = (f32::NEG_INFINITY, 0.0);
            }
        }
    }
}
