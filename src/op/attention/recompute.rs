//! The gradients in candle's own ops, for GPUs: FlashAttention-2 (Dao 2023), algorithm 2, over blocks of
//! queries. Memory O(B·Hq·block·Sk) beyond the gradients; the host reads nothing.
//!
//! A block sees all its keys at once, so that its probabilities are normalised here rather than rebuilt
//! from the forward pass's log-sum-exp. That one was of scores summed in another order, and where scores
//! are in the hundred thousands the difference would be that of whole probabilities.
//!
//! Positions are in f32: exact up to 2²⁴ rows.

use candle_core::{D, DType, Device, Error, Result, Tensor};

use super::super::{cast, sum_to};
use super::call::{Call, heads_first_back, heads_first_view};
use super::flash::Upstream;
use super::problem::{AttentionGrads, AttentionInputs, AttentionProblem};

/// Queries of a block, of each head.
const BLOCK: usize = 256;

/// Of q, k, v and a tracked bias.
pub(super) fn gradients(
    call: &Call,
    inputs: &[&Tensor],
    upstream: Upstream,
) -> Result<AttentionGrads<Tensor>> {
    let p = call.problem(inputs.iter().map(|t| t.layout()));
    let wants_bias = call.inputs(inputs).extras.bias.is_some_and(|t| t.track_op());
    // Nothing of this becomes part of candle's graph.
    let inputs: Vec<_> = inputs.iter().map(|t| t.detach()).collect();
    let AttentionInputs { q, k, v, extras } = call.inputs(&inputs.iter().collect::<Vec<_>>());
    let bias = extras.bias.filter(|_| wants_bias);
    if p.is_empty() {
        let (q, k, v) = (q.zeros_like()?, k.zeros_like()?, v.zeros_like()?);
        return Ok(AttentionGrads { q, k, v, bias: bias.map(|t| t.zeros_like()).transpose()? });
    }
    let pass = Pass::new(call, &p, [q, k, v], upstream, &extras.lengths)?;
    let slopes = extras.slopes.map(|t| pass.rows.slopes(&p, t)).transpose()?;
    let mut dq = vec![];
    let (mut dk, mut dv) = (pass.k.zeros_like()?, pass.v.zeros_like()?);
    let mut dbias = bias.map(BiasGrad::new).transpose()?;
    for q0 in (0..p.seq_q()).step_by(BLOCK) {
        let n = BLOCK.min(p.seq_q() - q0);
        let bias_rows = match extras.bias {
            Some(t) if by_row(t)? => Some(t.narrow(D::Minus2, q0, n)?),
            bias => bias.cloned(),
        };
        let block = pass.block(q0, n, slopes.as_ref(), bias_rows.as_ref())?;
        dv = (dv + block.p.t()?.matmul(&block.grad)?)?;
        if let (Some(dbias), Some(rows)) = (&mut dbias, &bias_rows) {
            dbias.add(&pass.by_head(&block.ds, n)?, rows)?;
        }
        let mut ds = block.ds;
        if let Some(slope) = block.slope {
            ds = (ds * slope)?;
        }
        ds = (ds * f64::from(p.scale))?;
        dq.push(ds.matmul(&pass.k)?.reshape((pass.kv, p.group, n, p.head_dim()))?);
        dk = (dk + ds.t()?.matmul(&block.q)?)?;
    }
    let dq = Tensor::cat(&dq, 2)?.reshape((pass.kv, p.group * p.seq_q(), p.head_dim()))?;
    let [dq, dk, dv] = match &pass.apart {
        None => [dq, dk, dv],
        Some(apart) => apart.spoil([dq, dk, dv])?,
    };
    let back =
        |grad: Tensor, t: &Tensor| heads_first_back(call.layout, &grad, t)?.to_dtype(t.dtype());
    Ok(AttentionGrads {
        q: back(dq, q)?,
        k: back(dk, k)?,
        v: back(dv, v)?,
        bias: bias.zip(dbias).map(|(bias, grad)| grad.finish(bias.dtype())).transpose()?,
    })
}

