//! Products of floats with quantised weights.

use candle_core::{DType, Device, Result, Tensor, bail};
use kaio_candle::prelude::*;

use super::{SCHEMES, as_multiplied, int4, tensors, value_of, weight};
use crate::suites::Layout::{self, *};
use crate::suites::{
    Nd, Source, Tally, close, identical, pairs, plain_product, product, product_within,
    results_alone, ulp,
};

const HALVES: [DType; 2] = [DType::F16, DType::BF16];
const SCALES: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

#[derive(Clone, Copy, Debug)]
struct Problem<'a> {
    rows: &'a [usize],
    k: usize,
    n: usize,
    x: Layout,
    dtype: DType,
    scheme: QuantScheme,
    scale: DType,
    order: bool,
}

const ROWS: [&[usize]; 4] = [&[1], &[2], &[17], &[70]];

/// Every scheme with every dtype, sizes around those of groups and words, layouts of x, rows out of order, empty
/// dimensions.
fn problems() -> Vec<Problem<'static>> {
    let base = Problem {
        rows: &[5],
        k: 160,
        n: 33,
        x: Plain,
        dtype: DType::BF16,
        scheme: SCHEMES[0],
        scale: DType::F16,
        order: false,
    };
    let mut all = Vec::new();
    for (scheme, dtype) in pairs(SCHEMES, HALVES) {
        let base = Problem { scheme, dtype, ..base };
        all.extend(SCALES.map(|scale| Problem { scale, ..base }));
        all.extend([1, 7, 8, 31, 130, 256].map(|k| Problem { k, ..base }));
        all.extend([1, 2, 4, 8, 64, 129].map(|n| Problem { n, ..base }));
        all.extend(ROWS.map(|rows| Problem { rows, ..base }));
        all.push(Problem { order: true, ..base });
        all.push(Problem { order: true, rows: &[1], k: 257, n: 300, ..base });
        all.push(Problem { rows: &[1], k: 300, n: 2100, scale: DType::F32, ..base });
        all.extend([[0, 160, 33], [5, 0, 33], [5, 160, 0]].map(|[m, k, n]| Problem {
            rows: if m == 0 { &[0] } else { &[5] },
            k,
            n,
            ..base
        }));
    }
    let rows: [&[usize]; 3] = [&[3, 5], &[2, 3, 4], &[1]];
    for (rows, (x, order)) in pairs(rows, pairs(Layout::ALL, [false, true])) {
        for scheme in [int4(32, true), QuantScheme::Fp8 { per: Per::Block }] {
            all.push(Problem { rows, x, order, scheme, ..base });
        }
    }
    all
}

pub fn products(device: &Device) {
    let mut tally = Tally::new("products with quantised weights", device);
    for p in problems() {
        let case = format!("{p:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let x = source.tensor(p.dtype, &[p.rows, &[p.k]].concat(), p.x)?;
            let w = weight(source, device, p.scheme, [p.k, p.n], p.scale, p.order)?;
            let before = Nd::of(&x)?;
            let value = value_of(&w)?;
            let plain = as_multiplied(device, p.dtype, &value);
            let (want, allowed) = product_within(&before, &value, &plain)?;
            let got = x.kaio_matmul_quant(&w)?;
            if got.dtype() != p.dtype {
                bail!("the result is {:?}", got.dtype());
            }
            close("result", &got, &want, |i| allowed + ulp(p.dtype, want.data[i]))?;
            if p.k == 0 && results_alone() {
                // A sum over nothing and a bias are candle's kernels.
                return Ok(());
            }
            let bias = source.tensor(DType::F32, &[p.n], Plain)?;
            let with_bias = added(&want, &Nd::of(&bias)?);
            let opts = MatmulOptions::default().bias(bias).out_dtype(DType::F32);
            let got = x.kaio_matmul_quant_with(&w, &opts)?;
            close("with bias", &got, &with_bias, |i| {
                allowed + 2.0 * ulp(DType::F32, with_bias.data[i])
            })?;
            let opts = opts.activation(Activation::Relu);
            let relu = with_bias.map(|x| x.max(0.0));
            let got = x.kaio_matmul_quant_with(&w, &opts)?;
            close("activated", &got, &relu, |i| {
                allowed + 2.0 * ulp(DType::F32, with_bias.data[i])
            })?;
            identical("x", &x, &before)
        });
    }
    tally.finish();
}

