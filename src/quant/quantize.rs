//! Floats to codes and scales: on the host, as the kernels do it on a GPU.

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;

use super::planes::{Planes, groups};
use super::scheme::{NF4, QuantScheme};
use crate::check::{self, Arg};
use crate::cuda;
use crate::error::Error;

/// The largest float of e4m3.
pub(crate) const E4M3_MAX: f32 = 448.0;

/// Columns that a thread takes at a time.
const STRIP: usize = 1 << 10;

/// The plain form, on the weight's device.
pub(super) fn quantize(op: &'static str, weight: Arg, scheme: QuantScheme) -> Result<Planes> {
    scheme.check(op)?;
    let dtype = weight.1.dtype();
    check::dtype(op, weight, &[DType::F32, DType::F16, DType::BF16])?;
    check::rank(op, weight, 2..=2, "[K, N]", "quantise one matrix at a time")?;
    check::tensor(op, weight)?;
    check::untracked(op, &[weight])?;
    let (k, n) = weight.1.dims2()?;
    let device = weight.1.device();
    let dims = [k, n];
    if device.is_cuda() && k * n > 0 {
        if !cuda::peak(op, weight.1)?.is_finite() {
            // That says where.
            host(op, weight)?;
        }
        return cuda::encode(op, weight.1, scheme);
    }
    check::copies(op, &[weight])?;
    // A range of each group: of two numbers.
    check::memory(op, "the scales", &groups(scheme, dims), DType::F64)?;
    let values = host(op, weight)?;
    // Scales of checkpoints: those of groups of four bits are as many as to weigh something.
    let scale_dtype = if scheme.is_4bit() { dtype } else { DType::F32 };
    let group = scheme.group(dims);
    let steps = Steps::new(scheme, scale_dtype, &values, dims);
    let codes = match scheme {
        QuantScheme::Int4 { .. } | QuantScheme::Nf4 { .. } => Tensor::from_vec(
            words(scheme, &values, dims, &steps),
            (k.div_ceil(8), n),
            &Device::Cpu,
        )?,
        QuantScheme::Int8 { .. } => {
            let byte = |w: f32, s: f32| (w / s).round_ties_even().clamp(-127.0, 127.0) as i8 as u8;
            Tensor::from_vec(each(&values, n, &steps, group, byte), (k, n), &Device::Cpu)?
        }
        QuantScheme::Fp8 { .. } => {
            let scaled = each(&values, n, &steps, group, |w, s| w / s);
            Tensor::from_vec(scaled, (k, n), &Device::Cpu)?.to_dtype(DType::F8E4M3)?
        }
    };
    let [rows, cols] = groups(scheme, dims);
    let scales =
        Tensor::from_vec(steps.scales, (rows, cols), &Device::Cpu)?.to_dtype(scale_dtype)?;
    let zeros =
        steps.zeros.map(|zeros| Tensor::from_vec(zeros, (rows, cols), &Device::Cpu)).transpose()?;
    Planes { scheme, dims, codes, scales, zeros, order: None, far: false }.to_device(device)
}

/// All elements in f32, row-major, if they are finite.
fn host(op: &'static str, (name, t): Arg) -> Result<Vec<f32>> {
    if t.elem_count() == 0 {
        return Ok(Vec::new());
    }
    let values =
        t.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    match values.par_iter().position_first(|x| !x.is_finite()) {
        None => Ok(values),
        Some(i) => {
            let n = t.dims()[1];
            let (got, want) = (format!("{} at [{}, {}]", values[i], i / n, i % n), "finite".into());
            Err(Error::Value { op, name, got, want, fix: "check how it was computed" }.into())
        }
    }
}

/// Scales and zero points of all groups, row-major, the scales rounded to their dtype.
struct Steps {
    scales: Vec<f32>,
    zeros: Option<Vec<u8>>,
    /// Groups side by side.
    cols: usize,
}

impl Steps {
    fn new(scheme: QuantScheme, dtype: DType, values: &[f32], dims: [usize; 2]) -> Self {
        let [rows, cols] = groups(scheme, dims);
        let mut ranges = ranges(values, dims[1], rows * cols, scheme.group(dims));
        // Of what is empty.
        ranges.resize(rows * cols, [0.0; 2]);
        let scale = |&[low, high]: &[f32; 2]| {
            let peak = high.max(-low);
            let exact = match scheme {
                QuantScheme::Int4 { zero_points: true, .. } => high / 15.0 - low / 15.0,
                QuantScheme::Int4 { .. } => peak / 7.0,
                QuantScheme::Nf4 { .. } => peak,
                QuantScheme::Int8 { .. } => peak / 127.0,
                QuantScheme::Fp8 { .. } => peak / E4M3_MAX,
            };
            // A group of zeros has any scale but 0, by which its elements are divided.
            if peak == 0.0 { 1.0 } else { round_up(dtype, exact) }
        };
        let scales: Vec<_> = ranges.iter().map(scale).collect();
        let zeros = matches!(scheme, QuantScheme::Int4 { zero_points: true, .. }).then(|| {
            let zero = |(&[low, _], s): (&[f32; 2], &f32)| (-low / s).round_ties_even().min(15.0);
            ranges.iter().zip(&scales).map(|pair| zero(pair) as u8).collect()
        });
        Self { scales, zeros, cols }
    }
}

