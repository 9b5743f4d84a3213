//! Attention twice over: by loops in f64, the reference, and by candle's ops, the yardstick.

use candle_core::{D, Result, Tensor};
use candle_nn::ops::softmax;

use crate::common::Nd;

/// The formula in candle's ops, in the dtype of its inputs. Rows that see no key are left out and
/// become zeros.
pub fn plain([q, k, v]: &[Tensor; 3], causal: bool, scale: Option<f32>) -> Result<Tensor> {
    let matrices = |t: &Tensor| t.reshape(((), t.dim(D::Minus2)?, t.dim(D::Minus1)?));
    let (shape, q, k, v) = (q.dims(), matrices(q)?, matrices(k)?, matrices(v)?);
    let ((heads, sq, d), (kv_heads, sk, dv)) = (q.dims3()?, v.dims3()?);
    let repeat = |t: Tensor| {
        let (rows, cols) = (t.dim(1)?, t.dim(2)?);
        let wide = t.unsqueeze(1)?.broadcast_as((kv_heads, heads / kv_heads, rows, cols))?;
        wide.reshape((heads, rows, cols))
    };
    let blind = if causal { sq.saturating_sub(sk) } else { 0 };
    let q = q.narrow(1, blind, sq - blind)?.contiguous()?;
    let scale = scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
    let mut scores = (q.matmul(&repeat(k)?.t()?.contiguous()?)? * scale)?;
    if causal {
        let hidden = |i, j| if j + sq > i + sk { f32::NEG_INFINITY } else { 0.0 };
        let mask = (blind..sq).flat_map(|i| (0..sk).map(move |j| hidden(i, j)));
        let mask = Tensor::from_iter(mask, q.device())?.reshape((sq - blind, sk))?;
        scores = scores.broadcast_add(&mask.to_dtype(q.dtype())?)?;
    }
    let out = softmax(&scores, D::Minus1)?.matmul(&repeat(v)?)?.pad_with_zeros(1, blind, 0)?;
    out.reshape([&shape[..shape.len() - 1], &[dv]].concat())
}

/// Attention and its gradients by loops in f64 over the keys that each row sees.
pub struct Loops {
    /// q, k and v.
    x: [Nd; 3],
    scale: f64,
    /// For each query row, counted over all heads: the key rows that it sees and their weights.
    weights: Vec<Vec<(usize, f64)>>,
}

impl Loops {
    pub fn new(x: [Nd; 3], causal: bool, scale: Option<f32>) -> Self {
        let heads = |nd: &Nd| nd.dims[..nd.dims.len() - 2].iter().product::<usize>();
        let ([sq, d], [sk, _]) = (matrix(&x[0].dims), matrix(&x[1].dims));
        let group = heads(&x[0]) / heads(&x[1]).max(1);
        let scale = scale.map_or(1.0 / (d as f64).sqrt(), f64::from);
        let weights = |i: usize| {
            let seen = if causal { (i % sq + 1 + sk).saturating_sub(sq) } else { sk };
            let keys = (0..seen).map(|j| i / sq / group * sk + j);
            let scores: Vec<_> = keys.map(|j| (j, scale * dot(x[0].row(i), x[1].row(j)))).collect();
            let max = scores.iter().fold(f64::NEG_INFINITY, |max, &(_, s)| max.max(s));
            let sum: f64 = scores.iter().map(|(_, s)| (s - max).exp()).sum();
            scores.into_iter().map(|(j, s)| (j, (s - max).exp() / sum)).collect()
        };
        let weights = (0..heads(&x[0]) * sq).map(weights).collect();
        Self { x, scale, weights }
    }

    /// The same sums over the magnitudes of their terms, to which rounding errors are in proportion.
    /// A score that is off by its ulp takes its weight with it. So does, where weights are rebuilt from
    /// it for the gradient, the log-sum-exp in f32: score − ln(weight).
    pub fn sizes(&self, rebuilt: bool) -> Self {
        let (x, scale) = (self.x.each_ref().map(|nd| nd.map(f64::abs)), self.scale.abs());
        let size = |i, (j, p): (usize, f64)| match p {
            0.0 => (j, 0.0),
            _ => {
                let lse = if rebuilt { -p.ln() } else { 0.0 };
                (j, p * (1.0 + scale * dot(x[0].row(i), x[1].row(j)) + lse))
            }
        };
        let sizes = |(i, weights): (usize, &Vec<_>)| weights.iter().map(|&w| size(i, w)).collect();
        let weights = self.weights.iter().enumerate().map(sizes).collect();
        Self { x, scale, weights }
    }

    pub fn forward(&self) -> Nd {
        let (q, [_, dv]) = (&self.x[0].dims, matrix(&self.x[2].dims));
        let mut out = Nd::full(&[&q[..q.len() - 1], &[dv]].concat(), 0.0);
        for (i, weights) in self.weights.iter().enumerate() {
            for &(j, p) in weights {
                out.add(i, p, self.x[2].row(j));
            }
        }
        out
    }

    /// `sign` is that of the term which all scores of a row lose: −1, or 1 for sizes.
    pub fn backward(&self, grad: &Nd, out: &Nd, sign: f64) -> [Nd; 3] {
        let [q, k, v] = &self.x;
        let [mut dq, mut dk, mut dv] = self.x.each_ref().map(|nd| Nd::full(&nd.dims, 0.0));
        for (i, weights) in self.weights.iter().enumerate() {
            let (grad, out) = (grad.row(i), out.row(i));
            let shared = sign * dot(grad, out);
            for &(j, p) in weights {
                let ds = p * (dot(grad, v.row(j)) + shared) * self.scale;
                dq.add(i, ds, k.row(j));
                dk.add(j, ds, q.row(i));
                dv.add(j, p, grad);
            }
        }
        [dq, dk, dv]
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

pub fn nds(qkv: &[Tensor; 3]) -> Result<[Nd; 3]> {
    Ok([Nd::of(&qkv[0])?, Nd::of(&qkv[1])?, Nd::of(&qkv[2])?])
}
