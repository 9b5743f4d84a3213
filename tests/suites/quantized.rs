//! Tables of the int8 and int4 products, the projections and the helpers in `quant`.

use candle_core::{DType, Device, Result, Tensor, Var, bail};
use kaio_candle::{Error, prelude::*, quant};
use proptest::prelude::*;

use super::Layout::{self, *};
use super::weights::transposed;
use super::{
    Nd, Source, Tally, close, identical, pairs, product, product_within, property, results_alone,
    ulp,
};

/// `[.., M, K]` activations and a `[K, N]` weight. `weight` is the layout of the weight (of each of
/// three in a projection) and of its int4 scales.
#[derive(Clone, Copy, Debug)]
struct Problem<'a> {
    rows: &'a [usize],
    k: usize,
    n: usize,
    x: Layout,
    weight: [Layout; 2],
}

const ROWS: [&[usize]; 4] = [&[5], &[3, 5], &[2, 3, 4], &[2, 1, 2, 2]];
const TILES: [&[usize]; 8] = [&[1], &[15], &[16], &[17], &[63], &[64], &[65], &[129]];
const COLUMNS: [usize; 9] = [1, 2, 3, 4, 6, 17, 64, 65, 129];
const WEIGHTS: [Layout; 6] = [Plain, Transposed, Narrowed, Rows, Columns, Repeated];

/// Every K with every N, tiles of M, every layout of each operand, every empty dimension.
fn problems(ks: &[usize]) -> Vec<Problem<'static>> {
    let base = Problem { rows: &[5], k: ks[0], n: 6, x: Plain, weight: [Plain; 2] };
    let mut all = Vec::new();
    all.extend(pairs(ks, &COLUMNS).map(|(&k, &n)| Problem { k, n, ..base }));
    all.extend(TILES.map(|rows| Problem { rows, n: 65, ..base }));
    all.extend(pairs(ROWS, pairs(Layout::ALL, WEIGHTS)).map(|(rows, (x, weight))| Problem {
        rows,
        x,
        weight: [weight, Plain],
        ..base
    }));
    all.extend(pairs(WEIGHTS, WEIGHTS).map(|weight| Problem { weight: weight.into(), ..base }));
    all.extend([[0].as_slice(), &[0, 5], &[3, 0]].map(|rows| Problem { rows, ..base }));
    all.extend([Plain, Narrowed].map(|x| Problem { n: 0, x, ..base }));
    all.extend(ROWS.map(|rows| Problem { rows, k: 0, ..base }));
    all
}

type Element = fn(&mut Source) -> f64;

fn run(
    tally: &mut Tally,
    device: &Device,
    label: &str,
    p: Problem,
    check: impl FnOnce(&mut Source) -> Result<()>,
) {
    let case = format!("{label} {p:?}");
    tally.case(&case, || check(&mut Source::new(&case, device)));
}

impl Problem<'_> {
    fn activations(&self, source: &mut Source, dtype: DType, element: Element) -> Result<Tensor> {
        source.tensor_of(dtype, &[self.rows, &[self.k]].concat(), self.x, element)
    }

    fn int8(&self, source: &mut Source, element: Element) -> Result<Tensor> {
        source.tensor_of(DType::U8, &[self.k, self.n], self.weight[0], element)
    }

    /// Words and scales.
    fn int4(&self, source: &mut Source) -> Result<(Tensor, Tensor)> {
        let (words, groups) = ([self.k / 8, self.n], [self.k / 128, self.n]);
        Ok((
            source.tensor(DType::U32, &words, self.weight[0])?,
            source.tensor(DType::F16, &groups, self.weight[1])?,
        ))
    }
}

/// Bytes read as int8.
fn signed(t: &Tensor) -> Result<Nd> {
    Ok(Nd::of(t)?.map(|byte| f64::from(byte as u8 as i8)))
}

/// The nibbles of `[K/8, N]` words read as int4.
fn nibbles(words: &Nd) -> Nd {
    let n = words.dims[1];
    let mut values = Nd::full(&[8 * words.dims[0], n], 0.0);
    for (i, value) in values.data.iter_mut().enumerate() {
        let (k, column) = (i / n, i % n);
        let nibble = (words.data[k / 8 * n + column] as u32 >> (4 * (k % 8))) & 15;
        *value = if nibble < 8 { f64::from(nibble) } else { f64::from(nibble) - 16.0 };
    }
    values
}

