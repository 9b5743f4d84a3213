//! Attention: the f32 flash kernels with their backward.
//!
//! They take one square head: as many queries as keys, D ≤ 256, scale 1/√D, top-left
//! causal. Sizes are cut and padded to that, with rows and columns of zeros that change no number (see
//! [`Square`]); other options are refused, in [`limit`].

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::op::ReduceOp;
use candle_core::scalar::Scalar;
use candle_core::{CudaStorage, DType, Layout, Result, Shape};

use super::fit::{self, Fitted, Want, fit};
use super::session::Session;
use super::{cast, crop, indexable, unsupported, zeros};
use crate::op::{AttentionInputs, AttentionProblem, AttentionUpstream, Mask};
use crate::stack::Stack;

/// The flash kernels give each column of the result a thread of a block of 256.
const MAX_HEAD_DIM: usize = 256;

/// What of a problem no flash kernel can take, and what to do instead.
fn limit(p: &AttentionProblem) -> Option<(String, &'static str)> {
    let width = p.head_dim().max(p.value_dim());
    if width > MAX_HEAD_DIM {
        let problem = format!("a head dimension of {width} (at most {MAX_HEAD_DIM})");
        return Some((problem, "run it on the CPU, or use narrower heads"));
    }
    let Mask { left, right } = p.mask;
    let [lengths_q, lengths_k] = p.extras.lengths.each_ref().map(Option::is_some);
    let options = [
        (left.is_some(), "`window_size_left`"),
        (right.is_some_and(|right| right != 0), "`window_size_right`"),
        (p.softcap.is_some(), "`softcap`"),
        (p.extras.slopes.is_some(), "`alibi_slopes`"),
        (p.extras.bias.is_some(), "`bias`"),
        (p.packed.is_some(), "`cu_seqlens_q`"),
        (lengths_q, "`seqlens_q`"),
        (lengths_k, "`seqlens_k`"),
    ];
    let given = options.into_iter().find(|&(given, _)| given);
    given.map(|(_, option)| (option.into(), "run it on the CPU, or leave it out"))
}

/// Whether the flash kernels take a problem and its gradients.
pub(crate) fn flash_takes(p: &AttentionProblem) -> bool {
    limit(p).is_none()
}

/// How the rows of a problem become squares of `sk` queries by `sk` keys.
///
/// - Causal, Sq ≤ Sk: rows of zeros before the first query align the last query with the last key.
/// - Causal, Sq > Sk: the first Sq − Sk queries see no key; the others are a square.
/// - Not causal: squares of Sk queries each, the last filled up with rows of zeros.
///
/// Rows of zeros are queries whose results are thrown away and whose upstream gradient is zero.
struct Square {
    op: &'static str,
    causal: bool,
    /// Queries that see no key.
    unseen: usize,
    /// Rows of zeros before the first query.
    before: usize,
    /// Number of squares.
    pieces: usize,
    /// Keys, and queries of a square.
    side: usize,
    /// Columns: D or Dv, whichever is more.
    width: usize,
    /// What q is multiplied by, so that the kernels' 1/√width becomes the problem's scale.
    factor: Option<f32>,
}

impl Square {
    fn new(op: &'static str, p: &AttentionProblem) -> Result<Self> {
        let (sq, side) = (p.seq_q(), p.seq_k());
        if let Some((problem, fix)) = limit(p) {
            return Err(unsupported(op, &problem, fix).into());
        }
        let width = p.head_dim().max(p.value_dim());
        let causal = p.mask.right.is_some();
        let pieces = if causal { 1 } else { sq.div_ceil(side) };
        indexable(op, "q", pieces * side, width)?;
        let kernel_scale = 1.0 / (width as f32).sqrt();
        Ok(Self {
            op,
            causal,
            unseen: if causal { sq.saturating_sub(side) } else { 0 },
            before: if causal { side.saturating_sub(sq) } else { 0 },
            pieces,
            side,
            width,
            factor: (p.scale != kernel_scale).then(|| p.scale * (width as f32).sqrt()),
        })
    }

    /// Rows of all squares of a head.
    fn rows(&self) -> usize {
        self.pieces * self.side
    }

    /// Elements of one square operand.
    fn len(&self) -> usize {
        self.side * self.width
    }

    /// A matrix with a row for each query, as squares.
    fn queries<'a>(
        &self,
        (storage, stack): (&'a CudaStorage, &Stack),
        cols: usize,
        factor: Option<f32>,
    ) -> Result<Fitted<'a>> {
        let want = Want {
            dtype: Some(DType::F32),
            factor,
            rows_before: self.before,
            rows: self.rows(),
            cols,
            ..Want::default()
        };
        fit(self.op, (storage, &stack.skip_rows(self.unseen)), want)
    }

    /// A matrix with a row for each key.
    fn keys<'a>(&self, storage: &'a CudaStorage, stack: &Stack) -> Result<Fitted<'a>> {
        let want = Want { dtype: Some(DType::F32), cols: self.width, ..Want::default() };
        fit(self.op, (storage, stack), want)
    }

    /// The way back from squares to `[heads, sq, cols]`; queries that saw no key become `unseen`.
    fn restore(
        &self,
        squares: CudaStorage,
        heads: usize,
        width: usize,
        (sq, cols): (usize, usize),
        unseen: f32,
    ) -> Result<CudaStorage> {
        let seen = sq - self.unseen;
        let out = crop(self.op, squares, heads, (self.rows(), width), self.before, (seen, cols))?;
        if self.unseen == 0 {
            return Ok(out);
        }
        let mut all = full(&out, heads * sq * cols, unseen)?;
        out.copy2d(&mut all, heads, seen * cols, seen * cols, sq * cols, 0, self.unseen * cols)?;
        Ok(all)
    }
}

