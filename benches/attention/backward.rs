//! Who competes in a row of the backward pass.

use candle_core::{D, DType, Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use kaio_candle::tune::FlashAttnBackward;

use super::DEFAULT;
use super::common::contest::{CANDLE, Contest, OURS, agree_after};
use super::common::gpu::Gpu;
use super::common::table::Row as _;
use super::contest::{self, compared, grouped, mask};
use super::rows::{Pass, Row};
use super::unfused::unfused;

pub fn prepare(gpu: &Gpu, row: &Row) -> Result<Contest> {
    let (inputs, opts) = (inputs(row, &gpu.device)?, options(row, &gpu.device)?);
    // Before anyone else: what a kernel leaves unwritten cannot be a right result from freed memory.
    let attention = attend(&inputs, &opts)?;
    let grad = random(attention.out().dims(), row.dtype, &gpu.device)?;
    if !row.host() {
        check(row, &attention, &inputs, &grad)?;
    }
    let mut contest = Contest::default();
    if row.pass == Pass::Graph {
        let [q, k, v] = &inputs;
        let out = q.kaio_flash_attn_with(k, v, &opts)?;
        contest.add(OURS, move || out.backward().map(drop));
    } else {
        contest.add(OURS, run(row.pass, &inputs, &opts, &grad)?);
    }
    if row.deterministic {
        contest.add(DEFAULT, run(row.pass, &inputs, &opts.deterministic(false), &grad)?);
    }
    if row.dtype == DType::F32 || row.pass == Pass::Graph {
        contest.add_if_able(CANDLE, candle(row, &inputs, &grad)?);
    }
    Ok(contest)
}

/// The op's gradient alone, or after the op.
fn run(
    pass: Pass,
    inputs: &[Tensor; 3],
    opts: &FlashAttnOptions,
    grad: &Tensor,
) -> Result<impl FnMut() -> Result<()> + use<>> {
    let (inputs, opts, grad) = (inputs.clone(), opts.clone(), grad.clone());
    let ready = if pass == Pass::Backward { Some(attend(&inputs, &opts)?) } else { None };
    Ok(move || match &ready {
        Some(attention) => attention.run(&grad).map(drop),
        None => attend(&inputs, &opts)?.run(&grad).map(drop),
    })
}

/// The same by candle's graph, which has no other way to an upstream gradient than a product.
fn candle(
    row: &Row,
    inputs: &[Tensor; 3],
    grad: &Tensor,
) -> Result<impl FnMut() -> Result<()> + use<>> {
    let [q, k, v] = inputs.clone();
    let all = (0..row.queries).collect::<Vec<_>>();
    let mask = mask(row, &all, row.dtype, grad.device())?;
    let (row, grad) = (*row, grad.clone());
    let loss = move || {
        let out = unfused(&grouped(&row, &q)?, &k, &v, mask.as_ref())?;
        (out.reshape(grad.shape())? * &grad)?.sum_all()
    };
    let ready = if row.pass == Pass::Both { None } else { Some(loss()?) };
    Ok(move || match &ready {
        Some(loss) => loss.backward().map(drop),
        None => loss()?.backward().map(drop),
    })
}

fn attend([q, k, v]: &[Tensor; 3], opts: &FlashAttnOptions) -> Result<FlashAttnBackward> {
    FlashAttnBackward::new([q, k, v], opts)
}

/// q, k and v, which track gradients: `[T, H, D]` of a packed batch, or `[B, H, S, D]`.
fn inputs(row: &Row, device: &Device) -> Result<[Tensor; 3]> {
    let input = |heads, length| {
        let dims = match row.lengths {
            Some(lengths) => vec![lengths.iter().sum(), heads, row.dim],
            None => vec![row.batch, heads, length, row.dim],
        };
        Ok::<_, candle_core::Error>(
            Var::from_tensor(&random(&dims, row.dtype, device)?)?.into_inner(),
        )
    };
    let [k, v] = [input(row.kv_heads, row.keys)?, input(row.kv_heads, row.keys)?];
    Ok([input(row.heads, row.queries)?, k, v])
}

fn random(dims: &[usize], dtype: DType, device: &Device) -> Result<Tensor> {
    Tensor::randn(0f32, 1., dims, device)?.to_dtype(dtype)
}

fn options(row: &Row, device: &Device) -> Result<FlashAttnOptions> {
    let opts = contest::options(row).deterministic(row.deterministic);
    let Some(lengths) = row.lengths else { return Ok(opts) };
    let mut ends = vec![0];
    ends.extend(lengths.iter().scan(0, |end, &length| {
        *end += length as u32;
        Some(*end)
    }));
    let ends = Tensor::new(ends, device)?;
    Ok(opts.layout(AttnLayout::Bshd).cu_seqlens_q(ends.clone()).cu_seqlens_k(ends))
}

/// Compares the gradients with candle's in f32, for an upstream gradient of a few queries of each sequence.
fn check(
    row: &Row,
    attention: &FlashAttnBackward,
    inputs: &[Tensor; 3],
    grad: &Tensor,
) -> Result<()> {
    let lengths = row.lengths.map_or(vec![row.queries], <[usize]>::to_vec);
    let few = lengths.iter().flat_map(|&length| {
        let rows = compared(length);
        (0..length).map(move |i| f32::from(u8::from(rows.contains(&i))))
    });
    let few = Tensor::from_iter(few, grad.device())?.to_dtype(row.dtype)?.unsqueeze(1)?;
    let few = if row.lengths.is_some() { few.unsqueeze(2)? } else { few };
    let got = attention.run(&grad.broadcast_mul(&few)?)?;
    let Some(got) = got.into_iter().take(3).collect::<Option<Vec<_>>>() else {
        bail!("a gradient is missing")
    };
    let mut start = 0;
    for length in lengths {
        // One sequence, or all of them if they are not packed, as `[B, H, S, D]`.
        let part = |t: &Tensor| match row.lengths {
            Some(_) => t.narrow(0, start, length)?.transpose(0, 1)?.unsqueeze(0)?.contiguous(),
            None => Ok(t.clone()),
        };
        let parts = |of: &[Tensor]| of.iter().map(part).collect::<Result<Vec<_>>>();
        let alone = match row.lengths {
            Some(_) => Row { batch: 1, queries: length, keys: length, lengths: None, ..*row },
            None => *row,
        };
        compare(&alone, &parts(&got)?, &parts(inputs)?, &part(grad)?)?;
        start += length;
    }
    Ok(())
}

fn compare(row: &Row, got: &[Tensor], inputs: &[Tensor], grad: &Tensor) -> Result<()> {
    let (device, rows) = (grad.device(), compared(row.queries));
    let index = Tensor::from_iter(rows.iter().map(|&i| i as u32), device)?;
    let mask = mask(row, &rows, DType::F32, device)?;
    let pick = |t: &Tensor| t.index_select(&index, D::Minus2);
    let input = |t: &Tensor| {
        Ok::<_, candle_core::Error>(Var::from_tensor(&t.to_dtype(DType::F32)?)?.into_inner())
    };
    let [q, k, v] = [input(&pick(&inputs[0])?)?, input(&inputs[1])?, input(&inputs[2])?];
    let out = unfused(&grouped(row, &q)?, &k, &v, mask.as_ref())?.reshape(q.shape())?;
    let grads = (out * pick(grad)?.to_dtype(DType::F32)?)?.sum_all()?.backward()?;
    let want = |of: &Tensor| match grads.get(of) {
        Some(grad) => grad.to_dtype(row.dtype),
        None => bail!("candle's has no gradient"),
    };
    // The result, whose product with its gradient is in all of them; P or dS, as operands; the gradient.
    const ROUNDINGS: u32 = 3;
    let agree = |name, got: &Tensor, want: &Tensor| {
        agree_after(name, &blocks(got)?, &blocks(want)?, row.keys, ROUNDINGS)
    };
    agree("dq", &pick(&got[0])?, &want(&q)?)?;
    agree("dk", &got[1], &want(&k)?)?;
    agree("dv", &got[2], &want(&v)?)
}

/// 64 rows as one. The gradient of a query that sees a single key is the rounding error of a difference, as
/// that of a key may be which a single query sees.
fn blocks(t: &Tensor) -> Result<Tensor> {
    const ROWS: usize = 64;
    let (batch, heads, rows, dim) = t.dims4()?;
    let full = rows.next_multiple_of(ROWS);
    t.pad_with_zeros(2, 0, full - rows)?.reshape((batch, heads, full / ROWS, ROWS * dim))
}
