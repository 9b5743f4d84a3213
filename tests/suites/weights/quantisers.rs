//! From floats to codes.

use candle_core::{DType, Device, Result, Tensor, bail};
use kaio_candle::Error;
use kaio_candle::prelude::*;

use proptest::prelude::*;

use super::{NF4, SCHEMES, as_multiplied, e4m3, group, value_of};
use crate::suites::Layout::*;
use crate::suites::{
    Nd, Source, Tally, close, identical, pairs, product_within, property, random_cases, ulp,
};

/// How elements are made.
type Element = fn(&mut Source) -> f64;

const KINDS: [(&str, Element); 6] = [
    ("unit", Source::unit),
    ("positive", |s| 2.0 + s.unit()),
    ("negative", |s| s.unit() - 1.5),
    ("zeros", |_| 0.0),
    ("constant", |_| -0.75),
    ("tiny", |s| 1e-6 * s.unit()),
];

/// Round trips to half a step, or to the nearest code.
pub fn quantisers(device: &Device) {
    let mut tally = Tally::new("quantisers of weights", device);
    let dtypes = [DType::F32, DType::F16, DType::BF16];
    for (scheme, (dtype, (kind, element))) in pairs(SCHEMES, pairs(dtypes, KINDS)) {
        for (dims, layout) in
            [([1, 1], Plain), ([129, 130], Plain), ([40, 3], Transposed), ([64, 9], Columns)]
        {
            let case = format!("{scheme:?} {dtype:?} {kind} {dims:?} {layout:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let weight = source.tensor_of(dtype, &dims, layout, element)?;
                let before = Nd::of(&weight)?;
                let w = QuantWeight::quantize(&weight, &scheme)?;
                if w.scheme() != scheme || !w.device().same_device(device) {
                    bail!("{w:?}");
                }
                check(&w, &before)?;
                as_on_a_cpu(&w, &weight)?;
                identical("weight", &weight, &before)
            });
        }
    }
    for (scheme, dims) in pairs(SCHEMES, [[0, 4], [9, 0], [0, 0]]) {
        let case = format!("{scheme:?} {dims:?}");
        tally.case(&case, || {
            let weight = Source::new(&case, device).tensor(DType::F32, &dims, Plain)?;
            let w = QuantWeight::quantize(&weight, &scheme)?;
            close("back", &w.dequantize(DType::F32)?, &Nd::full(&dims, 0.0), |_| 0.0)
        });
    }
    tally.finish();
}

/// Any scheme, size, layout and magnitude: round trips as above, through the tensors of a file, and products with what the
/// codes stand for.
pub fn random(device: &Device) {
    let mut tally = Tally::new("random quantised weights", device);
    let dims = (1usize..300, 1usize..150).prop_map(|(k, n)| [k, n]);
    let layouts = prop::sample::select(vec![Plain, Transposed, Columns, Narrowed]);
    let schemes = prop::sample::select(SCHEMES.to_vec());
    let halves = prop::sample::select(vec![DType::F16, DType::BF16]);
    let problems = (schemes, dims, layouts, -6i32..7, 1usize..40, halves, any::<u32>());
    property(&mut tally, random_cases(device, 150, 300), problems, |problem| {
        let (scheme, dims, layout, exponent, m, dtype, seed) = problem;
        let source = &mut Source::new(&format!("{seed}"), device);
        let element = |s: &mut Source| s.unit() * 2f64.powi(exponent);
        let weight = source.tensor_of(DType::F32, &dims, layout, element)?;
        let w = QuantWeight::quantize(&weight, &scheme)?;
        check(&w, &Nd::of(&weight)?)?;
        as_on_a_cpu(&w, &weight)?;
        let tensors = w.to_tensors("layer.")?;
        let same = QuantWeight::from_tensors("layer.", &tensors)?.to_device(device)?;
        let value = value_of(&w)?;
        identical(
            "the same of a file",
            &same.dequantize(DType::F32)?,
            &Nd::of(&w.dequantize(DType::F32)?)?,
        )?;
        let x = source.tensor(dtype, &[m, dims[0]], Plain)?;
        let plain = as_multiplied(device, dtype, &value);
        let (want, allowed) = product_within(&Nd::of(&x)?, &value, &plain)?;
        let got = x.kaio_matmul_quant(&same)?;
        close("product", &got, &want, |i| allowed + ulp(dtype, want.data[i]))
    });
    tally.finish();
}