/// The operands of all blocks, in f32: the queries that share a key head as one matrix, so that K and V are
/// not repeated.
struct Pass<'a> {
    p: &'a AttentionProblem,
    /// Key heads of all batches.
    kv: usize,
    rows: Rows,
    /// `[kv, group, Sq, D]`.
    q: Tensor,
    /// `[kv, Sk, D]`.
    k: Tensor,
    /// `[kv, Sk, Dv]`.
    v: Tensor,
    /// `[kv, group, Sq, Dv]`.
    grad: Tensor,
    /// `[kv, group, Sq, 1]`.
    lse_grad: Option<Tensor>,
    apart: Option<Apart>,
}

/// One block of queries.
struct Block {
    /// `[kv, group · n, D]`.
    q: Tensor,
    /// `[kv, group · n, Dv]`.
    grad: Tensor,
    /// Probabilities `[kv, group · n, Sk]`, and their gradient by the scores, zero where hidden.
    p: Tensor,
    ds: Tensor,
    /// The slope of scores by their products, under a softcap.
    slope: Option<Tensor>,
}

impl<'a> Pass<'a> {
    fn new(
        call: &Call,
        p: &'a AttentionProblem,
        [q, k, v]: [&Tensor; 3],
        upstream: Upstream,
        lengths: &[Option<&Tensor>; 2],
    ) -> Result<Self> {
        let rows = Rows::new(p, lengths, q.device())?;
        let kv = p.k.count();
        let wide = |t: &Tensor| cast(&heads_first_view(call.layout, t)?, DType::F32);
        // Rows of no sequence are zeros, since 0 · NaN is NaN.
        let of_queries = |t: &Tensor| rows.inside(0, &wide(t)?);
        let of_keys = |t: &Tensor| rows.inside(1, &wide(t)?);
        let by_group = |t: Tensor| t.reshape((kv, p.group, p.seq_q(), ()));
        let by_head = |t: Tensor| t.reshape((kv, p.seq_k(), ()));
        let lse_grad = upstream.lse_grad.map(|t| {
            let mut t = t.clone();
            while t.rank() < 4 {
                t = t.unsqueeze(0)?;
            }
            by_group(rows.inside(0, &t)?)
        });
        let mut pass = Self {
            p,
            kv,
            q: by_group(of_queries(q)?)?,
            k: by_head(of_keys(k)?)?,
            v: by_head(of_keys(v)?)?,
            grad: by_group(of_queries(upstream.grad)?)?,
            lse_grad: lse_grad.transpose()?,
            apart: None,
            rows,
        };
        if let Some([of_queries, of_keys]) = &pass.rows.sequences {
            let of = [of_queries.clone(), of_keys.clone()];
            let apart = Apart::new(p, of, [&pass.q, &pass.grad], [&pass.k, &pass.v])?;
            for t in [&mut pass.q, &mut pass.k, &mut pass.v, &mut pass.grad] {
                *t = finite(t)?.where_cond(t, &t.zeros_like()?)?;
            }
            pass.apart = Some(apart);
        }
        Ok(pass)
    }

    /// `[kv, group · n, ..]` as `[B, Hq, n, ..]`.
    fn by_head(&self, t: &Tensor, n: usize) -> Result<Tensor> {
        let [(batch, _), (heads, _)] = *self.p.q.batch() else { unreachable!("batches and heads") };
        t.reshape((batch, heads, n, ()))
    }

