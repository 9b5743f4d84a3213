//! Attention and its gradients by loops in f64: the reference.

use candle_core::{Result, Tensor};

use super::options::Rules;
use crate::suites::Nd;

/// The formula over the keys that each row sees.
pub struct Loops {
    /// q, k and v.
    x: [Nd; 3],
    scale: f64,
    /// For each query row, counted over all heads.
    weights: Vec<Vec<Weight>>,
    /// The natural log-sum-exp of each row.
    pub lse: Nd,
    /// Of a shape, what the log-sum-exp's terms are in proportion to.
    pub lse_size: Nd,
    /// The shape of the bias.
    bias: Option<Vec<usize>>,
}

/// A key row, counted over all heads, that a query row sees.
#[derive(Clone, Copy)]
struct Weight {
    j: usize,
    p: f64,
    /// The score's slope by its product: not 1 under a softcap.
    bend: f64,
    /// The sum of the magnitudes of the score's terms.
    size: f64,
    /// Where in the bias its element stands.
    at: usize,
}

impl Loops {
    pub fn new(x: [Nd; 3], rules: &Rules) -> Self {
        let heads = |nd: &Nd| nd.dims[..nd.dims.len() - 2].iter().product::<usize>();
        let ([sq, _], [sk, _]) = (matrix(&x[0].dims), matrix(&x[1].dims));
        let group = heads(&x[0]) / heads(&x[1]).max(1);
        let lse = Nd::full(&x[0].dims[..x[0].dims.len() - 1], f64::NEG_INFINITY);
        let (mut lse, mut lse_size) = (lse.clone(), lse.map(|_| 0.0));
        let weights = |i: usize| {
            let score = |key: super::options::Key| {
                let j = i / sq / group * sk + key.j;
                let (row, other) = (x[0].row(i), x[1].row(j));
                let product = rules.scale * dot(row, other);
                let (score, bend) = match rules.softcap() {
                    None => (product, 1.0),
                    Some(cap) => {
                        (cap * (product / cap).tanh(), 1.0 - (product / cap).tanh().powi(2))
                    }
                };
                let magnitudes = row.iter().zip(other).map(|(a, b)| (a * b).abs()).sum::<f64>();
                let bias = if key.bias.is_finite() { key.bias.abs() } else { 0.0 };
                let size = rules.scale.abs() * magnitudes + key.penalty + bias;
                let p = score - key.penalty + key.bias;
                Weight { j, p, bend, size, at: key.at }
            };
            let mut weights: Vec<_> = rules.keys(i).into_iter().map(score).collect();
            let max = weights.iter().fold(f64::NEG_INFINITY, |max, w| max.max(w.p));
            let sum: f64 = weights.iter().map(|w| (w.p - max).exp()).sum();
            weights.iter_mut().for_each(|w| w.p = (w.p - max).exp() / sum);
            if !weights.is_empty() {
                lse.data[i] = max + sum.ln();
                let size = |w: &Weight| if w.p == 0.0 { 0.0 } else { w.p * (1.0 + w.size) };
                lse_size.data[i] = lse.data[i].abs() + weights.iter().map(size).sum::<f64>();
            }
            weights
        };
        let weights = (0..heads(&x[0]) * sq).map(weights).collect();
        let bias = rules.bias.as_ref().map(|nd| nd.dims.clone());
        Self { scale: rules.scale, weights, lse, lse_size, bias, x }
    }

    /// The same sums over the magnitudes of their terms, to which rounding errors are in proportion.
    /// A score that is off by its ulp takes its weight with it; one that is `rebuilt` for the gradient has the
    /// ulps of its exponential and of its division by their sum, too.
    pub fn sizes(&self, rebuilt: bool) -> Self {
        let (x, scale) = (self.x.each_ref().map(|nd| nd.map(f64::abs)), self.scale.abs());
        let size = |&w: &Weight| {
            let ulps = w.size + if rebuilt { 3.0 } else { 1.0 };
            let p = if w.p == 0.0 { 0.0 } else { w.p * ulps };
            Weight { p, bend: 1.0, ..w }
        };
        let weights = self.weights.iter().map(|row| row.iter().map(size).collect()).collect();
        let (lse, lse_size, bias) = (self.lse.clone(), self.lse_size.clone(), self.bias.clone());
        Self { x, scale, weights, lse, lse_size, bias }
    }

