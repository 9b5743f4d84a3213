//! The gradients in candle's own ops, for what no engine's kernels take: FlashAttention-2 (Dao 2023),
//! algorithm 2, over blocks of keys. Memory O(B·Hq·Sq·block), on any device; the host reads nothing.
//!
//! Positions are in f32: exact up to 2²⁴ rows.

use candle_core::{D, DType, Device, Result, Tensor};

use super::super::{cast, sum_to};
use super::call::{Call, heads_first_back, heads_first_view};
use super::problem::{AttentionInputs, AttentionProblem};

/// Keys of a block.
const BLOCK: usize = 256;

/// Of q, k, v and the bias, given the result, its gradient and the log-sum-exp.
pub(super) fn gradients(
    call: &Call,
    inputs: &[&Tensor],
    [out, grad, lse]: [&Tensor; 3],
) -> Result<[Option<Tensor>; 4]> {
    let p = call.problem(inputs.iter().map(|t| t.layout()));
    let wants_bias = call.inputs(inputs).extras.bias.is_some_and(|t| t.track_op());
    // Nothing of this becomes part of candle's graph.
    let inputs: Vec<_> = inputs.iter().map(|t| t.detach()).collect();
    let AttentionInputs { q, k, v, extras } = call.inputs(&inputs.iter().collect::<Vec<_>>());
    if p.is_empty() {
        let zeros = |t: &Tensor| t.zeros_like().map(Some);
        let bias = extras.bias.map(zeros).transpose()?.flatten();
        return Ok([zeros(q)?, zeros(k)?, zeros(v)?, bias]);
    }
    let [batch, heads, kv] = [p.q.batch()[0].0, p.q.batch()[1].0, p.k.batch()[1].0];
    let (sq, sk) = (p.seq_q(), p.seq_k());
    // The queries that share a key head as one matrix: K and V are not repeated.
    let fold = |t: &Tensor| {
        let wide = cast(&heads_first_view(call.layout, t)?, DType::F32)?;
        wide.reshape((batch * kv, (), wide.dim(D::Minus1)?))
    };
    let [qs, ks, vs, outs, grads] = [fold(q)?, fold(k)?, fold(v)?, fold(out)?, fold(grad)?];
    let delta = (outs * &grads)?.sum_keepdim(D::Minus1)?;
    // exp(score − ∞) is 0.
    let lse = lse.reshape((batch * kv, p.group * sq, 1))?;
    let never = Tensor::full(f32::INFINITY, lse.shape(), lse.device())?;
    let lse = lse.eq(f32::NEG_INFINITY)?.where_cond(&never, &lse)?;

    let rows = Rows::new(&p, &extras.lengths, q.device())?;
    let slopes = extras.slopes.map(|t| rows.slopes(&p, t)).transpose()?;
    let by_head = |t: &Tensor| t.reshape((batch, heads, sq, ()));
    let mut dq = qs.zeros_like()?;
    let (mut dk, mut dv, mut dbias) = (vec![], vec![], vec![]);
    for k0 in (0..sk).step_by(BLOCK) {
        let n = BLOCK.min(sk - k0);
        let (kb, vb) = (ks.narrow(1, k0, n)?, vs.narrow(1, k0, n)?);
        let mut scores = (qs.matmul(&kb.t()?)? * f64::from(p.scale))?;
        let mut slope = None;
        if let Some(cap) = p.softcap.map(f64::from) {
            let bent = (scores / cap)?.tanh()?;
            slope = Some(bent.sqr()?.affine(-1.0, 1.0)?);
            scores = (bent * cap)?;
        }
        let shape = scores.shape().clone();
        let keys = positions(k0, n, q.device())?.reshape((1, 1, 1, n))?;
        if let Some(slopes) = &slopes {
            let distance = rows.anchor.broadcast_sub(&keys)?.abs()?;
            let lost = slopes.broadcast_mul(&distance)?;
            scores = by_head(&scores)?.broadcast_sub(&lost)?.reshape(&shape)?;
        }
        let bias = extras.bias.map(|t| t.narrow(D::Minus1, k0, n)).transpose()?;
        if let Some(bias) = &bias {
            let bias = bias.to_dtype(DType::F32)?;
            scores = by_head(&scores)?.broadcast_add(&bias)?.reshape(&shape)?;
        }
        let visible = rows.visible(&keys)?;
        let show = |t: Tensor| match &visible {
            None => Ok(t),
            Some(visible) => {
                let t = by_head(&t)?;
                visible.broadcast_as(t.shape())?.where_cond(&t, &t.zeros_like()?)?.reshape(&shape)
            }
        };
        let weights = show(scores.broadcast_sub(&lse)?.exp()?)?;
        dv.push(weights.t()?.matmul(&grads)?);
        let moved = grads.matmul(&vb.t()?)?.broadcast_sub(&delta)?;
        let mut ds = show((weights * moved)?)?;
        if let (Some(bias), true) = (&bias, wants_bias) {
            dbias.push(sum_to(&by_head(&ds)?, bias.shape())?);
        }
        if let Some(slope) = slope {
            ds = (ds * slope)?;
        }
        ds = (ds * f64::from(p.scale))?;
        dq = (dq + ds.matmul(&kb)?)?;
        dk.push(ds.t()?.matmul(&qs)?);
    }
    let back = |grad: Tensor, t: &Tensor| {
        heads_first_back(call.layout, &grad, t)?.to_dtype(t.dtype()).map(Some)
    };
    let bias = match extras.bias.filter(|_| wants_bias) {
        Some(bias) => Some(Tensor::cat(&dbias, D::Minus1)?.to_dtype(bias.dtype())?),
        None => None,
    };
    Ok([back(dq, q)?, back(Tensor::cat(&dk, 1)?, k)?, back(Tensor::cat(&dv, 1)?, v)?, bias])
}

