//! Products of int8 and e4m3 codes with scales of lines, and activations rounded to them.

use std::collections::HashSet;

use candle_core::{DType, Device, Result, Tensor, bail};
use kaio_candle::kernel::gemm::{Epilogue, Major, Problem, Scale, choose, sm90};
use kaio_candle::kernel::{self, Config, Element};
use kaio_candle::ptx::{Factor, Half, Target};
use kaio_candle::tune;

use super::gpu;
use super::suites::Tally;

/// Numbers in -1..1 that look random.
fn noise(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    }
}

/// Random codes on a device, and their values.
fn codes(
    seed: u64,
    [rows, cols]: [usize; 2],
    int8: bool,
    device: &Device,
) -> Result<(Tensor, Vec<f64>)> {
    let mut noise = noise(seed);
    let values: Vec<f32> = (0..rows * cols).map(|_| noise()).collect();
    if int8 {
        let bytes: Vec<i8> = values.iter().map(|x| (x * 127.9) as i8).collect();
        let values = bytes.iter().map(|&x| f64::from(x)).collect();
        let bytes: Vec<u8> = bytes.iter().map(|&x| x as u8).collect();
        return Ok((Tensor::from_vec(bytes, (rows, cols), device)?, values));
    }
    let codes = Tensor::from_vec(values, (rows, cols), &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
    // By way of f32: candle's cast of e4m3 to f64 never ends (0.11.1, CPU).
    let values = codes.to_dtype(DType::F32)?.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?;
    Ok((codes.to_device(device)?, values))
}

/// Whether there are kernels for e4m3 with scales of blocks.
fn takes_blocks(device: &Device) -> bool {
    let one = |dtype| Tensor::zeros((1, 16), DType::F32, &Device::Cpu)?.to_dtype(dtype);
    let code = one(DType::F8E4M3).and_then(|x| x.to_device(device)).unwrap();
    let scale = Tensor::ones((1, 1), DType::F32, device).unwrap();
    tune::matmul_bytes([&code, &code], [&scale, &scale], false, None).is_ok()
}

/// A product with scales of lines by a configuration, or by the chooser's, is what it should be, but for `lost` of the
/// magnitude of its terms.
fn with_lines(
    seed: u64,
    [m, n, k]: [usize; 3],
    int8: bool,
    lost: f64,
    config: Option<Config>,
    device: &Device,
) -> Result<()> {
    let (a, x) = codes(seed, [m, k], int8, device)?;
    let (b, w) = codes(seed + 100, [n, k], int8, device)?;
    let mut noise = noise(seed + 200);
    let mut scales = |len: usize| (0..len).map(|_| 1.5 + noise()).collect::<Vec<_>>();
    let (rows, cols) = (scales(m), scales(n));
    let on_gpu = |scales: &[f32]| Tensor::new(scales, device);
    let scales = [&on_gpu(&rows)?, &on_gpu(&cols)?];
    let (got, _) = tune::matmul_bytes([&a, &b], scales, int8, config)?;
    let got = got.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let terms = (0..k).map(|t| x[i * k + t] * w[j * k + t]);
        let scale = f64::from(rows[i]) * f64::from(cols[j]);
        let sum = terms.clone().sum::<f64>() * scale;
        let size = terms.map(f64::abs).sum::<f64>() * scale;
        // Rounded to bf16, and once or twice to f32 before.
        let allowed = sum.abs() * (2f64.powi(-8) + 2f64.powi(-22)) + size * lost;
        let error = (f64::from(got[i][j]) - sum).abs();
        if error.is_nan() || error > allowed {
            bail!("({i}, {j}) is {}, wanted {sum}", got[i][j]);
        }
    }
    Ok(())
}

/// Each kernel shape: few rows, few columns, tiles that end inside of the matrices, depths that are no multiple of
/// anything.
#[test]
fn bytes_products() {
    let Some(device) = gpu() else { return };
    let mut tally = Tally::new("products of bytes", &device);
    let sizes = [
        [1, 8, 16],
        [3, 7, 33],
        [16, 256, 300],
        [64, 100, 128],
        [65, 64, 300],
        [100, 200, 130],
        [300, 24, 129],
        [7, 136, 1100],
    ];
    for int8 in [true, false] {
        for (seed, [m, n, k]) in (1..).zip(sizes) {
            tally.case(format!("{m}×{n}×{k}, int8: {int8}"), || {
                // Tensor cores keep some 13 bits of a sum of e4m3. Sums of int8 are exact.
                let lost = if int8 { 0.0 } else { 2f64.powi(-10) };
                with_lines(seed, [m, n, k], int8, lost, None, &device)
            });
        }
    }
    tally.finish();
}

