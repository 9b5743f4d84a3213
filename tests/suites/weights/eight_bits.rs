//! Products whose both operands have eight bits.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::{e4m3, value_of, weight};
use crate::suites::Layout::{self, *};
use crate::suites::{
    Nd, Source, Tally, close, pairs, plain_product, product, product_within, results_alone, round,
    ulp,
};

/// Rows rounded in groups of `width`: codes, and the elements that they stand for.
fn rounded(x: &Nd, width: usize, most: f64, code: impl Fn(f64) -> f64) -> (Nd, Vec<f32>) {
    let (mut codes, mut scales) = (x.clone(), Vec::new());
    let k = x.dims[x.dims.len() - 1];
    for row in codes.data.chunks_mut(k.max(1)) {
        for group in row.chunks_mut(width) {
            let peak = group.iter().fold(0f32, |peak, x| peak.max(x.abs() as f32));
            let scale = if peak == 0.0 { 1.0 } else { peak / most as f32 };
            group.iter_mut().for_each(|x| *x = code(f64::from(*x as f32 / scale)));
            scales.push(scale);
        }
    }
    (codes, scales)
}

/// Activations that are rounded inside.
pub fn activations(device: &Device) {
    let mut tally = Tally::new("activations of eight bits", device);
    let kinds = [Per::Tensor, Per::Channel, Per::Block];
    for (per, (dtype, (rows, k))) in pairs(
        kinds,
        pairs([DType::F16, DType::BF16], pairs([[1, 1], [3, 5], [1, 40]], [1usize, 33, 128, 300])),
    ) {
        for x in [Plain, Transposed, Narrowed] {
            let case = format!("{per:?} {dtype:?} {rows:?} {k} {x:?}");
            let dims = [&rows[..], &[k]].concat();
            if per != Per::Block {
                tally.case(format!("int8 {case}"), || {
                    int8_inside(device, &case, per, dtype, &dims, x)
                });
            }
            tally.case(format!("fp8 {case}"), || fp8_inside(device, &case, per, dtype, &dims, x));
        }
    }
    tally.case("not finite", || {
        let mut x = Nd::full(&[3, 40], 1.0);
        (x.data[7], x.data[50]) = (f64::NAN, f64::INFINITY);
        let x = x.tensor(DType::F16)?.to_device(device)?;
        let source = &mut Source::new("not finite", device);
        for (scheme, activations) in [
            (QuantScheme::Int8 { per: Per::Channel }, Activations::Int8),
            (QuantScheme::Fp8 { per: Per::Channel }, Activations::Fp8),
        ] {
            let w = weight(source, device, scheme, [40, 5], DType::F32, false)?;
            let opts = MatmulOptions::default().activations(activations);
            let got = Nd::of(&x.kaio_matmul_quant_with(&w, &opts)?)?;
            let nan: Vec<_> = got.data.iter().map(|x| x.is_nan()).collect();
            if nan != [[true; 10].as_slice(), &[false; 5]].concat() {
                bail!("{activations:?} gave {:?}", got.data);
            }
        }
        Ok(())
    });
    if results_alone() {
        return tally.finish();
    }
    tally.case("gradient", || {
        let source = &mut Source::new("gradient", device);
        let w = weight(
            source,
            device,
            QuantScheme::Int8 { per: Per::Channel },
            [40, 6],
            DType::F32,
            false,
        )?;
        let x = Var::from_tensor(&source.tensor(DType::BF16, &[3, 40], Plain)?)?;
        let gradient = |opts: MatmulOptions| -> Result<Nd> {
            let y = x.kaio_matmul_quant_with(&w, &opts.out_dtype(DType::F32))?;
            match y.sum_all()?.backward()?.get(&x) {
                Some(grad) => Nd::of(grad),
                None => bail!("x has no gradient"),
            }
        };
        let want = gradient(MatmulOptions::default())?;
        let got = gradient(MatmulOptions::default().activations(Activations::Int8))?;
        close("dx", &got.tensor(DType::F64)?, &want, |_| 0.0)
    });
    tally.finish();
}

