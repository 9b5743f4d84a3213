//! Products of codes with scales of rows and columns, or of blocks, beside those of the same codes as bf16. The weight lies
//! along K, as a prepared one does.

use candle_core::{DType, Device, Result, Tensor};
use kaio_candle::prelude::*;

use super::common::contest::{CANDLE, Contest, OURS, agree};
use super::common::gpu::Gpu;
use super::contest::DENSE;
use super::rows::Row;

/// Elements of a side of a block.
const BLOCK: usize = 128;

pub fn prepare(gpu: &Gpu, row: &Row) -> Result<Contest> {
    let int8 = matches!(row.scheme, QuantScheme::Int8 { .. });
    let codes =
        |rows| if int8 { int8_codes(gpu, rows, row.k) } else { e4m3_codes(gpu, rows, row.k) };
    let ((a, x), (b, y)) = (codes(row.m)?, codes(row.n)?);
    let (b, [x, y]) = (b.t()?, [x.to_dtype(row.dtype)?, y.to_dtype(row.dtype)?.t()?]);
    let scale = |dims: &[usize]| Tensor::rand(0.01f32, 0.02, dims, &gpu.device);
    let [depth, blocks] = [row.k, row.n].map(|len| len.div_ceil(BLOCK));
    let [rows, cols] = match row.blocks() {
        false => [scale(&[row.m])?, scale(&[row.n])?],
        true => [scale(&[row.m, depth])?, scale(&[depth, blocks])?],
    };
    let want = expected(row, [&x, &y], [&rows, &cols])?;
    let run = {
        let int8_opts = Int8Options::default().lhs_scales(rows.clone()).rhs_scales(cols.clone());
        let fp8_opts = Fp8Options::default().lhs_scales(rows).rhs_scales(cols);
        let int8_opts = int8_opts.out_dtype(row.dtype);
        let fp8_opts = fp8_opts.out_dtype(row.dtype);
        move || match int8 {
            true => a.kaio_matmul_int8_with(&b, &int8_opts),
            false => a.kaio_matmul_fp8(&b, &fp8_opts),
        }
    };
    agree("product", &run()?, &want, row.k)?;
    drop(want);

    let mut contest = Contest::default();
    contest.add(OURS, move || run().map(drop));
    let opts = MatmulOptions::default().out_dtype(row.dtype);
    let [a, b] = [x.clone(), y.clone()];
    contest.add(DENSE, move || a.kaio_matmul_with(&b, &opts).map(drop));
    contest.add_if_able(CANDLE, move || x.matmul(&y).map(drop));
    Ok(contest)
}

/// The result by products of bf16, which codes are, in f32: one for each block along the depth.
fn expected(row: &Row, [a, b]: [&Tensor; 2], [rows, cols]: [&Tensor; 2]) -> Result<Tensor> {
    let opts = MatmulOptions::default().out_dtype(DType::F32);
    if !row.blocks() {
        let sums = a.kaio_matmul_with(b, &opts)?.broadcast_mul(&rows.unsqueeze(1)?)?;
        return sums.broadcast_mul(cols)?.to_dtype(row.dtype);
    }
    let mut total: Option<Tensor> = None;
    for (i, first) in (0..row.k).step_by(BLOCK).enumerate() {
        let len = BLOCK.min(row.k - first);
        let sums = a.narrow(1, first, len)?.kaio_matmul_with(&b.narrow(0, first, len)?, &opts)?;
        let of_cols = cols.get(i)?.unsqueeze(1)?.repeat((1, BLOCK))?.flatten_all()?;
        let sums = sums.broadcast_mul(&rows.narrow(1, i, 1)?)?;
        let sums = sums.broadcast_mul(&of_cols.narrow(0, 0, row.n)?)?;
        total = Some(match total {
            None => sums,
            Some(total) => (total + sums)?,
        });
    }
    total.expect("there are blocks").to_dtype(row.dtype)
}

/// Random bytes `[rows, k]`, and the numbers that they stand for in f32.
pub fn int8_codes(gpu: &Gpu, rows: usize, k: usize) -> Result<(Tensor, Tensor)> {
    let values =
        Tensor::randn(0f32, 30., (rows, k), &gpu.device)?.round()?.clamp(-127f32, 127f32)?;
    // A byte above 127 is 256 more than the number that it stands for.
    let negative = values.lt(0f32)?.to_dtype(DType::F32)?;
    let bytes = (&values + (negative * 256.0)?)?.to_dtype(DType::U8)?;
    Ok((bytes, values))
}

fn e4m3_codes(gpu: &Gpu, rows: usize, k: usize) -> Result<(Tensor, Tensor)> {
    e4m3(&Tensor::randn(0f32, 1., (rows, k), &gpu.device)?)
}

/// Codes of floats, and what they stand for in f32; by way of the host, as candle cannot cast to e4m3 on a GPU.
pub fn e4m3(values: &Tensor) -> Result<(Tensor, Tensor)> {
    let codes = values.to_device(&Device::Cpu)?.to_dtype(DType::F8E4M3)?;
    let rounded = codes.to_dtype(DType::F32)?;
    Ok((codes.to_device(values.device())?, rounded.to_device(values.device())?))
}
