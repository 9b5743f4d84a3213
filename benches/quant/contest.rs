//! Who competes in a row: before anyone is timed, our result is compared with candle's product, in f32, of the
//! weight's elements.

use candle_core::{DType, Result, Tensor};
use kaio_candle::MatmulOptions;
use kaio_candle::kernel::Element;
use kaio_candle::kernel::w4::Scheme;
use kaio_candle::prelude::*;
use kaio_candle::tune::{self, W4};

use super::common::contest::{CANDLE, Contest, OURS, agree};
use super::common::gpu::Gpu;
use super::rows::Row;

/// Our own product of 16-bit operands.
pub const DENSE: &str = "16 bits";

/// A random weight.
pub fn weight(gpu: &Gpu, scheme: Scheme, size @ [k, n]: [usize; 2]) -> Result<W4> {
    // SplitMix64.
    let mut state = (k * n) as u64;
    let words = (0..k.div_ceil(8) * n).map(|_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) as u32
    });
    let words = Tensor::from_iter(words, &gpu.device)?.reshape((k.div_ceil(8), n))?;
    let groups = scheme.groups(k as u64) as usize;
    let dtype = match scheme.scale {
        Element::F32 => DType::F32,
        Element::Half(kaio_candle::ptx::Half::F16) => DType::F16,
        Element::Half(kaio_candle::ptx::Half::Bf16) => DType::BF16,
    };
    let scales = Tensor::rand(0.005f32, 0.015, (groups, n), &gpu.device)?.to_dtype(dtype)?;
    let zeros = match scheme.zeros {
        false => None,
        true => {
            let zeros = Tensor::rand(0f32, 16.0, (groups, n), &gpu.device)?;
            Some(zeros.to_dtype(DType::U8)?)
        }
    };
    let codes = tune::w4_pack(&words, size, &scheme)?;
    Ok(W4 { scheme, size, codes, scales, zeros })
}

/// Activations for it.
pub fn activations(gpu: &Gpu, m: usize, k: usize, dtype: DType) -> Result<Tensor> {
    Tensor::randn(0f32, 1., (m, k), &gpu.device)?.to_dtype(dtype)
}

pub fn prepare(gpu: &Gpu, row: &Row) -> Result<Contest> {
    let &Row { dtype, m, n, k, .. } = row;
    let weight = weight(gpu, row.weight.scheme(dtype), [k, n])?;
    let x = activations(gpu, m, k, dtype)?;
    let options = MatmulOptions::default().out_dtype(dtype);
    let ours = tune::w4_matmul(&x, &weight, &options, None)?;
    let exact = tune::w4_dequantize(&weight, DType::F32, false)?;
    let exact = x.to_dtype(DType::F32)?.matmul(&exact)?.to_dtype(dtype)?;
    agree(CANDLE, &ours, &exact, k)?;
    let elements = tune::w4_dequantize(&weight, dtype, false)?;

    let mut contest = Contest::default();
    let (a, opts) = (x.clone(), options.clone());
    contest.add(OURS, move || tune::w4_matmul(&a, &weight, &opts, None).map(drop));
    let (a, b) = (x.clone(), elements.clone());
    contest.add_if_able(CANDLE, move || a.matmul(&b).map(drop));
    contest.add(DENSE, move || x.kaio_matmul_with(&elements, &options).map(drop));
    Ok(contest)
}