    /// Queries `q0..q0 + n` of each head and all keys.
    fn block(
        &self,
        q0: usize,
        n: usize,
        slopes: Option<&Tensor>,
        bias: Option<&Tensor>,
    ) -> Result<Block> {
        let (p, rows) = (self.p, self.rows.narrow(q0, n)?);
        let part = |t: &Tensor| t.narrow(2, q0, n)?.reshape((self.kv, p.group * n, ()));
        let (q, grad) = (part(&self.q)?, part(&self.grad)?);
        let mut scores = (q.matmul(&self.k.t()?)? * f64::from(p.scale))?;
        let shape = scores.shape().clone();
        let mut slope = None;
        if let Some(cap) = p.softcap.map(f64::from) {
            let bent = (scores / cap)?.tanh()?;
            slope = Some(bent.sqr()?.affine(-1.0, 1.0)?);
            scores = (bent * cap)?;
        }
        let keys = positions(0, p.seq_k(), q.device())?.reshape((1, 1, 1, ()))?;
        if let Some(slopes) = slopes {
            let slopes =
                if slopes.dim(2)? == 1 { slopes.clone() } else { slopes.narrow(2, q0, n)? };
            let lost = slopes.broadcast_mul(&rows.anchor.broadcast_sub(&keys)?.abs()?)?;
            scores = self.by_head(&scores, n)?.broadcast_sub(&lost)?.reshape(&shape)?;
        }
        if let Some(bias) = bias {
            let bias = bias.to_dtype(DType::F32)?;
            scores = self.by_head(&scores, n)?.broadcast_add(&bias)?.reshape(&shape)?;
        }
        let visible = rows.visible(&keys)?;
        let show = |t: Tensor, hidden: f32| match &visible {
            None => Ok(t),
            Some(visible) => {
                let t = self.by_head(&t, n)?;
                let hidden = Tensor::full(hidden, (), t.device())?.broadcast_as(t.shape())?;
                visible.broadcast_as(t.shape())?.where_cond(&t, &hidden)?.reshape(&shape)
            }
        };
        let p = softmax(&show(scores, f32::NEG_INFINITY)?)?;
        let dp = show(grad.matmul(&self.v.t()?)?, 0.0)?;
        // Σ P·dP, the part of dS that all keys of a row share, less the log-sum-exp's gradient, whose slope
        // by a score is the score's probability.
        let mut delta = (&p * &dp)?.sum_keepdim(D::Minus1)?;
        if let Some(lse_grad) = &self.lse_grad {
            delta = (delta - part(lse_grad)?)?;
        }
        let ds = show((&p * dp.broadcast_sub(&delta)?)?, 0.0)?;
        Ok(Block { q, grad, p, ds, slope })
    }
}

/// Over the last dimension; zeros where all is −∞.
fn softmax(scores: &Tensor) -> Result<Tensor> {
    let max = scores.max_keepdim(D::Minus1)?;
    let max = max.eq(f32::NEG_INFINITY)?.where_cond(&max.zeros_like()?, &max)?;
    let p = scores.broadcast_sub(&max)?.exp()?;
    let sum = p.sum_keepdim(D::Minus1)?;
    let sum = sum.eq(0f32)?.where_cond(&sum.ones_like()?, &sum)?;
    p.broadcast_div(&sum)
}

/// u8, 1 where a number is neither infinite nor NaN.
fn finite(t: &Tensor) -> Result<Tensor> {
    t.abs()?.le(f32::MAX)
}

/// Whether a bias has a row for each query, and not one for all.
fn by_row(bias: &Tensor) -> Result<bool> {
    Ok(bias.rank() > 1 && bias.dim(D::Minus2)? > 1)
}

/// The gradient of a bias, block by block.
struct BiasGrad {
    by_row: bool,
    parts: Vec<Tensor>,
}

impl BiasGrad {
    fn new(bias: &Tensor) -> Result<Self> {
        Ok(Self { by_row: by_row(bias)?, parts: vec![] })
    }

    /// Takes dS `[B, Hq, n, Sk]` of a block, to which `rows` of the bias were added.
    fn add(&mut self, ds: &Tensor, rows: &Tensor) -> Result<()> {
        let part = sum_to(ds, rows.shape())?;
        match self.parts.last_mut().filter(|_| !self.by_row) {
            Some(sum) => *sum = (&*sum + part)?,
            None => self.parts.push(part),
        }
        Ok(())
    }

    fn finish(self, dtype: DType) -> Result<Tensor> {
        match self.by_row {
            true => Tensor::cat(&self.parts, D::Minus2)?.to_dtype(dtype),
            false => self.parts[0].to_dtype(dtype),
        }
    }
}

/// Keeps what is infinite or NaN in its own sequence of a packed batch. Products go over all rows, hidden
/// ones with a factor of 0, and 0 · NaN is NaN. So they are made of what is finite alone, and gradients of a
/// head's sequence that has anything else are NaN after.
struct Apart {
    /// The sequence of each query and key.
    sequences: [Tensor; 2],
    /// f32 `[kv, group, sequences + 1]`, over 0 where anything is not finite; of queries, and of keys with one
    /// head in a group.
    of_queries: Tensor,
    of_keys: Tensor,
}