/// For each row of q its place among the keys, and which of them it sees: `[B or 1, 1, Sq, 1]`.
struct Rows {
    /// The key at whose side the row stands.
    anchor: Tensor,
    /// The first visible key and the one behind the last, unless all are.
    bounds: Option<[Tensor; 2]>,
    /// In a packed batch the row's sequence, or their number if it is in none.
    sequence: Option<Tensor>,
}

impl Rows {
    fn new(p: &AttentionProblem, lengths: &[Option<&Tensor>; 2], device: &Device) -> Result<Self> {
        let (sq, sk) = (p.seq_q() as f64, p.seq_k() as f64);
        let rows = positions(0, p.seq_q(), device)?.reshape((1, 1, (), 1))?;
        let length = |t: Option<&Tensor>, most: f64| match t {
            Some(t) => t.to_dtype(DType::F32)?.minimum(most),
            None => Tensor::new(&[most as f32], device),
        };
        let [lengths_q, lengths_k] = [length(lengths[0], sq)?, length(lengths[1], sk)?];
        let nothing = rows.zeros_like()?;
        let (anchor, start, end, sequence) = match p.packed {
            None => {
                let (lq, lk) =
                    (lengths_q.reshape(((), 1, 1, 1))?, lengths_k.reshape(((), 1, 1, 1))?);
                let anchor = rows.broadcast_add(&(lk.broadcast_sub(&lq)?))?;
                let inside = rows.broadcast_lt(&lq)?.to_dtype(DType::F32)?;
                (anchor, nothing, inside.broadcast_mul(&lk)?, None)
            }
            Some(n) => {
                // Behind the last sequence stands one without keys.
                let zero = Tensor::zeros(1, DType::F32, device)?;
                let of_each = |t: &Tensor, first| Tensor::cat(&[&t.narrow(0, first, n)?, &zero], 0);
                let ends = of_each(&lengths_q, 1)?;
                let sequence = ranks(&lengths_q.narrow(0, 1, n)?, &rows.flatten_all()?)?;
                let pick = |t: Tensor| t.index_select(&sequence, 0)?.reshape(rows.shape());
                let (end_q, end_k) = (pick(ends)?, pick(of_each(&lengths_k, 1)?)?);
                let anchor = ((&rows - end_q)? + &end_k)?;
                (anchor, pick(of_each(&lengths_k, 0)?)?, end_k, Some(sequence))
            }
        };
        let bounded = p.mask != Default::default() || lengths.iter().any(Option::is_some);
        let bounds = match bounded {
            false => None,
            true => {
                let start = match p.mask.left {
                    Some(left) => start.broadcast_maximum(&(&anchor - left as f64)?)?,
                    None => start,
                };
                let end = match p.mask.right {
                    Some(right) => end.broadcast_minimum(&(&anchor + (right + 1) as f64)?)?,
                    None => end,
                };
                Some([start, end])
            }
        };
        Ok(Self { anchor, bounds, sequence })
    }

    /// `[B or 1, 1, Sq, n]`, of u8, for n keys.
    fn visible(&self, keys: &Tensor) -> Result<Option<Tensor>> {
        let Some([start, end]) = &self.bounds else { return Ok(None) };
        let (from, to) = (start.broadcast_le(keys)?, end.broadcast_gt(keys)?);
        from.broadcast_mul(&to).map(Some)
    }

    /// `[B or 1, Hq, Sq or 1, 1]`.
    fn slopes(&self, p: &AttentionProblem, t: &Tensor) -> Result<Tensor> {
        let heads = p.q.batch()[1].0;
        let t = t.reshape(((), heads))?;
        let Some(sequence) = &self.sequence else { return t.reshape(((), heads, 1, 1)) };
        let each = t.broadcast_as((p.packed.unwrap_or(1), heads))?;
        let none = Tensor::zeros((1, heads), DType::F32, t.device())?;
        let each = Tensor::cat(&[&each, &none], 0)?.index_select(sequence, 0)?;
        each.t()?.reshape((1, heads, (), 1))
    }
}

/// `first`, and the numbers behind it.
fn positions(first: usize, len: usize, device: &Device) -> Result<Tensor> {
    Tensor::arange(first as f32, (first + len) as f32, device)
}

/// How many of `ends`, which nowhere decrease, are at most each of `rows`: a binary search in all rows
/// at once.
fn ranks(ends: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let n = ends.elem_count();
    let size = (n + 1).next_power_of_two();
    let behind = Tensor::full(f32::INFINITY, size - n, ends.device())?;
    let ends = Tensor::cat(&[ends, &behind], 0)?;
    let mut found = rows.zeros_like()?;
    let mut step = size / 2;
    while step > 0 {
        let probe = (&found + (step - 1) as f64)?.to_dtype(DType::U32)?;
        let passed = ends.index_select(&probe, 0)?.le(rows)?.to_dtype(DType::F32)?;
        found = (found + (passed * step as f64)?)?;
        step /= 2;
    }
    found.to_dtype(DType::U32)
}
