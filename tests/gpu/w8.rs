//! Products of 16-bit activations with codes of eight bits, by what is chosen and by configurations that nobody chose.
//! Sums are exact: activations are small integers, scales powers of two.

use candle_core::{DType, Device, Result, Tensor, bail};
use kaio_candle::kernel::gemm::Epilogue;
use kaio_candle::kernel::w4::{self, Codes, Scheme, stream};
use kaio_candle::kernel::{self, Element};
use kaio_candle::prelude::*;
use kaio_candle::ptx::{Half, Target};
use kaio_candle::tune::{self, W4};

use super::gpu;

const SCHEMES: [(Codes, Option<u32>); 3] =
    [(Codes::Int8, None), (Codes::E4m3, None), (Codes::E4m3, Some(128))];

/// What a code stands for.
fn value(kind: Codes, code: u8) -> f32 {
    if kind == Codes::Int8 {
        return f32::from(code as i8);
    }
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7) / 8.0);
    let magnitude = match (exponent, code & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-6),
        _ => (1.0 + mantissa) * 2f32.powi(exponent - 7),
    };
    if code >> 7 == 1 { -magnitude } else { magnitude }
}

/// A weight of codes `[n, k]`, padded with those of no number or of −1.
fn weight(
    (kind, group): (Codes, Option<u32>),
    [k, n]: [usize; 2],
    codes: &[u8],
    scales: Tensor,
    device: &Device,
) -> Result<W4> {
    let row = k.next_multiple_of(16);
    let mut padded = vec![0xff; n * row];
    for (to, from) in padded.chunks_mut(row).zip(codes.chunks(k)) {
        to[..k].copy_from_slice(from);
    }
    let scheme = Scheme { codes: kind, zeros: false, scale: Element::F32, group };
    let codes = Tensor::from_vec(padded, (n, row), device)?;
    Ok(W4 { scheme, size: [k, n], codes, scales, zeros: None })
}

#[test]
fn w8_every_code() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let codes: Vec<u8> = (0..=255).collect();
    for (of, dtype) in SCHEMES.into_iter().flat_map(|of| [(of, DType::F16), (of, DType::BF16)]) {
        // Of a scale for all, and of two blocks.
        let scales = if of.1.is_some() { (1, 2) } else { (1, 1) };
        let scales = Tensor::ones(scales, DType::F32, &device)?;
        let w = weight(of, [1, 256], &codes, scales, &device)?;
        // By the kernel for a few rows, and by that for more.
        for m in [1, 17] {
            let x = Tensor::ones((m, 1), DType::F32, &Device::Cpu)?.to_dtype(dtype)?;
            let options = MatmulOptions::default().out_dtype(DType::F32);
            let got = tune::w4_matmul(&x.to_device(&device)?, &w, &options, None)?;
            let got = got.flatten_all()?.to_vec1::<f32>()?;
            for (code, got) in codes.iter().cycle().zip(got) {
                let want = value(of.0, *code);
                if got != want && !(got.is_nan() && want.is_nan()) {
                    bail!("{of:?} {dtype:?} {code:#x} of {m} is {got}, wanted {want}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn w8_shapes() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let target = match std::env::var("KAIO_ARCH").as_deref() {
        Ok("sm_80" | "sm_89") => Target::Sm80,
        _ => Target::Sm90a,
    };
    let shared_per_block = if target == Target::Sm90a { 232_448 } else { 101_376 };
    let device = kernel::Device { target, multiprocessors: 132, shared_per_block };
    let mut state = 1u32;
    let mut next = move |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % below
    };
    let mut shapes = std::collections::HashSet::new();
    for (i, of @ (kind, group)) in SCHEMES.into_iter().enumerate() {
        for (j, m) in [1, 3, 8, 16, 40, 70, 200].into_iter().enumerate() {
            let [k, n]: [usize; 2] = match (group, j) {
                // A warp of four has more pairs of blocks than lanes, which hold a scale each.
                (Some(_), 0) => [17_100, 64],
                _ => [[1100, 200], [136, 67], [4800, 136], [64, 64]][(i + j) % 4],
            };
            let code = |bits: u32| match kind {
                Codes::Int8 => bits as u8,
                // ±0.5 to ±3.75.
                _ => (0x30 + bits % 24) as u8 | (bits & 0x80) as u8,
            };
            let codes: Vec<u8> = (0..n * k).map(|_| code(next(256))).collect();
            let [rows, cols] = match group {
                Some(_) => [k.div_ceil(128), n.div_ceil(128)],
                None => [1, n],
            };
            let scales: Vec<f32> =
                (0..rows * cols).map(|_| [0.5, 1.0, 2.0][next(3) as usize]).collect();
            let x: Vec<f32> = (0..m * k).map(|_| next(7) as f32 - 3.0).collect();
            let of_scales = Tensor::from_slice(&scales, (rows, cols), &gpu)?;
            let w = weight(of, [k, n], &codes, of_scales, &gpu)?;
            let scale = |row: usize, col: usize| match group {
                Some(_) => scales[row / 128 * cols + col / 128],
                None => scales[col],
            };
            let sum = |(token, col): (usize, usize)| {
                let term = |row: usize| {
                    x[token * k + row] * value(kind, codes[col * k + row]) * scale(row, col)
                };
                (0..k).map(|row| f64::from(term(row))).sum::<f64>() as f32
            };
            let places = || (0..m).flat_map(|token| (0..n).map(move |col| (token, col)));
            let want: Vec<f32> = places().map(sum).collect();
            let half = [Half::F16, Half::Bf16][(i + j) % 2];
            let dtype = if half == Half::F16 { DType::F16 } else { DType::BF16 };
            let on_gpu =
                Tensor::from_slice(&x, (m, k), &Device::Cpu)?.to_dtype(dtype)?.to_device(&gpu)?;
            let [m64, n64, k64] = [m, n, k].map(|size| size as u64);
            let epilogue = Epilogue::round(Element::F32);
            let (scheme, options) = (w.scheme, MatmulOptions::default().out_dtype(DType::F32));
            let problem = w4::Problem {
                m: m64,
                n: n64,
                others: [0; 2],
                gated: false,
                k: k64,
                half,
                scheme,
                epilogue,
            };
            for (number, config) in w4::candidates(&problem, &device).into_iter().enumerate() {
                // A quarter of those for more rows for each case, other ones each time.
                if m as u64 > stream::MOST && (number + i + j) % 4 != 0 {
                    continue;
                }
                let got = tune::w4_matmul(&on_gpu, &w, &options, Some(config))?;
                let got = got.flatten_all()?.to_vec1::<f32>()?;
                for ((place, got), want) in places().zip(got).zip(&want) {
                    if got != *want {
                        bail!("{} {place:?} is {got}, wanted {want}", config.name());
                    }
                }
                shapes.insert(config.name());
            }
        }
    }
    assert!(shapes.len() > 60, "{} shapes", shapes.len());
    Ok(())
}