impl Apart {
    fn new(
        p: &AttentionProblem,
        sequences: [Tensor; 2],
        of_queries: [&Tensor; 2],
        of_keys: [&Tensor; 2],
    ) -> Result<Self> {
        let count = p.packed.unwrap_or(0) + 1;
        let spoilt = |ts: [&Tensor; 2], sequences: &Tensor| {
            let of = |t: &Tensor| {
                let spoilt = finite(t)?.to_dtype(DType::F32)?.affine(-1.0, 1.0)?;
                spoilt.max(D::Minus1)
            };
            let rows = (of(ts[0])? + of(ts[1])?)?;
            let rows = if rows.rank() == 2 { rows.unsqueeze(1)? } else { rows };
            let (kv, group, _) = rows.dims3()?;
            let none = Tensor::zeros((kv, group, count), DType::F32, rows.device())?;
            none.index_add(sequences, &rows.contiguous()?, 2)
        };
        Ok(Self {
            of_queries: spoilt(of_queries, &sequences[0])?,
            of_keys: spoilt(of_keys, &sequences[1])?,
            sequences,
        })
    }

    /// Makes the gradients of those sequences NaN.
    fn spoil(&self, [dq, dk, dv]: [Tensor; 3]) -> Result<[Tensor; 3]> {
        let nan = |spoilt: Tensor, sequences: &Tensor, grad: Tensor| {
            let each = spoilt.contiguous()?.index_select(sequences, 2)?;
            let rows = each.reshape((grad.dim(0)?, grad.dim(1)?, 1))?;
            let spoilt = rows.gt(0f32)?.broadcast_as(grad.shape())?;
            let nan = Tensor::full(f32::NAN, (), grad.device())?.broadcast_as(grad.shape())?;
            spoilt.where_cond(&nan, &grad)
        };
        let of_queries = self.of_queries.broadcast_add(&self.of_keys)?;
        let of_keys = (self.of_queries.sum_keepdim(1)? + &self.of_keys)?;
        let [queries, keys] = &self.sequences;
        Ok([
            nan(of_queries, queries, dq)?,
            nan(of_keys.clone(), keys, dk)?,
            nan(of_keys, keys, dv)?,
        ])
    }
}

/// The place of each row of q among the keys, and which of them it sees: `[B or 1, 1, Sq, 1]`.
struct Rows {
    /// The key at whose side the row stands.
    anchor: Tensor,
    /// The first visible key and the one after the last, unless all are.
    bounds: Option<[Tensor; 2]>,
    /// In a padded batch the lengths of q and k, `[B or 1, 1, 1, 1]`.
    lengths: Option<[Tensor; 2]>,
    /// In a packed batch the sequence of each row of q and of k, or their number if it is in none.
    sequences: Option<[Tensor; 2]>,
    /// The number of sequences there.
    packed: usize,
}

impl Rows {
    fn new(p: &AttentionProblem, given: &[Option<&Tensor>; 2], device: &Device) -> Result<Self> {
        let (sq, sk) = (p.seq_q() as f64, p.seq_k() as f64);
        let rows = positions(0, p.seq_q(), device)?.reshape((1, 1, (), 1))?;
        let length = |t: Option<&Tensor>, most: f64| match t {
            Some(t) => t.to_dtype(DType::F32)?.minimum(most),
            None => Tensor::new(&[most as f32], device),
        };
        let [lengths_q, lengths_k] = [length(given[0], sq)?, length(given[1], sk)?];
        let nothing = rows.zeros_like()?;
        let (anchor, start, end, lengths, sequences) = match p.packed {
            None => {
                let (lq, lk) =
                    (lengths_q.reshape(((), 1, 1, 1))?, lengths_k.reshape(((), 1, 1, 1))?);
                let anchor = rows.broadcast_add(&(lk.broadcast_sub(&lq)?))?;
                let inside = rows.broadcast_lt(&lq)?.to_dtype(DType::F32)?;
                let end = inside.broadcast_mul(&lk)?;
                let padded = given.iter().any(Option::is_some);
                (anchor, nothing, end, padded.then_some([lq, lk]), None)
            }
            Some(n) => {
                // After the last sequence stands one without keys.
                let zero = Tensor::zeros(1, DType::F32, device)?;
                let of_each = |t: &Tensor, first| Tensor::cat(&[&t.narrow(0, first, n)?, &zero], 0);
                let ends = of_each(&lengths_q, 1)?;
                let sequences = [
                    ranks(&lengths_q.narrow(0, 1, n)?, &rows.flatten_all()?)?,
                    ranks(&lengths_k.narrow(0, 1, n)?, &positions(0, p.seq_k(), device)?)?,
                ];
                let pick = |t: Tensor| t.index_select(&sequences[0], 0)?.reshape(rows.shape());
                let (end_q, end_k) = (pick(ends)?, pick(of_each(&lengths_k, 1)?)?);
                let anchor = ((&rows - end_q)? + &end_k)?;
                (anchor, pick(of_each(&lengths_k, 0)?)?, end_k, None, Some(sequences))
            }
        };
        let bounded = p.mask != Default::default() || given.iter().any(Option::is_some);
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
        Ok(Self { anchor, bounds, lengths, sequences, packed: p.packed.unwrap_or(0) })
    }