/// The weight of words and scales.
fn dequantized(words: &Nd, scales: &Nd) -> Nd {
    let mut weight = nibbles(words);
    let n = words.dims[1];
    for (i, x) in weight.data.iter_mut().enumerate() {
        *x *= scales.data[i / n / 128 * n + i % n];
    }
    weight
}

const RANDOM: Element = |s| f64::from(s.bits() as u8);

pub fn int8(device: &Device) {
    let mut tally = Tally::new("int8", device);
    let mut check = |label: &str, p: Problem, scale, element| {
        run(&mut tally, device, label, p, |source| check_int8(source, p, scale, element));
    };
    for p in problems(&[33, 1, 7, 31, 32, 64, 97, 128]) {
        check("random", p, 1.0, RANDOM);
    }
    // Sums that f32 cannot hold on the way, and the largest that i32 must.
    let fills: [(&str, Element); 5] = [
        ("random", RANDOM),
        ("all -128", |_| 128.0),
        ("all 127", |_| 127.0),
        ("positive", |s| (1 + s.bits() % 127) as f64),
        ("extremes", |s| [127.0, 128.0][s.bits() as usize % 2]),
    ];
    for (k, (label, element)) in pairs([1023, 1024, 1025, 2049, 5000, 131071], fills) {
        let p = Problem { rows: &[3], k, n: 5, x: Plain, weight: [Transposed; 2] };
        check(label, p, 1.0, element);
    }
    for scale in [0.0, -0.5, 0.0123, 1e-20, 1e30] {
        let p = Problem { rows: &[2, 9], k: 40, n: 7, x: Plain, weight: [Plain; 2] };
        check(&format!("scale {scale}"), p, scale, RANDOM);
    }
    tally.finish();
}

/// Random shapes and layouts.
pub fn int8_random(device: &Device) {
    let mut tally = Tally::new("int8 random", device);
    let strategy = (
        prop::collection::vec(0..12usize, 1..4),
        (0..40usize, 0..40usize),
        prop::sample::select(Layout::ALL.as_slice()),
        prop::sample::select(Layout::ALL.as_slice()),
    );
    property(&mut tally, 128, strategy, |(rows, (k, n), x, weight)| {
        let p = Problem { rows: &rows, k, n, x, weight: [weight; 2] };
        check_int8(&mut Source::new(&format!("{p:?}"), device), p, 0.25, RANDOM)
    });
    tally.finish();
}

/// Exact: the i32 sum, rounded to f32, times the scale.
fn check_int8(source: &mut Source, p: Problem, scale: f32, element: Element) -> Result<()> {
    let a = p.activations(source, DType::U8, element)?;
    let b = p.int8(source, element)?;
    let before = (Nd::of(&a)?, Nd::of(&b)?);
    let sum = product(&signed(&a)?, &signed(&b)?);
    let want = sum.map(|sum| f64::from(scale * sum as f32));
    close("result", &a.kaio_matmul_int8(&b, scale)?, &want, |_| 0.0)?;
    identical("lhs", &a, &before.0)?;
    identical("rhs", &b, &before.1)
}

/// Activations with and without infinities and NaN.
const FLOATS: [(&str, Element); 2] = [("unit", Source::unit), ("specials", Source::special)];

