//! Attention: the f32 flash kernels.
//!
//! They take one square head: as many queries as keys, D ≤ 256, scale 1/√D, top-left
//! causal. Sizes are cut and padded to that, with rows and columns of zeros that change no number (see
//! [`Square`]); other options are refused, in [`limit`].

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaStorage, DType, Layout, Result};

use super::fit::{self, Fitted, Want, fit};
use super::session::Session;
use super::{cast, crop, full, indexable, unsupported};
use crate::check;
use crate::op::{AttentionInputs, AttentionProblem, AttentionResults, Mask};
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

/// How the rows of a problem become squares of `sk` queries by `sk` keys.
///
/// - Causal, Sq ≤ Sk: rows of zeros before the first query align the last query with the last key.
/// - Causal, Sq > Sk: the first Sq − Sk queries see no key; the others are a square.
/// - Not causal: squares of Sk queries each, the last filled up with rows of zeros.
///
/// Rows of zeros are queries whose results are thrown away.
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
        check::size(op, "the squares", &[p.q.count(), pieces * side, width], DType::F32)?;
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

/// The result and, if wanted, the log-sum-exp. There is no backward pass.
pub(crate) fn flash_attn(
    op: &'static str,
    p: &AttentionProblem,
    wants_lse: bool,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<AttentionResults<CudaStorage>> {
    let len = p.out.elements();
    let AttentionInputs { q, k, v, .. } = *inputs;
    let (out, lse) = flash_f32(op, p, wants_lse, [q, k, v])?;
    let out = cast(op, out, len, p.out_dtype)?;
    if p.out.contiguous().is_some() {
        return Ok(AttentionResults { out, lse, stats: None });
    }
    // Heads lie between rows: packed again, in the order of the result.
    fit::copyable(op, len)?;
    let heads_first = Layout::contiguous(p.out.layout().shape());
    let out = fit::pack(&out, &heads_first.transpose(1, 2)?)?;
    Ok(AttentionResults { out, lse, stats: None })
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
