//! Who competes in a row. The results to compare ours with are candle's in f32.

use candle_core::{D, DType, Device, Result, Tensor};
use kaio_candle::prelude::*;

use super::backward;
use super::common::contest::{CANDLE, Contest, OURS, agree};
use super::common::gpu::Gpu;
use super::common::table::Row as _;
use super::rows::{Mask, Pass, Row};
use super::unfused::unfused;

/// So many scores candle may keep: a few times 2 GiB in 16 bits.
const MOST_SCORES: usize = 1 << 30;
/// So many queries of each head are compared, spread over all of them.
const COMPARED: usize = 64;

pub fn prepare(gpu: &Gpu, row: &Row) -> Result<Contest> {
    match row.pass {
        Pass::Forward => forward(gpu, row),
        _ => backward::prepare(gpu, row),
    }
}

fn forward(gpu: &Gpu, row: &Row) -> Result<Contest> {
    let random = |heads, length| {
        let dims = (row.batch, heads, length, row.dim);
        Tensor::randn(0f32, 1., dims, &gpu.device)?.to_dtype(row.dtype)
    };
    let q = random(row.heads, row.queries)?;
    let [k, v] = [random(row.kv_heads, row.keys)?, random(row.kv_heads, row.keys)?];
    let opts = options(row);
    // Before anyone else: what a kernel leaves unwritten cannot be a right result from freed memory.
    let ours = q.kaio_flash_attn_with(&k, &v, &opts)?;
    if !row.host() {
        compare(row, &ours, [&q, &k, &v])?;
    }
    drop(ours);

    let mut contest = Contest::default();
    let inputs = [q.clone(), k.clone(), v.clone()];
    contest.add(OURS, move || {
        let [q, k, v] = &inputs;
        q.kaio_flash_attn_with(k, v, &opts).map(drop)
    });
    if row.scores() <= MOST_SCORES {
        let all = (0..row.queries).collect::<Vec<_>>();
        let (q, mask) = (grouped(row, &q)?, mask(row, &all, row.dtype, &gpu.device)?);
        contest.add_if_able(CANDLE, move || unfused(&q, &k, &v, mask.as_ref()).map(drop));
    }
    Ok(contest)
}

/// Our own kernels' limits are to be seen.
pub fn options(row: &Row) -> FlashAttnOptions {
    let opts = FlashAttnOptions::default().engine(Engine::Native).causal(row.mask != Mask::Full);
    match row.mask {
        Mask::Window(left) => opts.window_size_left(left),
        _ => opts,
    }
}

/// Heads that share keys as more queries of one head, which candle's product takes.
pub fn grouped(row: &Row, q: &Tensor) -> Result<Tensor> {
    q.reshape((row.batch, row.kv_heads, (), row.dim))
}

/// What is added to the scores of the queries `rows` of a group of heads.
pub fn mask(row: &Row, rows: &[usize], dtype: DType, device: &Device) -> Result<Option<Tensor>> {
    let left = match row.mask {
        Mask::Full => return Ok(None),
        Mask::Causal => row.keys,
        Mask::Window(left) => left,
    };
    let before = row.keys - row.queries;
    let hidden = |i, j| j > i + before || j + left < i + before;
    let mask = rows.iter().flat_map(|&i| {
        (0..row.keys).map(move |j| if hidden(i, j) { f32::NEG_INFINITY } else { 0.0 })
    });
    let mask = Tensor::from_iter(mask, device)?.reshape((rows.len(), row.keys))?;
    Ok(Some(mask.repeat((row.heads / row.kv_heads, 1))?.to_dtype(dtype)?))
}

/// Those of `length` queries that are compared.
pub fn compared(length: usize) -> Vec<usize> {
    let count = COMPARED.min(length);
    (1..=count).map(|i| i * length / count - 1).collect()
}

fn compare(row: &Row, ours: &Tensor, inputs: [&Tensor; 3]) -> Result<()> {
    let device = ours.device();
    let rows = compared(row.queries);
    let index = Tensor::from_iter(rows.iter().map(|&i| i as u32), device)?;
    let mask = mask(row, &rows, DType::F32, device)?;
    let [q, k, v] = inputs.map(|t| t.to_dtype(DType::F32));
    let q = grouped(row, &q?.index_select(&index, D::Minus2)?)?;
    let theirs = unfused(&q, &k?, &v?, mask.as_ref())?.to_dtype(row.dtype)?;
    let ours = ours.index_select(&index, D::Minus2)?;
    agree("attention", &ours, &theirs.reshape(ours.shape())?, row.keys)
}