/// Hopper's for products of e4m3.
fn candidates(size: [usize; 3], epilogue: Epilogue) -> Vec<sm90::Config> {
    let hopper =
        kernel::Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };
    let ([m, n, k], (lhs, rhs)) = (size.map(|size| size as u64), (Major::K, Major::K));
    let problem = Problem { m, n, k, batch: 1, elements: [Factor::E4m3; 2], lhs, rhs, epilogue };
    choose::candidates(&problem, &hopper)
}

/// Sums of e4m3 that are added up in f32 every 128 terms lose no more of a long sum than of a short one.
#[test]
fn bytes_promoted() -> Result<()> {
    let Some(device) = gpu() else { return Ok(()) };
    let mut tally = Tally::new("products of bytes with promoted sums", &device);
    if !takes_blocks(&device) {
        tally.inapplicable("this GPU has no kernels that promote sums");
        return Ok(());
    }
    for (seed, [m, n, k]) in (1..).zip([[16, 256, 4096], [65, 100, 1100], [330, 264, 300]]) {
        let epilogue =
            Epilogue { scale: Scale::Lines, ..Epilogue::round(Element::Half(Half::Bf16)) };
        let mut shapes = HashSet::new();
        for config in candidates([m, n, k], epilogue) {
            if !shapes.insert((config.orient, config.rows, config.cols)) {
                continue;
            }
            tally.case(format!("{m}×{n}×{k} {}", config.name()), || {
                let lost = 2f64.powi(-11);
                with_lines(seed, [m, n, k], false, lost, Some(config.into()), &device)
            });
        }
        assert!(!shapes.is_empty(), "{m}×{n}×{k}");
    }
    tally.finish();
    Ok(())
}

/// A product with scales of blocks that differ by orders of magnitude, by a configuration or by the chooser's, is what it
/// should be.
fn with_blocks(
    seed: u64,
    [m, n, k]: [usize; 3],
    config: Option<Config>,
    device: &Device,
) -> Result<()> {
    let (a, x) = codes(seed, [m, k], false, device)?;
    let (b, w) = codes(seed + 100, [n, k], false, device)?;
    let mut noise = noise(seed + 200);
    let [depth, blocks] = [k, n].map(|len: usize| len.div_ceil(128));
    let mut scales = |len: usize| (0..len).map(|_| (8.0 * noise()).exp2()).collect::<Vec<_>>();
    let (of_x, of_w) = (scales(m * depth), scales(depth * blocks));
    let rows = Tensor::from_slice(&of_x, (m, depth), device)?;
    let cols = Tensor::from_slice(&of_w, (depth, blocks), device)?;
    let (got, _) = tune::matmul_bytes([&a, &b], [&rows, &cols], false, config)?;
    let got = got.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    for (i, j) in (0..m).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let terms = (0..k).map(|t| {
            let scale = of_x[i * depth + t / 128] * of_w[t / 128 * blocks + j / 128];
            x[i * k + t] * w[j * k + t] * f64::from(scale)
        });
        let sum = terms.clone().sum::<f64>();
        let size = terms.map(f64::abs).sum::<f64>();
        let allowed = sum.abs() * 2f64.powi(-8) + size * 2f64.powi(-11);
        let error = (f64::from(got[i][j]) - sum).abs();
        if error.is_nan() || error > allowed {
            bail!("({i}, {j}) is {}, wanted {sum}", got[i][j]);
        }
    }
    Ok(())
}

/// Each stage's sums are multiplied with scales of their own.
#[test]
fn bytes_blocks() {
    let Some(device) = gpu() else { return };
    let mut tally = Tally::new("products of blocks", &device);
    if !takes_blocks(&device) {
        return tally.inapplicable("this GPU has no products with scales of blocks");
    }
    let sizes = [[1, 8, 16], [16, 256, 300], [33, 100, 128], [65, 264, 400], [300, 130, 129]];
    for (seed, [m, n, k]) in (1..).zip(sizes) {
        tally.case(format!("{m}×{n}×{k}"), || with_blocks(seed, [m, n, k], None, &device));
    }
    // Depths of several turns of the lanes that hold scales, whole and not.
    for (seed, [m, n, k]) in (7..).zip([[20, 300, 2300], [300, 264, 1024], [40, 200, 4200]]) {
        let epilogue =
            Epilogue { scale: Scale::Blocks, ..Epilogue::round(Element::Half(Half::Bf16)) };
        let mut shapes = HashSet::new();
        for config in candidates([m, n, k], epilogue) {
            if shapes.insert((config.orient, config.rows, config.cols, config.split > 1)) {
                tally.case(format!("{m}×{n}×{k} {}", config.name()), || {
                    with_blocks(seed, [m, n, k], Some(config.into()), &device)
                });
            }
        }
        assert!(!shapes.is_empty(), "{m}×{n}×{k}");
    }
    tally.finish();
}