/// `len` times a number, in f32.
fn full(like: &CudaStorage, len: usize, value: f32) -> Result<CudaStorage> {
    let mut out = zeros(like, len, DType::F32)?;
    if len > 0 && value != 0.0 {
        out.const_set(Scalar::F32(value), &Layout::contiguous(len))?;
    }
    Ok(out)
}

/// The result and log-sum-exp of a problem without elements in its result, or without keys.
pub(crate) fn empty_flash_attn(
    p: &AttentionProblem,
    wants_lse: bool,
    inputs: &AttentionInputs<CudaStorage>,
    attend: impl FnOnce(
        &AttentionProblem,
        &AttentionInputs<CudaStorage>,
    ) -> Result<(CudaStorage, Option<CudaStorage>)>,
) -> Result<(CudaStorage, Option<CudaStorage>)> {
    let AttentionInputs { q, k, ref extras, .. } = *inputs;
    let rows = p.q.count() * p.seq_q();
    let lse = match wants_lse {
        false => None,
        // Without columns of v the scores are still there: any matrix stands in for it.
        true if rows > 0 && p.seq_k() > 0 && p.packed != Some(0) => {
            let out = p.q.packed();
            let scores = AttentionProblem { v: p.k.clone(), out, ..p.clone() };
            attend(&scores, &AttentionInputs { q, k, v: k, extras: extras.clone() })?.1
        }
        true => Some(full(q, rows, f32::NEG_INFINITY)?),
    };
    Ok((zeros(q, p.out.elements(), p.out_dtype)?, lse))
}

