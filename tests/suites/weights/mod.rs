//! Tables of quantised weights: their products, gradients, quantisers and files.

mod eight_bits;
mod files;
mod gradients;
mod products;
mod quantisers;

pub use eight_bits::{activations, fp8, int8};
pub use files::{bad_files, files};
pub use gradients::{gradients, transposed};
pub use products::{dequantized, deterministic, explained, extreme_scales, products, projections};
pub use quantisers::{quantisers, random, refusals};

use std::collections::HashMap;

use candle_core::{DType, Device, Result, Tensor, bail};
use kaio_candle::prelude::*;

use super::Layout::Plain;
use super::{NF4, Nd, Source, round};

const fn int4(group: i32, zero_points: bool) -> QuantScheme {
    QuantScheme::Int4 { group, zero_points }
}

pub const SCHEMES: [QuantScheme; 16] = [
    int4(-1, false),
    int4(32, false),
    int4(64, false),
    int4(128, false),
    int4(-1, true),
    int4(32, true),
    int4(64, true),
    int4(128, true),
    QuantScheme::Nf4 { block: 32 },
    QuantScheme::Nf4 { block: 64 },
    QuantScheme::Nf4 { block: 128 },
    QuantScheme::Int8 { per: Per::Tensor },
    QuantScheme::Int8 { per: Per::Channel },
    QuantScheme::Fp8 { per: Per::Tensor },
    QuantScheme::Fp8 { per: Per::Channel },
    QuantScheme::Fp8 { per: Per::Block },
];

/// The nearest of e4m3, ties to even codes.
fn e4m3(x: f64) -> f64 {
    let exponent = x.abs().max(1e-300).log2().floor().max(-6.0);
    let step = 2f64.powf(exponent - 3.0);
    ((x / step).round_ties_even() * step).clamp(-448.0, 448.0)
}

/// Rows and columns that share a scale.
fn group(scheme: QuantScheme, [k, n]: [usize; 2]) -> [usize; 2] {
    match scheme {
        QuantScheme::Int4 { group: -1, .. } => [k, 1],
        QuantScheme::Int4 { group, .. } => [group as usize, 1],
        QuantScheme::Nf4 { block } => [block, 1],
        QuantScheme::Int8 { per: Per::Tensor } | QuantScheme::Fp8 { per: Per::Tensor } => [k, n],
        QuantScheme::Int8 { per: Per::Channel } | QuantScheme::Fp8 { per: Per::Channel } => [k, 1],
        _ => [128, 128],
    }
}

/// Rows and columns of scales.
fn scales_of(scheme: QuantScheme, dims: [usize; 2]) -> [usize; 2] {
    let [gk, gn] = group(scheme, dims);
    // What spans a side has one, even if that is empty.
    let count = |len: usize, each: usize| if each == len { 1 } else { len.div_ceil(each) };
    let whole = matches!(scheme, QuantScheme::Int4 { group: 32.., .. } | QuantScheme::Nf4 { .. });
    let rows = if whole { dims[0].div_ceil(gk) } else { count(dims[0], gk) };
    [rows, if gn == 1 { dims[1] } else { count(dims[1], gn) }]
}

/// What is written into a file beside the tensors.
fn format(scheme: QuantScheme, [k, n]: [usize; 2]) -> Result<Tensor> {
    let per = |per: Per| format!("{per:?}").to_lowercase();
    let scheme = match scheme {
        QuantScheme::Int4 { group, zero_points } => {
            format!("int4 group={group} zero_points={zero_points}")
        }
        QuantScheme::Nf4 { block } => format!("nf4 block={block}"),
        QuantScheme::Int8 { per: of } => format!("int8 per={}", per(of)),
        QuantScheme::Fp8 { per: of } => format!("fp8 per={}", per(of)),
        _ => bail!("another scheme"),
    };
    Tensor::new(format!("{scheme} k={k} n={n}").as_bytes(), &Device::Cpu)
}