/// The least number of a dtype from `scale` on: no element is further from the middle than the codes reach, and each
/// is within half a step of its code.
pub(crate) fn round_up(dtype: DType, scale: f32) -> f32 {
    match dtype {
        DType::F16 => match f16::from_f32(scale) {
            x if x.to_f32() < scale => f16::from_bits(x.to_bits() + 1).to_f32(),
            x => x.to_f32(),
        },
        DType::BF16 => match bf16::from_f32(scale) {
            x if x.to_f32() < scale => bf16::from_bits(x.to_bits() + 1).to_f32(),
            x => x.to_f32(),
        },
        // Those below have few digits.
        _ => scale.max(f32::MIN_POSITIVE),
    }
}

/// The least element, at most 0, and the largest, at least 0, of each of `count` groups.
fn ranges(values: &[f32], n: usize, count: usize, [gk, gn]: [usize; 2]) -> Vec<[f32; 2]> {
    if values.is_empty() {
        return Vec::new();
    }
    let cols = n.div_ceil(gn);
    let mut lines = vec![[0f32; 2]; count / cols * n];
    let widen = |range: &mut [f32; 2], low: f32, high: f32| {
        *range = [range[0].min(low), range[1].max(high)];
    };
    lines.par_chunks_mut(n).zip(values.par_chunks(gk * n)).for_each(|(line, values)| {
        line.par_chunks_mut(STRIP).enumerate().for_each(|(i, line)| {
            for row in values.chunks(n) {
                let row = &row[i * STRIP..][..line.len()];
                line.iter_mut().zip(row).for_each(|(range, &w)| widen(range, w, w));
            }
        });
    });
    if gn == 1 {
        return lines;
    }
    let whole = |group: &[[f32; 2]]| {
        let mut all = [0.0; 2];
        group.iter().for_each(|&[low, high]| widen(&mut all, low, high));
        all
    };
    lines.chunks(n).flat_map(|line| line.chunks(gn).map(whole)).collect()
}

/// A code for each element and its scale.
fn each<T: Copy + Default + Send>(
    values: &[f32],
    n: usize,
    steps: &Steps,
    [gk, gn]: [usize; 2],
    code: impl Fn(f32, f32) -> T + Sync,
) -> Vec<T> {
    let mut codes = vec![T::default(); values.len()];
    if values.is_empty() {
        return codes;
    }
    codes.par_chunks_mut(n).zip(values.par_chunks(n)).enumerate().for_each(|(k, (codes, row))| {
        let scales = &steps.scales[k / gk * steps.cols..][..steps.cols];
        for ((codes, row), &s) in codes.chunks_mut(gn).zip(row.chunks(gn)).zip(scales) {
            codes.iter_mut().zip(row).for_each(|(out, &w)| *out = code(w, s));
        }
    });
    codes
}

/// Eight codes of four bits a word.
fn words(scheme: QuantScheme, values: &[f32], [k, n]: [usize; 2], steps: &Steps) -> Vec<u32> {
    let mut words = vec![0u32; k.div_ceil(8) * n];
    if words.is_empty() {
        return words;
    }
    let height = scheme.group([k, n])[0];
    words.par_chunks_mut(n).enumerate().for_each(|(i, words)| {
        for place in 0..8 {
            let row = 8 * i + place;
            let put = |word: &mut u32, code: u8| *word |= u32::from(code) << (4 * place);
            let Some(values) = values.chunks(n).nth(row).filter(|_| row < k) else {
                words.iter_mut().for_each(|word| put(word, scheme.zero_code()));
                continue;
            };
            let scales = &steps.scales[row / height * n..][..n];
            let zeros = steps.zeros.as_ref().map(|zeros| &zeros[row / height * n..][..n]);
            for (j, word) in words.iter_mut().enumerate() {
                let x = values[j] / scales[j];
                let zero = zeros.map_or(8.0, |zeros| f32::from(zeros[j]));
                put(
                    word,
                    match scheme {
                        QuantScheme::Nf4 { .. } => nf4(x),
                        _ => (x.round_ties_even() + zero).clamp(0.0, 15.0) as u8,
                    },
                );
            }
        }
    });
    words
}

/// The code whose value is nearest.
fn nf4(x: f32) -> u8 {
    NF4.windows(2).map(|pair| u8::from(x > 0.5 * (pair[0] + pair[1]))).sum()
}