/// Scales near both ends of f32's range and of bf16's, which has the same, and just beyond what f16 has digits for, with x of
/// either kind.
pub fn extreme_scales(device: &Device) {
    let mut tally = Tally::new("extreme scales of weights", device);
    let of_x = pairs([DType::BF16], pairs([1e-30, 1e30], [1, 20, 300]));
    let of_f16 = pairs([DType::F16], pairs([1e-30, 1e-5, 1e5, 1e30], [1, 20, 300]));
    let problems: Vec<_> = of_x.into_iter().chain(of_f16).collect();
    for ((scheme, scale), (dtype, (factor, m))) in
        pairs(pairs(SCHEMES, [DType::BF16, DType::F32]), problems)
    {
        let case = format!("{scheme:?} {scale:?} {factor:e} {dtype:?} {m}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let mut all = tensors(source, scheme, [160, 72], DType::F32, false)?;
            let scales = all["scales"].affine(factor, 0.0)?.to_dtype(scale)?;
            all.insert("scales".into(), scales);
            let w = QuantWeight::from_tensors("", &all)?.to_device(device)?;
            let x = source.tensor(dtype, &[m, 160], Plain)?;
            let value = value_of(&w)?;
            // In the formula, the largest element is about 1: f16 has not the range of the scales.
            let one = 2f64.powf(value.peak().log2().floor());
            let plain = as_multiplied(device, dtype, &value.map(|x| x / one)).map(|x| x * one);
            let (want, allowed) = product_within(&Nd::of(&x)?, &value, &plain)?;
            let opts = MatmulOptions::default().out_dtype(DType::F32);
            let got = x.kaio_matmul_quant_with(&w, &opts)?;
            close("result", &got, &want, |i| allowed + ulp(DType::F32, want.data[i]))
        });
    }
    // Of which a few times as much is infinite, times sums of which some are 0.
    tally.case("int8, scales near the largest", || {
        let codes = Tensor::ones((64, 72), DType::U8, device)?;
        let scales = Tensor::full(1e37f32, 72, device)?;
        let w = QuantWeight::from_int8(&codes, &scales)?;
        for m in [1, 17, 300] {
            let rows = Tensor::from_iter((0..m).map(|row| (row % 3) as f32 * 1e-3), device)?;
            let x = rows.reshape((m, 1))?.to_dtype(DType::BF16)?.broadcast_as((m, 64))?;
            let x = x.contiguous()?;
            let got =
                x.kaio_matmul_quant_with(&w, &MatmulOptions::default().out_dtype(DType::F32))?;
            let data: Vec<_> =
                Nd::of(&x)?.data.chunks(64).flat_map(|x| [x[0] * 64.0; 72]).collect();
            let want = Nd { dims: vec![m, 72], data }.map(|x| x * f64::from(1e37f32));
            // Half a unit for each of 64 terms.
            close("result", &got, &want, |i| 32.0 * ulp(DType::F32, want.data[i]))?;
        }
        Ok(())
    });
    tally.finish();
}

/// The same bits each time.
pub fn deterministic(device: &Device) {
    let mut tally = Tally::new("repeated products", device);
    for (scheme, (dtype, m)) in pairs(SCHEMES, pairs(HALVES, [1, 20, 300])) {
        let case = format!("{scheme:?} {dtype:?} {m}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let w = weight(source, device, scheme, [1030, 72], DType::F16, false)?;
            let x = source.tensor(dtype, &[m, 1030], Plain)?;
            let codes = match scheme {
                QuantScheme::Int8 { .. } => Activations::Int8,
                QuantScheme::Fp8 { .. } => Activations::Fp8,
                _ => Activations::Float,
            };
            for activations in [Activations::Float, codes] {
                let opts = MatmulOptions::default().out_dtype(DType::F32).activations(activations);
                let first = Nd::of(&x.kaio_matmul_quant_with(&w, &opts)?)?;
                for _ in 0..3 {
                    identical("result", &x.kaio_matmul_quant_with(&w, &opts)?, &first)?;
                }
            }
            Ok(())
        });
    }
    tally.finish();
}