/// The tensors of a weight of random codes and scales, perhaps with its rows out of order, on the CPU.
fn tensors(
    source: &mut Source,
    scheme: QuantScheme,
    dims: [usize; 2],
    scale: DType,
    order: bool,
) -> Result<HashMap<String, Tensor>> {
    let [k, n] = dims;
    let nibbles = matches!(scheme, QuantScheme::Int4 { .. } | QuantScheme::Nf4 { .. });
    let codes = match scheme {
        QuantScheme::Fp8 { .. } => {
            let finite = |s: &mut Source| {
                let magnitude = [0.0, 2f64.powi(-9), 448.0, 1.0, 0.0625][s.bits() as usize % 5];
                e4m3(if s.bits().is_multiple_of(4) { magnitude } else { 8.0 * s.unit() })
            };
            source
                .tensor_of(DType::F32, &dims, Plain, finite)?
                .to_device(&Device::Cpu)?
                .to_dtype(DType::F8E4M3)?
        }
        _ if nibbles => source.tensor(DType::U32, &[k.div_ceil(8), n], Plain)?,
        _ => source.tensor(DType::U8, &dims, Plain)?,
    };
    let groups = scales_of(scheme, dims);
    let unlike = |s: &mut Source| (0.5 + 0.5 * s.unit().abs()) * [0.1, -0.1][s.bits() as usize % 2];
    let mut all = vec![
        ("codes", codes),
        ("scales", source.tensor_of(scale, &groups, Plain, unlike)?),
        ("format", format(scheme, dims)?),
    ];
    if matches!(scheme, QuantScheme::Int4 { zero_points: true, .. }) {
        let zero = |s: &mut Source| (s.bits() % 17) as f64;
        all.push(("zeros", source.tensor_of(DType::U8, &groups, Plain, zero)?));
    }
    if order {
        let mut rows: Vec<u32> = (0..k as u32).collect();
        (1..k).for_each(|i| rows.swap(i, source.bits() as usize % (i + 1)));
        all.push(("order", Tensor::new(rows, &Device::Cpu)?));
    }
    all.into_iter().map(|(name, t)| Ok((name.into(), t.to_device(&Device::Cpu)?))).collect()
}

/// A weight of them on the source's device.
fn weight(
    source: &mut Source,
    device: &Device,
    scheme: QuantScheme,
    dims: [usize; 2],
    scale: DType,
    order: bool,
) -> Result<QuantWeight> {
    QuantWeight::from_tensors("", &tensors(source, scheme, dims, scale, order)?)?.to_device(device)
}

/// The weight that tensors stand for, by the formula.
fn decoded(tensors: &HashMap<String, Tensor>, scheme: QuantScheme, dims: [usize; 2]) -> Result<Nd> {
    let [k, n] = dims;
    let [gk, gn] = group(scheme, dims).map(|len| len.max(1));
    let of = |name: &str| tensors.get(name).map(Nd::of).transpose();
    let (Some(codes), Some(scales)) = (of("codes")?, of("scales")?) else { bail!("no codes") };
    let (zeros, order) = (of("zeros")?, of("order")?);
    let mut weight = Nd::full(&[k, n], 0.0);
    for (i, j) in (0..k).flat_map(|i| (0..n).map(move |j| (i, j))) {
        let at = i / gk * scales.dims[1] + j / gn;
        let nibble = |i: usize| (codes.data[i / 8 * n + j] as u32 >> (4 * (i % 8))) & 15;
        let value = match scheme {
            QuantScheme::Int4 { .. } => {
                f64::from(nibble(i)) - zeros.as_ref().map_or(8.0, |zeros| zeros.data[at])
            }
            QuantScheme::Nf4 { .. } => f64::from(NF4[nibble(i) as usize] as f32),
            QuantScheme::Int8 { .. } => f64::from(codes.data[i * n + j] as u8 as i8),
            _ => codes.data[i * n + j],
        };
        let row = order.as_ref().map_or(i, |order| order.data[i] as usize);
        weight.data[row * n + j] = scales.data[at] * value;
    }
    Ok(weight)
}

/// The weight of a `QuantWeight`.
fn value_of(weight: &QuantWeight) -> Result<Nd> {
    decoded(&weight.to_tensors("")?, weight.scheme(), weight.dims2().into())
}

/// A weight in the dtype in which the plain formula multiplies it: tensor cores take that of the activations, the CPU path
/// f32.
fn as_multiplied(device: &Device, dtype: DType, weight: &Nd) -> Nd {
    let dtype = if device.is_cpu() { DType::F32 } else { dtype };
    weight.map(|x| round(dtype, x))
}