pub fn int4(device: &Device) {
    let mut tally = Tally::new("int4", device);
    for ((label, element), p) in pairs(FLOATS, &problems(&[128, 256, 1024])) {
        run(&mut tally, device, label, *p, |source| {
            let x = p.activations(source, DType::F16, element)?;
            let (packed, scales) = p.int4(source)?;
            let before = (Nd::of(&x)?, Nd::of(&packed)?, Nd::of(&scales)?);
            let weight = dequantized(&before.1, &before.2);
            let (want, allowed) =
                product_within(&before.0, &weight, &as_multiplied(device, &weight))?;
            let got = x.kaio_matmul_int4(&packed, &scales)?;
            close("result", &got, &want, |i| allowed + ulp(DType::F32, want.data[i]))?;
            identical("lhs", &x, &before.0)?;
            identical("packed", &packed, &before.1)?;
            identical("scales", &scales, &before.2)
        });
    }
    // Elements that f16 has not, and those of which it has few digits; results and the gradient are in its range.
    for (size, rows) in pairs([60_000.0, 9_000.0, 2e-5], [1, 16, 17, 40, 300]) {
        let case = format!("scales about {size:e}, {rows} rows");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let x = Var::from_tensor(&source.tensor(DType::F16, &[rows, 256], Plain)?)?;
            let packed = source.tensor(DType::U32, &[32, 37], Plain)?;
            let scales = source.tensor_of(DType::F16, &[2, 37], Plain, |s| size * s.unit())?;
            let weight = dequantized(&Nd::of(&packed)?, &Nd::of(&scales)?);
            // The formula with a weight of about 1.
            let one = 2f64.powf(weight.peak().log2().floor());
            let plain = as_multiplied(device, &weight.map(|x| x / one)).map(|x| x * one);
            let (want, allowed) = product_within(&Nd::of(&x)?, &weight, &plain)?;
            let input = if results_alone() { &x.detach() } else { x.as_tensor() };
            let got = input.kaio_matmul_int4(&packed, &scales)?;
            close("result", &got, &want, |i| allowed + ulp(DType::F32, want.data[i]))?;
            if results_alone() {
                return Ok(());
            }
            let upstream = source.tensor_of(DType::F32, got.dims(), Plain, |s| s.unit() / one)?;
            let grads = (got * &upstream)?.sum_all()?.backward()?;
            let Some(dx) = grads.get(&x) else { bail!("x has no gradient") };
            let upstream = Nd::of(&upstream)?;
            let (want, allowed) =
                product_within(&upstream, &transposed(&weight), &transposed(&plain))?;
            // The upstream gradient is rounded to the dtype of x.
            let rounding = ulp(DType::F16, 1.0) * 37.0 * weight.peak() / one;
            close("dx", dx, &want, |i| allowed + rounding + ulp(DType::F16, want.data[i]))
        });
    }
    // One activation picks one row of the weight, exactly.
    tally.case("identity", || {
        let source = &mut Source::new("identity", device);
        let x = Tensor::eye(256, DType::F16, &Device::Cpu)?.to_device(device)?;
        let packed = source.tensor(DType::U32, &[32, 37], Plain)?;
        let scales = source
            .tensor_of(DType::F16, &[2, 37], Plain, |s| [0.5, -4.0][s.bits() as usize % 2])?;
        let want = dequantized(&Nd::of(&packed)?, &Nd::of(&scales)?);
        close("result", &x.kaio_matmul_int4(&packed, &scales)?, &want, |_| 0.0)
    });
    tally.finish();
}

/// An int4 weight in the dtype in which the plain formula multiplies it: tensor cores take f16, the
/// CPU path f32.
fn as_multiplied(device: &Device, weight: &Nd) -> Nd {
    let dtype = if device.is_cpu() { DType::F32 } else { DType::F16 };
    weight.map(|x| super::round(dtype, x))
}

pub fn qkv_int8(device: &Device) {
    let mut tally = Tally::new("qkv int8", device);
    for ((label, element), p) in pairs(FLOATS, &problems(&[33, 1, 7, 15, 16, 17, 32, 100])) {
        qkv_int8_of(&mut tally, device, label, *p, element, [1.0, -0.03, 0.0007]);
    }
    // Elements of the weights that f16 has not, and some of which it has few digits.
    let thousandths = |source: &mut Source| source.unit() / 1024.0;
    let rows = [[1].as_slice(), &[8], &[9], &[20], &[2, 70]];
    for (rows, weight) in pairs(rows, [Plain, Layout::Transposed]) {
        let p = Problem { rows, k: 40, n: 6, x: Plain, weight: [weight, Plain] };
        qkv_int8_of(&mut tally, device, "far", p, thousandths, [2000.0, -1e-5, 700.0]);
    }
    tally.finish();
}

fn qkv_int8_of(
    tally: &mut Tally,
    device: &Device,
    label: &str,
    p: Problem,
    element: Element,
    scales: [f32; 3],
) {
    run(tally, device, label, p, |source| {
        let x = p.activations(source, DType::F16, element)?;
        let before = Nd::of(&x)?;
        let [q, k, v] = [p.int8(source, RANDOM)?, p.int8(source, RANDOM)?, p.int8(source, RANDOM)?];
        let got = x.kaio_qkv_project_int8([&q, &k, &v], scales)?;
        for (i, (got, weight)) in [got.0, got.1, got.2].iter().zip([&q, &k, &v]).enumerate() {
            let scale = f64::from(scales[i]);
            let weight = signed(weight)?.map(|w| w * scale);
            // With digits as of elements about 1.
            let power = scale.abs().log2().floor().exp2();
            let plain = as_multiplied(device, &weight.map(|w| w / power)).map(|w| w * power);
            check_projection(i, got, &before, &weight, &plain)?;
        }
        identical("x", &x, &before)
    });
}