/// No element is further from its code's value than from another's, by more than rounding.
#[test]
fn bytes_quantized() {
    let Some(device) = gpu() else { return };
    let mut tally = Tally::new("activations rounded to bytes", &device);
    let shapes = [
        (1, 8, 8),
        (5, 64, 128),
        (3, 136, 128),
        (3, 7, 7),
        (2, 301, 128),
        (4, 1000, 1000),
        (2, 4096, 128),
        (2, 9000, 9000),
        // Longer than what registers hold.
        (2, 70_001, 70_001),
    ];
    for code in [DType::U8, DType::F8E4M3] {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (seed, (rows, cols, width)) in (1..).zip(shapes) {
                tally.case(format!("{rows}×{cols} by {width}, {dtype:?} to {code:?}"), || {
                    rounds(&device, seed, (rows, cols, width), dtype, code)
                });
            }
        }
    }
    tally.finish();
}

fn rounds(
    device: &Device,
    seed: u64,
    (rows, cols, width): (usize, usize, usize),
    dtype: DType,
    code: DType,
) -> Result<()> {
    let mut noise = noise(seed);
    let mut x: Vec<f32> = (0..rows * cols).map(|_| noise() * 30.0).collect();
    if rows > 1 {
        // A row of zeros, and a number that is none at the end of the last one.
        x[..cols].fill(0.0);
        x[rows * cols - 1] = f32::NAN;
    }
    let x = Tensor::from_vec(x, (rows, cols), &Device::Cpu)?.to_dtype(dtype)?;
    let [codes, scales] = tune::quantize_rows(&x.to_device(device)?, code, width)?;
    let cpu = Device::Cpu;
    let codes = codes.to_device(&cpu)?;
    let values: Vec<f32> = match code {
        DType::U8 => {
            let bytes = codes.flatten_all()?.to_vec1::<u8>()?;
            bytes.into_iter().map(|x| f32::from(x as i8)).collect()
        }
        _ => codes.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?,
    };
    let every: Vec<f32> = match code {
        DType::U8 => (-127..=127).map(|x| x as f32).collect(),
        _ => {
            let all = (0..=255u8).map(float8).filter(|x| x.is_finite());
            all.collect()
        }
    };
    let most = if code == DType::U8 { 127.0 } else { 448.0 };
    let scales = scales.to_vec2::<f32>()?;
    let x = x.to_dtype(DType::F32)?.to_vec2::<f32>()?;
    for (i, row) in x.iter().enumerate() {
        for (g, group) in row.chunks(width).enumerate() {
            let peak = group
                .iter()
                .fold(0f32, |peak, x| if x.abs() > peak || x.is_nan() { x.abs() } else { peak });
            let scale = scales[i][g];
            let wanted = if peak == 0.0 { 1.0 } else { peak / most };
            if scale.is_nan() != wanted.is_nan() || (scale - wanted).abs() > wanted * 1e-6 {
                bail!("row {i}, group {g}: the scale is {scale}, wanted {wanted}");
            }
            if scale.is_nan() {
                continue;
            }
            for (j, &x) in group.iter().enumerate() {
                let at = g * width + j;
                let far = |code: f32| (code * scale - x).abs();
                let nearest = every.iter().map(|&code| far(code)).fold(f32::INFINITY, f32::min);
                let error = far(values[i * cols + at]);
                if error.is_nan() || error > nearest + x.abs() * 1e-6 {
                    bail!("({i}, {at}) is off by {error}, the nearest code by {nearest}");
                }
            }
        }
    }
    Ok(())
}

/// The value of a code of e4m3.
fn float8(bits: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => mantissa * 2f32.powi(-9),
        _ => (8.0 + mantissa) * 2f32.powi(exponent - 10),
    };
    if bits >> 7 == 1 { -magnitude } else { magnitude }
}