fn int8_inside(
    device: &Device,
    case: &str,
    per: Per,
    dtype: DType,
    dims: &[usize],
    layout: Layout,
) -> Result<()> {
    let source = &mut Source::new(case, device);
    let k = dims[dims.len() - 1];
    let x = source.tensor(dtype, dims, layout)?;
    let w = weight(source, device, QuantScheme::Int8 { per }, [k, 21], DType::F32, false)?;
    let (codes, scales) =
        rounded(&Nd::of(&x)?, k, 127.0, |x| x.round_ties_even().clamp(-127.0, 127.0));
    let mut want = product(&codes, &value_of(&w)?);
    for (row, scale) in want.data.chunks_mut(21).zip(scales) {
        row.iter_mut().for_each(|y| *y *= f64::from(scale));
    }
    let opts = MatmulOptions::default().activations(Activations::Int8).out_dtype(DType::F32);
    // The sum is exact: it is rounded to f32, and so are two products.
    close("int8", &x.kaio_matmul_quant_with(&w, &opts)?, &want, |i| {
        2.0 * ulp(DType::F32, want.data[i])
    })
}

fn fp8_inside(
    device: &Device,
    case: &str,
    per: Per,
    dtype: DType,
    dims: &[usize],
    layout: Layout,
) -> Result<()> {
    let source = &mut Source::new(case, device);
    let k = dims[dims.len() - 1];
    let x = source.tensor(dtype, dims, layout)?;
    let w = weight(source, device, QuantScheme::Fp8 { per }, [k, 140], DType::F32, false)?;
    let width = if per == Per::Block { 128 } else { k };
    let (mut codes, scales) = rounded(&Nd::of(&x)?, width, 448.0, e4m3);
    for (row, scales) in codes.data.chunks_mut(k).zip(scales.chunks(k.div_ceil(width))) {
        for (group, scale) in row.chunks_mut(width).zip(scales) {
            group.iter_mut().for_each(|x| *x *= f64::from(*scale));
        }
    }
    let value = value_of(&w)?;
    let plain = |value| multiplied(device, per == Per::Block, value);
    let (want, order) = product_within(&codes, &value, &value)?;
    let formula = plain_product(&plain(&codes)?, &plain(&value)?)?;
    let allowed = order.max(2.0 * want.max_error(&formula)?);
    let dropped = dropped(device, &codes, &value);
    let opts = MatmulOptions::default().activations(Activations::Fp8);
    let got = x.kaio_matmul_quant_with(&w, &opts)?;
    close("fp8", &got, &want, |i| allowed + dropped[i] + ulp(dtype, want.data[i]))
}

/// A factor as it is multiplied on a GPU without kernels for scales of blocks: in bf16.
fn multiplied(device: &Device, blocks: bool, value: &Nd) -> Result<Tensor> {
    match blocks && !device.is_cpu() {
        true => value.map(|x| round(DType::BF16, x)).tensor(DType::F32),
        false => value.tensor(DType::F32),
    }
}

/// What Hopper's tensor cores may drop of each sum of e4m3, of which they keep some 13 bits: as much of the magnitudes
/// that are added up as an H200 is measured to (`bytes_products`).
fn dropped(device: &Device, a: &Nd, b: &Nd) -> Vec<f64> {
    let share = if device.is_cpu() { 0.0 } else { 2f64.powi(-10) };
    product(&a.map(f64::abs), &b.map(f64::abs)).data.into_iter().map(|sum| sum * share).collect()
}