    /// `t` `[B, H, S, ..]`, with a row for each query (`side` 0) or key (1), and zeros for rows of no sequence.
    fn inside(&self, side: usize, t: &Tensor) -> Result<Tensor> {
        let rows = positions(0, t.dim(2)?, t.device())?.reshape((1, 1, (), 1))?;
        let inside = match (&self.lengths, &self.sequences) {
            (Some(lengths), _) => rows.broadcast_lt(&lengths[side])?,
            (None, Some(sequences)) => {
                let none = self.packed as f64;
                sequences[side].to_dtype(DType::F32)?.lt(none)?.reshape((1, 1, (), 1))?
            }
            (None, None) => return Ok(t.clone()),
        };
        inside.broadcast_as(t.shape())?.where_cond(t, &t.zeros_like()?)
    }

    /// Rows `q0..q0 + n`.
    fn narrow(&self, q0: usize, n: usize) -> Result<RowBlock> {
        let part = |t: &Tensor| t.narrow(2, q0, n);
        let bounds = self.bounds.as_ref();
        let bounds = bounds.map(|[start, end]| Ok::<_, Error>([part(start)?, part(end)?]));
        Ok(RowBlock { anchor: part(&self.anchor)?, bounds: bounds.transpose()? })
    }

    /// `[B or 1, Hq, Sq or 1, 1]`.
    fn slopes(&self, p: &AttentionProblem, t: &Tensor) -> Result<Tensor> {
        let heads = p.q.batch()[1].0;
        let t = t.reshape(((), heads))?;
        let Some([sequence, _]) = &self.sequences else { return t.reshape(((), heads, 1, 1)) };
        let each = t.broadcast_as((p.packed.unwrap_or(1), heads))?;
        let none = Tensor::zeros((1, heads), DType::F32, t.device())?;
        let each = Tensor::cat(&[&each, &none], 0)?.index_select(sequence, 0)?;
        each.t()?.reshape((1, heads, (), 1))
    }
}

/// [`Rows`] of one block.
struct RowBlock {
    anchor: Tensor,
    bounds: Option<[Tensor; 2]>,
}

impl RowBlock {
    /// `[B or 1, 1, Sq, n]`, of u8, for n keys.
    fn visible(&self, keys: &Tensor) -> Result<Option<Tensor>> {
        let Some([start, end]) = &self.bounds else { return Ok(None) };
        let (from, to) = (start.broadcast_le(keys)?, end.broadcast_gt(keys)?);
        from.broadcast_mul(&to).map(Some)
    }
}

/// `first`, and the numbers after it.
fn positions(first: usize, len: usize, device: &Device) -> Result<Tensor> {
    Tensor::arange(first as f32, (first + len) as f32, device)
}

/// How many of `ends`, which nowhere decrease, are at most each of `rows`: a binary search in all rows
/// at once.
fn ranks(ends: &Tensor, rows: &Tensor) -> Result<Tensor> {
    let n = ends.elem_count();
    let size = (n + 1).next_power_of_two();
    let padding = Tensor::full(f32::INFINITY, size - n, ends.device())?;
    let ends = Tensor::cat(&[ends, &padding], 0)?;
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
