//! Flash attention, forward and backward, in blocks (FlashAttention-2, Dao 2023): O(S·D) memory.

use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::exp::exp_minus;
use super::gemm::{Mat, Product, Threads};
use super::widen::packed;
use crate::op::{AttentionProblem, View};
use crate::stack::Stack;

/// Queries and keys of one block: the scores (64 KB) stay in a core's cache.
const BLOCK_Q: usize = 64;
const BLOCK_K: usize = 256;

/// Sizes and the mask. Matrices are row-major f32: `q [heads][sq, d]`, `k [heads/group][sk, d]`, ...
#[derive(Clone, Copy)]
struct Heads {
    group: usize,
    sq: usize,
    sk: usize,
    d: usize,
    dv: usize,
    scale: f32,
    causal: bool,
    /// Whether a hidden key may be multiplied by its zero probability: not if it is infinite or NaN.
    zeros_hide: bool,
}

impl Heads {
    fn new(p: &AttentionProblem, inputs: &[&[f32]]) -> Self {
        let finite = |data: &&[f32]| data.par_iter().all(|x| x.is_finite());
        Self {
            group: p.group,
            sq: p.seq_q(),
            sk: p.seq_k(),
            d: p.head_dim(),
            dv: p.value_dim(),
            scale: p.scale,
            causal: p.causal,
            zeros_hide: !p.causal || inputs.iter().all(finite),
        }
    }

    /// Number of keys that query `i` sees, from the first on: bottom-right aligned.
    fn visible(&self, i: usize) -> usize {
        if self.causal { (i + 1 + self.sk).saturating_sub(self.sq).min(self.sk) } else { self.sk }
    }
}

/// One block of scores: queries `q0..q0 + m` by keys `k0..k0 + n`.
#[derive(Clone, Copy)]
struct Block {
    q0: usize,
    k0: usize,
    m: usize,
    n: usize,
}

impl Block {
    /// Number of this block's keys that its row `r` sees.
    fn visible(&self, heads: &Heads, r: usize) -> usize {
        heads.visible(self.q0 + r).saturating_sub(self.k0).min(self.n)
    }

    /// `out = factor · a·bᵀ` with `a [m, d]` of the queries' rows and `b [n, d]` of the keys'.
    fn inner(&self, out: &mut [f32], a: &[f32], b: &[f32], d: usize, factor: f32) {
        let (a, b) = (Mat::rows(&a[self.q0 * d..], d), Mat::rows(&b[self.k0 * d..], d).t());
        let Block { m, n, .. } = *self;
        Product { m, n, k: d, factor, add: false, threads: Threads::One }.run(out, a, b);
    }

    /// `out [m, d] += p·b`, `p [m, n]` zero where hidden and `b [.., d]` the keys' rows.
    fn add_keys(&self, heads: &Heads, out: &mut [f32], p: &[f32], b: &[f32], d: usize) {
        let b = &b[self.k0 * d..];
        if heads.zeros_hide {
            let Block { m, n: k, .. } = *self;
            let product = Product { m, n: d, k, factor: 1.0, add: true, threads: Threads::One };
            return product.run(out, Mat::rows(p, self.n), Mat::rows(b, d));
        }
        for (r, out) in out.chunks_mut(d).enumerate().take(self.m) {
            for j in 0..self.visible(heads, r) {
                add_scaled(out, p[r * self.n + j], &b[j * d..][..d]);
            }
        }
    }

    /// `out [n, d] += pᵀ·a`, `p [m, n]` zero where hidden and `a [.., d]` the queries' rows.
    fn add_queries(&self, heads: &Heads, out: &mut [f32], p: &[f32], a: &[f32], d: usize) {
        let a = &a[self.q0 * d..];
        if heads.zeros_hide {
            let Block { m: k, n: m, .. } = *self;
            let product = Product { m, n: d, k, factor: 1.0, add: true, threads: Threads::One };
            return product.run(out, Mat::rows(p, self.n).t(), Mat::rows(a, d));
        }
        for r in 0..self.m {
            for j in 0..self.visible(heads, r) {
                add_scaled(&mut out[j * d..][..d], p[r * self.n + j], &a[r * d..][..d]);
            }
        }
    }
}