pub fn qkv_int4(device: &Device) {
    let mut tally = Tally::new("qkv int4", device);
    for ((label, element), p) in pairs(FLOATS, &problems(&[128, 256, 384])) {
        run(&mut tally, device, label, *p, |source| {
            let x = p.activations(source, DType::F16, element)?;
            let before = Nd::of(&x)?;
            let [q, k, v] = [p.int4(source)?, p.int4(source)?, p.int4(source)?];
            let got = x.kaio_qkv_project_int4([&q.0, &k.0, &v.0], [&q.1, &k.1, &v.1])?;
            for (i, (got, weight)) in [got.0, got.1, got.2].iter().zip([q, k, v]).enumerate() {
                let weight = dequantized(&Nd::of(&weight.0)?, &Nd::of(&weight.1)?);
                check_projection(i, got, &before, &weight, &as_multiplied(device, &weight))?;
            }
            identical("x", &x, &before)
        });
    }
    tally.finish();
}

fn check_projection(i: usize, got: &Tensor, x: &Nd, weight: &Nd, plain: &Nd) -> Result<()> {
    let (want, allowed) = product_within(x, weight, plain)?;
    if got.dtype() != DType::F16 {
        bail!("projection {i} is {:?}", got.dtype());
    }
    let what = format!("projection {i}");
    close(&what, got, &want, |i| allowed + ulp(DType::F16, want.data[i]))
}

/// Magnitudes that each dtype of a weight can hold, and an int4 scale too.
const MAGNITUDES: [(DType, &[f64]); 3] = [
    (DType::F32, &[0.0, 1e-40, 1e-30, 1e-7, 1e-3, 1.0, 4e5]),
    (DType::F16, &[0.0, 1e-7, 1e-3, 1.0, 6e4]),
    (DType::BF16, &[0.0, 1e-30, 1e-3, 1.0, 4e5]),
];

/// What rounding in f32 adds to half a step, in steps.
const HALF: f64 = 0.5 + 1e-4;

/// Round trips to half a step, and what cannot make one.
pub fn quantize_int8(device: &Device) {
    let mut tally = Tally::new("quantize int8", device);
    let large = [(DType::F32, [1e30, 3e38].as_slice()), (DType::BF16, &[1e30, 3e38])];
    for ((dtype, magnitudes), layout) in pairs(MAGNITUDES.into_iter().chain(large), Layout::ALL) {
        for magnitude in magnitudes {
            let case = format!("{dtype:?} {magnitude:e} {layout:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let t = source.tensor_of(dtype, &[3, 4, 5], layout, |s| s.unit() * magnitude)?;
                let before = Nd::of(&t)?;
                let (q, scale) = quant::quantize_int8(&t)?;
                let step = match before.peak() as f32 {
                    0.0 => 1.0,
                    peak => (peak / 127.0).max(f32::MIN_POSITIVE),
                };
                if scale != step || !q.device().same_device(device) {
                    bail!("scale {scale} on {:?}, wanted {step}", q.device().location());
                }
                let back = signed(&q)?.map(|q| q * f64::from(scale));
                let half = HALF * f64::from(scale);
                close("round trip", &back.tensor(DType::F64)?, &before, |_| half)?;
                let got = quant::dequantize_int8(&q, scale)?;
                close("dequantized", &got, &back, |i| ulp(DType::F32, back.data[i]))?;
                identical("t", &t, &before)
            });
        }
    }
    for ((dtype, _), (dims, layout)) in pairs(MAGNITUDES, pairs([[0, 4], [4, 0], [0, 0]], WEIGHTS))
    {
        let case = format!("{dtype:?} {dims:?} {layout:?}");
        tally.case(&case, || {
            let t = Source::new(&case, device).tensor(dtype, &dims, layout)?;
            let (q, scale) = quant::quantize_int8(&t)?;
            close("q", &q, &Nd::full(&dims, 0.0), |_| 0.0)?;
            close("back", &quant::dequantize_int8(&q, scale)?, &Nd::full(&dims, 0.0), |_| 0.0)
        });
    }
    refuses(&mut tally, device, [f64::NAN, f64::INFINITY, f64::NEG_INFINITY], |t| {
        quant::quantize_int8(t).map(drop)
    });
    tally.finish();
}