    /// A result of zeros.
    fn zeros(&self) -> Nd {
        let (q, [_, dv]) = (&self.x[0].dims, matrix(&self.x[2].dims));
        Nd::full(&[&q[..q.len() - 1], &[dv]].concat(), 0.0)
    }

    pub fn forward(&self) -> Nd {
        let mut out = self.zeros();
        for (i, weights) in self.weights.iter().enumerate() {
            for w in weights {
                out.add(i, w.p, self.x[2].row(w.j));
            }
        }
        out
    }

    /// As FlashAttention has it: from the last block of keys to the first, exponentials of differences to
    /// the largest score so far, which are rounded before they are multiplied with the values.
    pub fn flash(&self, block: usize, round: impl Fn(f64) -> f64) -> Nd {
        let [sk, _] = matrix(&self.x[2].dims);
        let mut out = self.zeros();
        for (i, weights) in self.weights.iter().enumerate() {
            let mut max = 0f64;
            for block in weights.chunk_by(|a, b| a.j % sk / block == b.j % sk / block).rev() {
                max = block.iter().fold(max, |max, w| max.max(w.p));
                for w in block {
                    out.add(i, round(w.p / max) * max, self.x[2].row(w.j));
                }
            }
        }
        out
    }

    /// Of q, k, v and the bias. `sign` is that of the term which all scores of a row lose: −1, or 1 for
    /// sizes.
    pub fn backward(&self, grad: &Nd, out: &Nd, sign: f64) -> Vec<Nd> {
        self.backward_of_both(grad, out, &self.lse.map(|_| 0.0), sign)
    }

    /// The same with a gradient of the log-sum-exp, too.
    pub fn backward_of_both(&self, grad: &Nd, out: &Nd, lse_grad: &Nd, sign: f64) -> Vec<Nd> {
        let [q, k, v] = &self.x;
        let [mut dq, mut dk, mut dv] = self.x.each_ref().map(|nd| Nd::full(&nd.dims, 0.0));
        let mut dbias = self.bias.as_ref().map(|dims| Nd::full(dims, 0.0));
        for (i, weights) in self.weights.iter().enumerate() {
            let (grad, out) = (grad.row(i), out.row(i));
            let shared = lse_grad.data[i] + sign * dot(grad, out);
            for &Weight { j, p, bend, at, .. } in weights {
                let ds = p * (dot(grad, v.row(j)) + shared);
                if let Some(dbias) = &mut dbias {
                    dbias.data[at] += ds;
                }
                dq.add(i, ds * bend * self.scale, k.row(j));
                dk.add(j, ds * bend * self.scale, q.row(i));
                dv.add(j, p, grad);
            }
        }
        [dq, dk, dv].into_iter().chain(dbias).collect()
    }
}

/// Rows and columns.
pub fn matrix(dims: &[usize]) -> [usize; 2] {
    [dims[dims.len() - 2], dims[dims.len() - 1]]
}

/// Row `i` of all rows of all matrices.
impl Nd {
    pub fn row(&self, i: usize) -> &[f64] {
        let [_, cols] = matrix(&self.dims);
        &self.data[i * cols..][..cols]
    }

    pub fn add(&mut self, i: usize, factor: f64, row: &[f64]) {
        let out = &mut self.data[i * row.len()..][..row.len()];
        out.iter_mut().zip(row).for_each(|(out, x)| *out += factor * x);
    }
}

pub fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

pub fn nds(tensors: &[Tensor]) -> Result<Vec<Nd>> {
    tensors.iter().map(Nd::of).collect()
}