/// The same codes, scales and zero points wherever a weight is rounded.
fn as_on_a_cpu(w: &QuantWeight, weight: &Tensor) -> Result<()> {
    let there = QuantWeight::quantize(&weight.to_device(&Device::Cpu)?, &w.scheme())?;
    let got = w.to_tensors("")?;
    for (name, want) in there.to_tensors("")? {
        identical(&name, &got[&name], &Nd::of(&want)?)?;
    }
    Ok(())
}

fn check(w: &QuantWeight, before: &Nd) -> Result<()> {
    let (scheme, dims) = (w.scheme(), w.dims2().into());
    let scales = Nd::of(&w.to_tensors("")?["scales"])?;
    let [gk, gn] = group(scheme, dims);
    let step = |i: usize| scales.data[i / dims[1] / gk * scales.dims[1] + i % dims[1] / gn];
    let value = value_of(w)?;
    for (i, (&x, &got)) in before.data.iter().zip(&value.data).enumerate() {
        let (s, slack) = (step(i), 1.0 + 1e-5);
        let allowed = match scheme {
            QuantScheme::Int4 { .. } | QuantScheme::Int8 { .. } => 0.5 * s,
            QuantScheme::Nf4 { .. } => {
                NF4.iter().map(|q| (x - q * s).abs()).fold(f64::INFINITY, f64::min) + 1e-7 * s
            }
            _ => (x - s * e4m3(x / s)).abs() + 1e-6 * s,
        };
        if (x - got).abs() > allowed * slack {
            bail!("element {i}, {x:e}, became {got:e}, with a step of {s:e}");
        }
    }
    // No larger than has to be: the largest element of each group is at the end of the codes.
    let mut ranges = vec![[0f64; 2]; scales.data.len()];
    for (i, &x) in before.data.iter().enumerate() {
        let range = &mut ranges[i / dims[1] / gk * scales.dims[1] + i % dims[1] / gn];
        *range = [range[0].min(x), range[1].max(x)];
    }
    for (range, s) in ranges.iter().zip(&scales.data) {
        let peak = range[1].max(-range[0]);
        let exact = match scheme {
            QuantScheme::Int4 { zero_points: true, .. } => (range[1] - range[0]) / 15.0,
            QuantScheme::Int4 { .. } => peak / 7.0,
            QuantScheme::Nf4 { .. } => peak,
            QuantScheme::Int8 { .. } => peak / 127.0,
            _ => peak / 448.0,
        };
        // Up to one more of bf16, or of the least numbers of f16.
        let most = exact * (1.0 + 2f64.powi(-7)) + 2f64.powi(-24);
        if peak > 0.0 && !(exact * (1.0 - 1e-6)..=most).contains(s) {
            bail!("a scale is {s:e}, wanted {exact:e}");
        }
    }
    Ok(())
}

/// What cannot be quantised.
pub fn refusals(device: &Device) {
    let mut tally = Tally::new("refusals of quantisers", device);
    for (scheme, (bad, place)) in
        pairs(SCHEMES, pairs([f64::NAN, f64::INFINITY, f64::NEG_INFINITY], [0, 100, 511]))
    {
        tally.case(format!("{scheme:?} {bad} at {place}"), || {
            let mut weight = Nd::full(&[256, 2], 1.0);
            weight.data[place] = bad;
            let weight = weight.tensor(DType::F32)?.to_device(device)?;
            refused(
                QuantWeight::quantize(&weight, &scheme),
                &format!("at [{}, {}]", place / 2, place % 2),
            )
        });
    }
    let bad = [
        QuantScheme::Int4 { group: 0, zero_points: false },
        QuantScheme::Int4 { group: 100, zero_points: true },
        QuantScheme::Nf4 { block: 0 },
        QuantScheme::Int8 { per: Per::Block },
    ];
    for scheme in bad {
        tally.case(format!("{scheme:?}"), || {
            let weight = Nd::full(&[256, 2], 1.0).tensor(DType::F32)?.to_device(device)?;
            refused(QuantWeight::quantize(&weight, &scheme), "wanted")
        });
    }
    tally.finish();
}

fn refused(result: Result<QuantWeight>, text: &str) -> Result<()> {
    match result {
        Err(e)
            if matches!(Error::of(&e), Some(Error::Value { .. }))
                && e.to_string().contains(text) =>
        {
            Ok(())
        }
        other => bail!("gave {other:?}"),
    }
}