fn added(rows: &Nd, bias: &Nd) -> Nd {
    let mut sum = rows.clone();
    let n = bias.data.len();
    sum.data.iter_mut().enumerate().for_each(|(i, x)| *x += bias.data[i % n]);
    sum
}

/// Weights in floats.
pub fn dequantized(device: &Device) {
    let mut tally = Tally::new("dequantised weights", device);
    for (scheme, (dtype, scale)) in
        pairs(SCHEMES, pairs([DType::F32, DType::F16, DType::BF16], SCALES))
    {
        for (dims, order) in
            pairs([[1, 1], [40, 3], [129, 130], [256, 8], [0, 4], [9, 0]], [false, true])
        {
            let case = format!("{scheme:?} {dtype:?} {scale:?} {dims:?} {order}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let w = weight(source, device, scheme, dims, scale, order)?;
                let want = value_of(&w)?;
                let got = w.dequantize(dtype)?;
                if got.dtype() != dtype || !got.device().same_device(device) {
                    bail!("{:?} on {:?}", got.dtype(), got.device().location());
                }
                close("weight", &got, &want, |i| ulp(dtype, want.data[i]))
            });
        }
    }
    tally.finish();
}

/// Three widths and schemes, in and out of order; and gated linear units of two products.
pub fn projections(device: &Device) {
    let mut tally = Tally::new("projections with quantised weights", device);
    let mixed =
        [int4(64, false), QuantScheme::Nf4 { block: 64 }, QuantScheme::Int8 { per: Per::Channel }];
    for (dtype, (schemes, order)) in
        pairs(HALVES, pairs([[int4(128, true); 3], mixed], [[false; 3], [false, true, true]]))
    {
        for (rows, widths) in pairs([[1, 1], [2, 3], [2, 0]], [[64, 16, 16], [3, 5, 1], [8, 0, 8]])
        {
            let case = format!("{dtype:?} {schemes:?} {order:?} {rows:?} {widths:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let x = source.tensor(dtype, &[&rows[..], &[136]].concat(), Plain)?;
                let mut make = |i: usize| {
                    weight(source, device, schemes[i], [136, widths[i]], DType::F16, order[i])
                };
                let w = [make(0)?, make(1)?, make(2)?];
                let got: [Tensor; 3] = x.kaio_qkv_project([&w[0], &w[1], &w[2]])?.into();
                for (got, w) in got.iter().zip(&w) {
                    check_one(device, got, &x, w)?;
                }
                let up = make(0)?;
                let [gate, linear] = [x.kaio_matmul_quant(&w[0])?, x.kaio_matmul_quant(&up)?];
                // As near as what rounds both products first.
                let plain = gate.kaio_swiglu(&linear)?;
                let exact =
                    |w: &QuantWeight| -> Result<Nd> { Ok(product(&Nd::of(&x)?, &value_of(w)?)) };
                let (mut want, linear) = (exact(&w[0])?, exact(&up)?);
                let gated = want.data.iter_mut().zip(&linear.data);
                gated.for_each(|(gate, up)| *gate = *gate / (1.0 + (-*gate).exp()) * up);
                let allowed = 2.0 * want.max_error(&plain)? + ulp(dtype, want.peak());
                close("gated", &x.kaio_swiglu_project(&w[0], &up)?, &want, |_| allowed)
            });
        }
    }
    // Weights in f16's range, far above, and far below it: a power of two is each one's own.
    for rows in [1, 40] {
        let case = format!("powers of their own, {rows} rows");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let x = source.tensor_of(DType::F16, &[rows, 136], Plain, |s| s.unit() / 64.0)?;
            let mut make = |factor: f64| {
                let mut all = tensors(source, int4(64, false), [136, 24], DType::F32, false)?;
                let scales = all["scales"].affine(factor, 0.0)?;
                all.insert("scales".into(), scales);
                QuantWeight::from_tensors("", &all)?.to_device(device)
            };
            let w = [make(1.0)?, make(1e4)?, make(1e-4)?];
            let got: [Tensor; 3] = x.kaio_qkv_project([&w[0], &w[1], &w[2]])?.into();
            for (got, w) in got.iter().zip(&w) {
                let value = value_of(w)?;
                let one = 2f64.powf(value.peak().log2().floor());
                let near = value.map(|x| x / one);
                let plain = as_multiplied(device, DType::F16, &near).map(|x| x * one);
                let (want, allowed) = product_within(&Nd::of(&x)?, &value, &plain)?;
                close("projection", got, &want, |i| allowed + ulp(DType::F16, want.data[i]))?;
            }
            Ok(())
        });
    }
    tally.finish();
}

