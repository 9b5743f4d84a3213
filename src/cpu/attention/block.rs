//! One block of scores, and its products.

use std::ops::Range;

use candle_core::CpuStorage;

use super::super::exp::tanh;
use super::super::gemm::{Mat, Product};
use super::{Heads, Sequence};

/// Row-major matrices of one width, those of all heads one after another.
#[derive(Clone, Copy)]
pub(super) struct Rows<'a> {
    pub data: &'a [f32],
    pub width: usize,
}

impl<'a> Rows<'a> {
    /// From a row on, counted over all heads.
    fn from(self, row: usize) -> Mat<'a> {
        Mat::rows(&self.data[row * self.width..], self.width)
    }

    fn row(self, row: usize) -> &'a [f32] {
        &self.data[row * self.width..][..self.width]
    }
}

/// The scores of queries `q0..q0 + m` by keys `k0..k0 + n`, counted in one sequence of query head `h`.
#[derive(Clone, Copy)]
pub(super) struct Block<'a> {
    pub heads: &'a Heads<'a>,
    pub sequence: &'a Sequence,
    pub h: usize,
    pub q0: usize,
    pub k0: usize,
    pub m: usize,
    pub n: usize,
}

impl Block<'_> {
    /// The keys of this block that its row `r` sees.
    pub fn visible(&self, r: usize) -> Range<usize> {
        let Self { heads, sequence, q0, k0, n, .. } = *self;
        let Range { start, end } =
            heads.mask.visible(q0 + r, sequence.rows.len(), sequence.keys.len());
        start.clamp(k0, k0 + n) - k0..end.clamp(k0, k0 + n) - k0
    }

    /// The first query, counted over all heads.
    pub fn query(&self) -> usize {
        self.h * self.heads.sq + self.sequence.rows.start + self.q0
    }

    /// The first key, counted over all key heads.
    fn key(&self) -> usize {
        self.h / self.heads.group * self.heads.sk + self.sequence.keys.start + self.k0
    }

    /// `out = factor · a·bᵀ` with `a` of the queries' rows and `b` of the keys'.
    pub fn inner(&self, out: &mut [f32], a: Rows, b: Rows, factor: f32) {
        let Self { m, n, .. } = *self;
        let product = Product { m, n, k: a.width, factor, add: false };
        product.run(out, a.from(self.query()), b.from(self.key()).t());
    }

    /// Row `r`'s scores from key `first` of the block on, given their products; whether a bias leaves
    /// the row any of these keys. `bends` takes each score's slope by its product under a softcap, or is
    /// empty.
    pub fn score(&self, r: usize, first: usize, scores: &mut [f32], bends: &mut [f32]) -> bool {
        let Self { heads, sequence, h, .. } = *self;
        let (i, j) = (self.q0 + r, self.k0 + first);
        if let Some(cap) = heads.softcap {
            bend(scores, bends, cap);
        }
        if let Some(slope) = heads.slope(h, sequence) {
            // The key at whose side the query stands.
            let anchor = (i + sequence.keys.len()) as isize - sequence.rows.len() as isize;
            for (j, x) in (j as isize..).zip(&mut *scores) {
                *x -= slope * (anchor - j).unsigned_abs() as f32;
            }
        }
        let Some((storage, stack)) = heads.bias else { return !scores.is_empty() };
        let at = stack.matrix_offset(h) + i * stack.row_stride + j * stack.col_stride;
        let element = |j: usize| at + j * stack.col_stride;
        match storage {
            CpuStorage::F16(bias) => add(scores, |j| bias[element(j)].to_f32()),
            CpuStorage::BF16(bias) => add(scores, |j| bias[element(j)].to_f32()),
            CpuStorage::F32(bias) => add(scores, |j| bias[element(j)]),
            _ => unreachable!("its dtype was checked"),
        }
    }

    /// `out [m, width] += factor · p·b`, `p [m, n]` zero where hidden and `b` of the keys' rows.
    pub fn add_keys(&self, out: &mut [f32], p: &[f32], b: Rows, factor: f32) {
        let Self { m, n, .. } = *self;
        if self.heads.zeros_hide {
            let product = Product { m, n: b.width, k: n, factor, add: true };
            return product.run(out, Mat::rows(p, n), b.from(self.key()));
        }
        for r in 0..m {
            let out = &mut out[r * b.width..][..b.width];
            for j in self.visible(r) {
                add_scaled(out, factor * p[r * n + j], b.row(self.key() + j));
            }
        }
    }

    /// `out [n, width] += factor · pᵀ·a`, `p [m, n]` zero where hidden and `a` of the queries' rows.
    pub fn add_queries(&self, out: &mut [f32], p: &[f32], a: Rows, factor: f32) {
        let Self { m, n, .. } = *self;
        if self.heads.zeros_hide {
            let product = Product { m: n, n: a.width, k: m, factor, add: true };
            return product.run(out, Mat::rows(p, n).t(), a.from(self.query()));
        }
        for r in 0..m {
            for j in self.visible(r) {
                let out = &mut out[j * a.width..][..a.width];
                add_scaled(out, factor * p[r * n + j], a.row(self.query() + r));
            }
        }
    }
}

/// `cap · tanh(x / cap)` of each score; `bends`, if not empty, takes the slopes.
fn bend(scores: &mut [f32], bends: &mut [f32], cap: f32) {
    scores.iter_mut().for_each(|x| *x = tanh(*x / cap));
    bends.iter_mut().zip(&*scores).for_each(|(slope, t)| *slope = 1.0 - t * t);
    scores.iter_mut().for_each(|x| *x *= cap);
}

/// Adds a bias; whether any of it is over −∞, which hides a key.
fn add(scores: &mut [f32], bias: impl Fn(usize) -> f32) -> bool {
    let mut open = false;
    for (j, x) in scores.iter_mut().enumerate() {
        let bias = bias(j);
        open |= bias != f32::NEG_INFINITY;
        *x += bias;
    }
    open
}

fn add_scaled(out: &mut [f32], factor: f32, row: &[f32]) {
    for (out, x) in out.iter_mut().zip(row) {
        *out += factor * x;
    }
}