fn add_scaled(out: &mut [f32], factor: f32, row: &[f32]) {
    for (out, x) in out.iter_mut().zip(row) {
        *out += factor * x;
    }
}

fn blocks(len: usize, size: usize) -> impl Iterator<Item = (usize, usize)> {
    (0..len).step_by(size).map(move |start| (start, size.min(len - start)))
}

/// The result `[.., Sq, Dv]` and the log-sum-exp `[.., Sq]` in f32.
pub(crate) fn attention(
    p: &AttentionProblem,
    q: &CpuStorage,
    k: &CpuStorage,
    v: &CpuStorage,
) -> Result<(Vec<f32>, Vec<f32>)> {
    let (q, k, v) = (packed(q, &p.q)?, packed(k, &p.k)?, packed(v, &p.v)?);
    let heads = Heads::new(p, &[&v]);
    let mut out = vec![0f32; p.q.count() * heads.sq * heads.dv];
    let mut lse = vec![f32::NEG_INFINITY; p.q.count() * heads.sq];
    if p.is_empty() {
        return Ok((out, lse));
    }
    out.par_chunks_mut(heads.sq * heads.dv).zip(lse.par_chunks_mut(heads.sq)).enumerate().for_each(
        |(h, (out, lse))| {
            let q = head(&q, h, heads.sq * heads.d);
            let k = head(&k, h / heads.group, heads.sk * heads.d);
            let v = head(&v, h / heads.group, heads.sk * heads.dv);
            out.par_chunks_mut(BLOCK_Q * heads.dv)
                .zip(lse.par_chunks_mut(BLOCK_Q))
                .enumerate()
                .for_each(|(i, (out, lse))| forward_rows(&heads, i * BLOCK_Q, q, k, v, out, lse));
        },
    );
    Ok((out, lse))
}

fn head(data: &[f32], i: usize, len: usize) -> &[f32] {
    &data[i * len..][..len]
}

/// Rows `q0..` of one head: as many as `lse` has.
fn forward_rows(
    heads: &Heads,
    q0: usize,
    q: &[f32],
    k: &[f32],
    v: &[f32],
    out: &mut [f32],
    lse: &mut [f32],
) {
    let (m, dv) = (lse.len(), heads.dv);
    let mut scores = vec![0f32; m * BLOCK_K.min(heads.sk)];
    let mut sums = vec![0f32; m];
    let maxima = lse;
    for (k0, n) in blocks(heads.visible(q0 + m - 1), BLOCK_K) {
        let block = Block { q0, k0, m, n };
        let scores = &mut scores[..m * n];
        block.inner(scores, q, k, heads.d, heads.scale);
        for (r, row) in scores.chunks_mut(n).enumerate() {
            let (seen, hidden) = row.split_at_mut(block.visible(heads, r));
            hidden.fill(0.0);
            if seen.is_empty() {
                continue;
            }
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
        block.add_keys(heads, out, scores, v, dv);
    }
    for r in 0..m {
        if heads.visible(q0 + r) > 0 {
            out[r * dv..][..dv].iter_mut().for_each(|x| *x /= sums[r]);
            maxima[r] += sums[r].ln();
        }
    }
}

/// dq, dk and dv in a row, packed, in f32.
pub(crate) fn attention_backward(
    p: &AttentionProblem,
    [q, k, v]: [&CpuStorage; 3],
    out: View<CpuStorage>,
    grad: View<CpuStorage>,
    lse: &[f32],
) -> Result<Vec<f32>> {
    let (q, k, v) = (packed(q, &p.q)?, packed(k, &p.k)?, packed(v, &p.v)?);
    let (out, grad) = (packed(out.0, &Stack::new(out.1))?, packed(grad.0, &Stack::new(grad.1))?);
    let mut grads = vec![0f32; q.len() + k.len() + v.len()];
    if p.is_empty() {
        return Ok(grads);
    }
    let heads = Heads::new(p, &[&q, &k, &v, &grad]);
    // Dᵢ = Σ dO·O, the part of dS that all keys of a row share.
    let delta: Vec<f32> = std::iter::zip(out.chunks(heads.dv), grad.chunks(heads.dv))
        .map(|(out, grad)| std::iter::zip(out, grad).map(|(o, g)| o * g).sum())
        .collect();
    let backward = Backward { heads, q: &q, k: &k, v: &v, grad: &grad, lse, delta: &delta };
    let (dq, dkv) = grads.split_at_mut(q.len());
    let (dk, dv) = dkv.split_at_mut(k.len());
    let Heads { sq, sk, d, dv: v_width, .. } = heads;
    dq.par_chunks_mut(sq * d).enumerate().for_each(|(h, dq)| {
        let blocks = dq.par_chunks_mut(BLOCK_Q * d).enumerate();
        blocks.for_each(|(i, dq)| backward.queries(h, i * BLOCK_Q, dq));
    });
    let kv = dk.par_chunks_mut(sk * d).zip(dv.par_chunks_mut(sk * v_width)).enumerate();
    kv.for_each(|(h, (dk, dv))| {
        let blocks = dk.par_chunks_mut(BLOCK_K * d).zip(dv.par_chunks_mut(BLOCK_K * v_width));
        blocks.enumerate().for_each(|(i, (dk, dv))| backward.keys(h, i * BLOCK_K, dk, dv));
    });
    Ok(grads)
}

/// What both passes read. Each block of dq has one owner, and each block of dk and dv, so that
/// nothing is added atomically and results do not depend on the number of threads.
struct Backward<'a> {
    heads: Heads,
    q: &'a [f32],
    k: &'a [f32],
    v: &'a [f32],
    grad: &'a [f32],
    lse: &'a [f32],
    delta: &'a [f32],
}