/// Exact sums, with scales of rows and columns and zero points.
pub fn int8(device: &Device) {
    let mut tally = Tally::new("int8 with options", device);
    for (rows, ([k, n], zero_point)) in pairs(
        [[1, 1], [2, 9]],
        pairs([[1, 1], [33, 7], [128, 65], [5000, 6], [0, 4], [4, 0]], [0, -128, 77]),
    ) {
        if results_alone() && k == 0 {
            // A sum over nothing and a bias are candle's kernels.
            continue;
        }
        for (scaled, layout) in
            pairs([[false; 2], [true, false], [false, true], [true; 2]], [Plain, Transposed])
        {
            let case = format!("{rows:?} {k} {n} {zero_point} {scaled:?} {layout:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let a = source.tensor(DType::U8, &[&rows[..], &[k]].concat(), layout)?;
                let b = source.tensor(DType::U8, &[k, n], layout)?;
                let scale = |t: &Tensor| Ok::<_, candle_core::Error>(Nd::of(t)?.data);
                let of_rows = source.tensor(DType::F32, &rows, Plain)?;
                let of_cols = source.tensor(DType::F32, &[n], Plain)?;
                let bias = source.tensor(DType::F32, &[n], Plain)?;
                let signed = |t: &Tensor| {
                    Ok::<_, candle_core::Error>(Nd::of(t)?.map(|x| f64::from(x as u8 as i8)))
                };
                let lhs = signed(&a)?.map(|x| x - f64::from(zero_point));
                let mut want = product(&lhs, &signed(&b)?);
                let mut opts =
                    Int8Options::default().scale(0.25).zero_point(zero_point).bias(bias.clone());
                let (row, col, added) = (scale(&of_rows)?, scale(&of_cols)?, scale(&bias)?);
                let mut factors = vec![0.25; want.data.len()];
                if scaled[0] {
                    opts = opts.lhs_scales(of_rows);
                    factors.iter_mut().enumerate().for_each(|(i, x)| *x *= row[i / n]);
                }
                if scaled[1] {
                    opts = opts.rhs_scales(of_cols);
                    factors.iter_mut().enumerate().for_each(|(i, x)| *x *= col[i % n]);
                }
                let mut terms = vec![0.0; want.data.len()];
                for (i, sum) in want.data.iter_mut().enumerate() {
                    terms[i] = *sum * factors[i];
                    *sum = terms[i] + added[i % n];
                }
                let got = a.kaio_matmul_int8_with(&b, &opts)?;
                let allowed =
                    |i: usize| 2.0 * ulp(DType::F32, terms[i]) + ulp(DType::F32, want.data[i]);
                close("result", &got, &want, allowed)
            });
        }
    }
    tally.case("as far from a zero point as can be", || {
        // The largest magnitude of an i32 sum: 127 − (−128), times −128.
        let k = 65_793;
        let a = Tensor::full(127u8, (1, k), device)?;
        let b = Tensor::full(128u8, (k, 1), device)?;
        let got = a.kaio_matmul_int8_with(&b, &Int8Options::default().zero_point(-128))?;
        let want = -255.0 * 128.0 * k as f64;
        close("result", &got, &Nd::full(&[1, 1], want), |_| ulp(DType::F32, want))
    });
    if results_alone() {
        return tally.finish();
    }
    tally.case("gradient of a bias", || {
        let source = &mut Source::new("bias", device);
        let (a, b) =
            (source.tensor(DType::U8, &[3, 8], Plain)?, source.tensor(DType::U8, &[8, 2], Plain)?);
        let bias = Var::zeros(2, DType::F32, device)?;
        let y =
            a.kaio_matmul_int8_with(&b, &Int8Options::default().bias(bias.as_tensor().clone()))?;
        match y.sum_all()?.backward()?.get(&bias) {
            Some(grad) => close("dbias", grad, &Nd::full(&[2], 3.0), |_| 0.0),
            None => bail!("the bias has no gradient"),
        }
    });
    tally.finish();
}