/// Round trips to half of each group's step, and what cannot make one.
pub fn quantize_int4(device: &Device) {
    let mut tally = Tally::new("quantize int4", device);
    for ((dtype, magnitudes), layout) in pairs(MAGNITUDES, WEIGHTS) {
        for magnitude in magnitudes {
            let case = format!("{dtype:?} {magnitude:e} {layout:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let weight =
                    source.tensor_of(dtype, &[256, 5], layout, |s| s.unit() * magnitude)?;
                let before = Nd::of(&weight)?;
                let (packed, scales) = quant::quantize_int4(&weight)?;
                let steps = steps(&before);
                close("scales", &scales, &steps, |i| ulp(DType::F16, steps.data[i]))?;
                if !packed.device().same_device(device) || !scales.device().same_device(device) {
                    bail!("moved to {:?}", packed.device().location());
                }
                let back = dequantized(&Nd::of(&packed)?, &Nd::of(&scales)?);
                let half = |i| HALF * 1.001 * steps.data[i / 5 / 128 * 5 + i % 5];
                close("round trip", &back.tensor(DType::F64)?, &before, half)?;
                close("dequantized", &quant::dequantize_int4(&packed, &scales)?, &back, |_| 0.0)?;
                identical("weight", &weight, &before)
            });
        }
    }
    for ((dtype, _), (dims, layout)) in
        pairs(MAGNITUDES, pairs([[0, 4], [128, 0], [0, 0]], WEIGHTS))
    {
        let case = format!("{dtype:?} {dims:?} {layout:?}");
        tally.case(&case, || {
            let weight = Source::new(&case, device).tensor(dtype, &dims, layout)?;
            let (packed, scales) = quant::quantize_int4(&weight)?;
            close("packed", &packed, &Nd::full(&[dims[0] / 8, dims[1]], 0.0), |_| 0.0)?;
            let back = quant::dequantize_int4(&packed, &scales)?;
            close("back", &back, &Nd::full(&dims, 0.0), |_| 0.0)
        });
    }
    refuses(&mut tally, device, [f64::NAN, f64::INFINITY, f64::NEG_INFINITY, -4.6e5], |t| {
        quant::quantize_int4(t).map(drop)
    });
    tally.finish();
}

/// A seventh of the largest element of each group of 128 rows, at least 2⁻²⁰.
fn steps(weight: &Nd) -> Nd {
    let n = weight.dims[1];
    let mut steps = Nd::full(&[weight.dims[0] / 128, n], 2f64.powi(-20));
    for (i, w) in weight.data.iter().enumerate() {
        let step = &mut steps.data[i / n / 128 * n + i % n];
        *step = step.max(w.abs() / 7.0);
    }
    steps
}

/// One such element anywhere is an error.
fn refuses(
    tally: &mut Tally,
    device: &Device,
    bad: impl IntoIterator<Item = f64>,
    quantize: fn(&Tensor) -> Result<()>,
) {
    for (bad, place) in pairs(bad.into_iter().collect::<Vec<_>>(), [0, 127, 128, 511]) {
        tally.case(format!("{bad} at {place}"), || {
            let mut weight = Nd::full(&[256, 2], 1.0);
            weight.data[place] = bad;
            match quantize(&weight.tensor(DType::F32)?.to_device(device)?) {
                Err(e) if matches!(Error::of(&e), Some(Error::Value { .. })) => Ok(()),
                other => bail!("gave {other:?}"),
            }
        });
    }
}

/// `pack_int4` against shifts, and `unpack_int4` back, with all nibbles in all places.
pub fn pack_int4(device: &Device) {
    let mut tally = Tally::new("pack int4", device);
    for (dims, layout) in pairs([[0, 3], [8, 0], [8, 1], [24, 5], [1024, 7]], WEIGHTS) {
        let case = format!("{dims:?} {layout:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let values = source.tensor(DType::U8, &dims, layout)?;
            let bytes = Nd::of(&values)?;
            let n = dims[1];
            let mut want = Nd::full(&[dims[0] / 8, n], 0.0);
            for (i, byte) in bytes.data.iter().enumerate() {
                let (k, column) = (i / n, i % n);
                want.data[k / 8 * n + column] += f64::from((*byte as u32 & 15) << (4 * (k % 8)));
            }
            let packed = quant::pack_int4(&values)?;
            close("packed", &packed, &want, |_| 0.0)?;
            close("unpacked", &quant::unpack_int4(&packed)?, &nibbles(&want), |_| 0.0)?;
            let words = source.tensor(DType::U32, &dims, layout)?;
            close(
                "unpacked words",
                &quant::unpack_int4(&words)?,
                &nibbles(&Nd::of(&words)?),
                |_| 0.0,
            )
        });
    }
    tally.finish();
}