impl Backward<'_> {
    /// Probabilities P and their scores' gradients dS of one block of query head `h`.
    fn block(&self, h: usize, block: Block, p: &mut [f32], ds: &mut [f32]) {
        let Heads { group, sq, sk, d, dv, scale, .. } = self.heads;
        let kv = h / group;
        block.inner(p, head(self.q, h, sq * d), head(self.k, kv, sk * d), d, scale);
        block.inner(ds, head(self.grad, h, sq * dv), head(self.v, kv, sk * dv), dv, 1.0);
        for r in 0..block.m {
            let i = h * sq + block.q0 + r;
            let row = r * block.n..(r + 1) * block.n;
            let (p, ds) = (&mut p[row.clone()], &mut ds[row]);
            let seen = block.visible(&self.heads, r);
            p[seen..].fill(0.0);
            ds[seen..].fill(0.0);
            exp_minus(&mut p[..seen], self.lse[i]);
            for (ds, p) in ds[..seen].iter_mut().zip(&*p) {
                *ds = p * (*ds - self.delta[i]) * scale;
            }
        }
    }

    /// Rows `q0..` of one head's dq.
    fn queries(&self, h: usize, q0: usize, dq: &mut [f32]) {
        let Heads { group, sk, d, .. } = self.heads;
        let m = dq.len() / d;
        let (mut p, mut ds) = (vec![0f32; m * BLOCK_K], vec![0f32; m * BLOCK_K]);
        for (k0, n) in blocks(self.heads.visible(q0 + m - 1), BLOCK_K) {
            let block = Block { q0, k0, m, n };
            let (p, ds) = (&mut p[..m * n], &mut ds[..m * n]);
            self.block(h, block, p, ds);
            block.add_keys(&self.heads, dq, ds, head(self.k, h / group, sk * d), d);
        }
    }

    /// Rows `k0..` of one key head's dk and dv, summed over the query heads that share it.
    fn keys(&self, kv: usize, k0: usize, dk: &mut [f32], dv: &mut [f32]) {
        let Heads { group, sq, d, dv: v_width, .. } = self.heads;
        let n = dk.len() / d;
        let (mut p, mut ds) = (vec![0f32; BLOCK_Q * n], vec![0f32; BLOCK_Q * n]);
        for h in kv * group..(kv + 1) * group {
            for (q0, m) in blocks(sq, BLOCK_Q) {
                if self.heads.visible(q0 + m - 1) <= k0 {
                    continue;
                }
                let block = Block { q0, k0, m, n };
                let (p, ds) = (&mut p[..m * n], &mut ds[..m * n]);
                self.block(h, block, p, ds);
                block.add_queries(&self.heads, dv, p, head(self.grad, h, sq * v_width), v_width);
                block.add_queries(&self.heads, dk, ds, head(self.q, h, sq * d), d);
            }
        }
    }
}