/// The result and, if wanted, the log-sum-exp `[heads, Sq]` in f32.
pub(crate) fn flash_attn(
    op: &'static str,
    p: &AttentionProblem,
    wants_lse: bool,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<(CudaStorage, Option<CudaStorage>)> {
    let len = p.out.elements();
    let AttentionInputs { q, k, v, .. } = *inputs;
    let (out, lse) = flash_f32(op, p, wants_lse, [q, k, v])?;
    let out = cast(op, out, len, p.out_dtype)?;
    if p.out.contiguous().is_some() {
        return Ok((out, lse));
    }
    // Heads behind rows: packed again, in the order of the result.
    fit::copyable(op, len)?;
    let heads_first = Layout::contiguous(p.out.layout().shape());
    Ok((fit::pack(&out, &heads_first.transpose(1, 2)?)?, lse))
}

fn flash_f32(
    op: &'static str,
    p: &AttentionProblem,
    wants_lse: bool,
    [q, k, v]: [&CudaStorage; 3],
) -> Result<(CudaStorage, Option<CudaStorage>)> {
    let (heads, sq) = (p.q.count(), p.seq_q());
    let square = Square::new(op, p)?;
    let (side, width, len) = (square.side, square.width, square.len());
    let q = square.queries((q, &p.q), width, square.factor)?;
    let (k, v) = (square.keys(k, &p.k)?, square.keys(v, &p.v)?);

    let session = Session::new(op, &[q.storage(), k.storage(), v.storage()])?;
    let mut out = session.alloc::<f32>(heads * square.pieces * len)?;
    let mut lse = wants_lse.then(|| session.alloc::<f32>(heads * square.rows())).transpose()?;
    {
        let (pq, pk, pv) =
            (session.input(q.storage())?, session.input(k.storage())?, session.input(v.storage())?);
        let po = session.output(&mut out)?;
        let pl = lse.as_mut().map(|lse| session.output(lse)).transpose()?;
        let plain = match square.causal {
            false => kaio_ops::attention_flash,
            true => kaio_ops::attention_flash_causal,
        };
        let with_stats = match square.causal {
            false => kaio_ops::attention_flash_with_stats,
            true => kaio_ops::attention_flash_causal_with_stats,
        };
        let (s, d) = (side as u32, width as u32);
        session.run(|device| {
            for i in 0..heads * square.pieces {
                let (head, piece) = (i / square.pieces, i % square.pieces);
                let kv = head / p.group;
                let q = pq.view(q.offset(head) + piece * len, len);
                let (k, v) = (pk.view(k.offset(kv), len), pv.view(v.offset(kv), len));
                let mut out = po.view(i * len, len);
                match &pl {
                    None => plain(device, &q, &k, &v, &mut out, s, d)?,
                    Some(lse) => {
                        let mut lse = lse.view(i * side, side);
                        with_stats(device, &q, &k, &v, &mut out, &mut lse, s, d)?;
                    }
                }
            }
            Ok(())
        })?;
    }
    let out = square.restore(wrap(&session, out), heads, width, (sq, p.value_dim()), 0.0)?;
    let unseen = f32::NEG_INFINITY;
    let lse = lse.map(|lse| square.restore(wrap(&session, lse), heads, 1, (sq, 1), unseen));
    Ok((out, lse.transpose()?))
}

fn wrap(session: &Session, slice: cudarc::driver::CudaSlice<f32>) -> CudaStorage {
    CudaDType::wrap_cuda_slice(slice, session.device.clone())
}

/// dq, dk and dv in a row, packed, heads before rows, in the inputs' dtype.
pub(crate) fn flash_attn_backward(
    op: &'static str,
    p: &AttentionProblem,
    inputs: &AttentionInputs<CudaStorage>,
    upstream: &AttentionUpstream<CudaStorage>,
) -> Result<CudaStorage> {
    let AttentionInputs { q, k, v, .. } = *inputs;
    let lens = [&p.q, &p.k, &p.v].map(Stack::elements);
    let total: usize = lens.iter().sum();
    let dtype = q.dtype();
    if p.is_empty() {
        return zeros(q, total, dtype);
    }
    let square = Square::new(op, p)?;
    let (side, width, len) = (square.side, square.width, square.len());
    let (heads, sq) = (p.q.count(), p.seq_q());
    let q = square.queries((q, &p.q), width, square.factor)?;
    let (k, v) = (square.keys(k, &p.k)?, square.keys(v, &p.v)?);
    let out = square.queries((upstream.out, &p.out), width, None)?;
    let grad = square.queries((upstream.grad.0, &upstream.grad.1), width, None)?;
    let rows = Stack::new(&Layout::contiguous((heads, sq, 1)));
    let lse = square.queries((upstream.lse, &rows), 1, None)?;

    let fitted = [&q, &k, &v, &out, &grad, &lse];
    let session = Session::new(op, &fitted.map(Fitted::storage))?;
    let count = heads * square.pieces;
    let mut dq = session.alloc::<f32>(count * len)?;
    // One dk and dv for each square; those that share a key head are summed after.
    let mut dk = session.alloc::<f32>(count * len)?;
    let mut dv = session.alloc::<f32>(count * len)?;
    {
        let [pq, pk, pv, po, pg, pl] = fitted.map(|f| session.input(f.storage()));
        let (pq, pk, pv, po, pg, pl) = (pq?, pk?, pv?, po?, pg?, pl?);
        let (pdq, pdk, pdv) =
            (session.output(&mut dq)?, session.output(&mut dk)?, session.output(&mut dv)?);
        let kernel = match square.causal {
            false => kaio_ops::attention_flash_bwd,
            true => kaio_ops::attention_flash_bwd_causal,
        };
        session.run(|device| {
            for i in 0..count {
                let (head, at) = (i / square.pieces, i % square.pieces * len);
                let kv = head / p.group;
                kernel(
                    device,
                    &pg.view(grad.offset(head) + at, len),
                    &pq.view(q.offset(head) + at, len),
                    &pk.view(k.offset(kv), len),
                    &pv.view(v.offset(kv), len),
                    &po.view(out.offset(head) + at, len),
                    &pl.view(lse.offset(head) + at / width, side),
                    &mut pdq.view(i * len, len),
                    &mut pdk.view(i * len, len),
                    &mut pdv.view(i * len, len),
                    side as u32,
                    width as u32,
                )?;
            }
            Ok(())
        })?;
    }
    let (d, v_dim) = (p.head_dim(), p.value_dim());
    let dq = square.restore(wrap(&session, dq), heads, width, (sq, d), 0.0)?;
    let dq = match square.factor {
        Some(factor) => dq.affine(&Layout::contiguous(lens[0]), f64::from(factor), 0.0)?,
        None => dq,
    };
    let shared = p.group * square.pieces;
    if shared != 1 {
        fit::copyable(op, count * len)?;
    }
    let shared_sum = |grads: CudaStorage, cols: usize| {
        let kv = count / shared;
        let sum = match shared {
            1 => grads,
            _ => grads.reduce_op(ReduceOp::Sum, &Layout::contiguous((kv, shared, len)), &[1])?,
        };
        crop(op, sum, kv, (side, width), 0, (side, cols))
    };
    let dk = shared_sum(wrap(&session, dk), d)?;
    let dv = shared_sum(wrap(&session, dv), v_dim)?;
    let mut flat = fit::uninit(&session.device, &Shape::from(total), DType::F32)?;
    let mut start = 0;
    for (part, len) in [&dq, &dk, &dv].into_iter().zip(lens) {
        part.copy_strided_src(&mut flat, start, &Layout::contiguous(len))?;
        start += len;
    }
    cast(op, flat, total, dtype)
}