/// Scales of tensors, rows and columns, and blocks.
pub fn fp8(device: &Device) {
    let mut tally = Tally::new("fp8", device);
    let kinds = [Per::Tensor, Per::Channel, Per::Block];
    for (lhs, (rhs, (k, n))) in
        pairs(kinds, pairs(kinds, [(1, 1), (130, 7), (256, 129), (300, 140), (0, 3)]))
    {
        for (rows, layout) in pairs([[1, 1], [2, 5]], [Plain, Transposed]) {
            let case = format!("{lhs:?} {rhs:?} {k} {n} {rows:?} {layout:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let mut codes = |dims: &[usize]| -> Result<Tensor> {
                    let t = source.tensor_of(DType::F32, dims, layout, |s| e4m3(4.0 * s.unit()))?;
                    // A cast packs: the layout is made again, on the CPU, as candle's GPU path cannot.
                    let t = t.to_device(&Device::Cpu)?.to_dtype(DType::F8E4M3)?;
                    let t = match layout {
                        Transposed if t.elem_count() > 0 => t.t()?.contiguous()?.t()?,
                        _ => t,
                    };
                    t.to_device(device)
                };
                let (a, b) = (codes(&[&rows[..], &[k]].concat())?, codes(&[k, n])?);
                let width = if lhs == Per::Block { 128 } else { k.max(1) };
                let of_lhs = match lhs {
                    Per::Tensor => vec![],
                    Per::Channel => rows.to_vec(),
                    _ => vec![rows[0], rows[1], k.div_ceil(128)],
                };
                let of_rhs = match rhs {
                    Per::Tensor => vec![1],
                    Per::Channel => vec![n],
                    _ => vec![k.div_ceil(128), n.div_ceil(128)],
                };
                let scale = |s: &mut Source| 0.1 + s.unit().abs();
                let a_scales = source.tensor_of(DType::F32, &of_lhs, Plain, scale);
                let a_scales =
                    if of_lhs.is_empty() { Tensor::new(0.3f32, device)? } else { a_scales? };
                let b_scales = source
                    .tensor_of(DType::F32, &[1, of_rhs.iter().product()], Plain, scale)?
                    .reshape(of_rhs)?;
                let (mut lhs_value, mut rhs_value) = (Nd::of(&a)?, Nd::of(&b)?);
                let (sa, sb) = (Nd::of(&a_scales)?.data, Nd::of(&b_scales)?.data);
                for (i, x) in lhs_value.data.iter_mut().enumerate() {
                    *x *= match lhs {
                        Per::Tensor => sa[0],
                        _ => sa[i / k * k.div_ceil(width) + i % k / width],
                    };
                }
                for (i, x) in rhs_value.data.iter_mut().enumerate() {
                    *x *= match rhs {
                        Per::Tensor => sb[0],
                        Per::Channel => sb[i % n],
                        _ => sb[i / n / 128 * n.div_ceil(128) + i % n / 128],
                    };
                }
                let blocks = [lhs, rhs].contains(&Per::Block);
                let plain = |value| multiplied(device, blocks, value);
                let (want, order) = product_within(&lhs_value, &rhs_value, &rhs_value)?;
                let formula = plain_product(&plain(&lhs_value)?, &plain(&rhs_value)?)?;
                let allowed = order.max(2.0 * want.max_error(&formula)?);
                let dropped = dropped(device, &lhs_value, &rhs_value);
                let opts = Fp8Options::default().lhs_scales(a_scales).rhs_scales(b_scales);
                let got = a.kaio_matmul_fp8(&b, &opts)?;
                close("result", &got, &want, |i| {
                    allowed + dropped[i] + ulp(DType::F32, want.data[i])
                })
            });
        }
    }
    // Along K, and neither along K nor along N.
    for skip in [1, 2] {
        tally.case(format!("a weight that is a view, each {skip} of its rows"), || {
            let source = &mut Source::new("view", device);
            let dims = [21, 40 * skip];
            let codes = source.tensor_of(DType::F32, &dims, Plain, |s| e4m3(4.0 * s.unit()))?;
            let codes = codes.to_device(&Device::Cpu)?.to_dtype(DType::F8E4M3)?;
            let view = |t: Tensor| t.reshape((21, 40, skip))?.narrow(2, 0, 1)?.squeeze(2)?.t();
            let scales = Tensor::full(0.5f32, 21, device)?;
            let got = QuantWeight::from_fp8(&view(codes.to_device(device)?)?, &scales)?;
            let want = Nd::of(&view(codes)?.to_dtype(DType::F32)?)?.map(|x| 0.5 * x);
            close("before its first product", &got.dequantize(DType::F32)?, &want, |_| 0.0)?;
            got.prepare()?;
            close("after", &got.dequantize(DType::F32)?, &want, |_| 0.0)
        });
    }
    tally.finish();
}