/// Which kernels are taken.
pub fn explained(device: &Device) {
    let mut tally = Tally::new("explained products", device);
    for (scheme, m) in pairs(SCHEMES, [1, 70]) {
        let case = format!("{scheme:?} {m}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let w = weight(source, device, scheme, [128, 64], DType::F16, false)?;
            let text = w.explain(m, DType::F16, &MatmulOptions::default())?;
            let said = format!("f16 [{m}, 128] x {scheme:?} [128, 64]: ");
            let how = text.strip_prefix(&said).unwrap_or_default();
            // Names of kernels have their dtypes.
            let wanted = if device.is_cpu() { "the CPU path" } else { "f16" };
            if how.contains(wanted) { Ok(()) } else { bail!("it says {text:?}") }
        });
    }
    // One kernel for all weights, or where schemes differ one for each.
    let mixed = [int4(64, false), QuantScheme::Nf4 { block: 64 }, int4(64, false)];
    for (schemes, m) in pairs([[int4(64, false); 3], mixed], [1, 70]) {
        tally.case(format!("{schemes:?} {m}"), || {
            let source = &mut Source::new("several", device);
            let mut make =
                |i: usize| weight(source, device, schemes[i], [128, 64], DType::F16, false);
            let [q, k, v] = [make(0)?, make(1)?, make(2)?];
            let texts = [
                QuantWeight::explain_qkv([&q, &k, &v], m, DType::F16)?,
                QuantWeight::explain_swiglu(&q, &k, m, DType::F16)?,
            ];
            for (text, count) in texts.iter().zip([3, 2]) {
                let [q, k, _] = schemes.map(|scheme| format!("{scheme:?} [128, 64]"));
                let Some((_, how)) = text.split_once(&format!("f16 [{m}, 128] x {q}, {k}")) else {
                    bail!("it says {text:?}")
                };
                let together = format!("{count}weights");
                let gated = how.contains("gated");
                let right = match device.is_cpu() {
                    true => how.ends_with("the CPU path, block by block"),
                    false if schemes[0] == schemes[1] => how.contains(&together) || gated,
                    false => how.contains("; then ") && !how.contains(&together),
                };
                if !right {
                    bail!("it says {text:?}");
                }
            }
            Ok(())
        });
    }
    tally.finish();
}

fn check_one(device: &Device, got: &Tensor, x: &Tensor, w: &QuantWeight) -> Result<()> {
    let (value, dtype) = (value_of(w)?, x.dtype());
    let (want, allowed) =
        product_within(&Nd::of(x)?, &value, &as_multiplied(device, dtype, &value))?;
    close("projection", got, &want, |i| allowed + ulp(dtype, want.data[i]))?;
    // The plain formula is of the same kind.
    let plain = plain_product(&Nd::of(x)?.tensor(DType::F32)?, &value.tensor(DType::F32)?)?;
    if got.dims() != plain.dims() {
        bail!("{:?}, wanted {:?}", got.dims(), plain.dims());
    }
    Ok(())
}
