//! Kernels of weights of four bits, against the formula in f64: the packed form and back, elements, products by what
//! is chosen and by configurations that nobody chose.

use candle_core::{DType, Device, Result, Tensor};
use kaio_candle::kernel::gemm::Epilogue;
use kaio_candle::kernel::gemm::sm90::{self, Order, Store};
use kaio_candle::kernel::w4::{self, Codes, Scheme, Table, stream, tiles};
use kaio_candle::kernel::{self, Element};
use kaio_candle::prelude::*;
use kaio_candle::ptx::{Half, Target};
use kaio_candle::quant::{Per, QuantScheme, QuantWeight};
use kaio_candle::tune::{self, W4};

use super::gpu;
use super::suites::{NF4, Nd, Source, close, identical, product, ulp};

const INT4: Scheme =
    Scheme { codes: Codes::Int4, zeros: false, scale: Element::Half(Half::F16), group: Some(128) };

/// An H200.
const HOPPER: kernel::Device =
    kernel::Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };

/// With and without zero points, nf4; all groups; all types of scales.
fn schemes() -> Vec<Scheme> {
    let kinds = [(Codes::Int4, false), (Codes::Int4, true), (Codes::Nf4, false)];
    let scales = [Element::Half(Half::F16), Element::Half(Half::Bf16), Element::F32];
    let groups = [None, Some(32), Some(64), Some(128)];
    let all = kinds.into_iter().flat_map(|kind| groups.map(|group| (kind, group)));
    let scheme = |(i, ((codes, zeros), group)): (usize, _)| Scheme {
        codes,
        zeros,
        scale: scales[i % 3],
        group,
    };
    all.enumerate().map(scheme).collect()
}

fn dtype(element: Element) -> DType {
    match element {
        Element::F32 => DType::F32,
        Element::Half(Half::F16) => DType::F16,
        Element::Half(Half::Bf16) => DType::BF16,
    }
}

/// A weight on a GPU, its plain codes, and what it stands for.
struct Case {
    weight: W4,
    plain: Vec<u32>,
    elements: Nd,
}

impl Case {
    fn new(device: &Device, scheme: Scheme, size: [usize; 2]) -> Result<Self> {
        let [k, n] = size;
        let mut source = Source::new(&format!("{scheme:?} {size:?}"), device);
        let mut codes = vec![0u32; k * n];
        codes.iter_mut().for_each(|code| *code = source.bits() as u32 % 16);
        let mut plain = vec![0u32; k.div_ceil(8) * n];
        for (i, word) in plain.iter_mut().enumerate() {
            for row in 0..8 {
                let code = codes.get((i / n * 8 + row) * n + i % n).copied();
                *word |= code.unwrap_or(scheme.zero_code()) << (4 * row);
            }
        }
        let groups = scheme.groups(k as u64) as usize;
        let scales: Vec<_> = (0..groups * n).map(|_| 0.01 * (1.5 + source.unit())).collect();
        let scales = Tensor::from_vec(scales, (groups, n), &Device::Cpu)?;
        let scales = scales.to_dtype(dtype(scheme.scale))?;
        let zeros: Vec<_> = (0..groups * n).map(|_| (source.bits() % 17) as u8).collect();
        let steps = Nd::of(&scales)?;
        let element = |i: usize| {
            let group = i / n / scheme.group.map_or(k, |rows| rows as usize) * n + i % n;
            let value = match (scheme.codes, scheme.zeros) {
                (Codes::Nf4, _) => NF4[codes[i] as usize],
                (_, true) => f64::from(codes[i]) - f64::from(zeros[group]),
                (_, false) => f64::from(codes[i]) - 8.0,
            };
            steps.data[group] * value
        };
        let elements = Nd { dims: size.into(), data: (0..k * n).map(element).collect() };
        let words = Tensor::from_slice(&plain, (k.div_ceil(8), n), device)?;
        let zeros = Tensor::from_vec(zeros, (groups, n), device)?;
        let weight = W4 {
            scheme,
            size,
            codes: tune::w4_pack(&words, size, &scheme)?,
            scales: scales.to_device(device)?,
            zeros: scheme.zeros.then(|| tune::w4_pack_zeros(&zeros)).transpose()?,
        };
        Ok(Self { weight, plain, elements })
    }

    fn x(&self, device: &Device, m: usize, dtype: DType) -> Result<Tensor> {
        Source::new(&format!("{m} {:?}", self.weight.size), device).tensor(
            dtype,
            &[m, self.weight.size[0]],
            super::suites::Layout::Plain,
        )
    }

    /// The product is as near to that in f64 as one of the rounded weight in f64 is, and a few units in its last
    /// place.
    fn check(
        &self,
        what: &str,
        x: &Tensor,
        got: &Tensor,
        finish: impl Fn(usize, f64) -> f64,
    ) -> Result<()> {
        let x64 = Nd::of(x)?;
        let n = self.weight.size[1];
        let mut want = product(&x64, &self.elements);
        let rounded = Nd::of(&self.elements.tensor(x.dtype())?)?;
        let mut plain = product(&x64, &rounded);
        for nd in [&mut want, &mut plain] {
            nd.data.iter_mut().enumerate().for_each(|(i, sum)| *sum = finish(i % n, *sum));
        }
        let allowed = 2.0 * want.max_error(&plain.tensor(DType::F32)?)?;
        let last = ulp(got.dtype(), want.peak()) + 4.0 * ulp(DType::F32, want.peak());
        close(what, got, &want, |_| allowed + last)
    }
}

/// Sizes that are multiples of nothing, and others.
const SIZES: [[usize; 2]; 6] = [[1, 1], [64, 64], [100, 65], [136, 24], [256, 128], [328, 200]];

#[test]
fn w4_codes_come_back() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for size in SIZES {
        for scheme in [INT4, Scheme { codes: Codes::Nf4, ..INT4 }] {
            let case = Case::new(&gpu, scheme, size)?;
            let back = tune::w4_unpack(&case.weight.codes, size, &scheme)?;
            let back = back.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u32>()?;
            assert_eq!(back, case.plain, "{size:?}");
        }
    }
    Ok(())
}

#[test]
fn w4_elements() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (i, scheme) in schemes().into_iter().enumerate() {
        for size in SIZES {
            let case = Case::new(&gpu, scheme, size)?;
            for out in [DType::F32, DType::F16, DType::BF16] {
                let transposed = i % 2 == 0;
                let got = tune::w4_dequantize(&case.weight, out, transposed)?;
                let got = if transposed { got.t()? } else { got };
                // A product of floats, rounded to f32 and then to the result's type.
                close(&format!("{scheme:?} {size:?} {out:?}"), &got, &case.elements, |i| {
                    let element = case.elements.data[i];
                    0.501 * ulp(out, element) + ulp(DType::F32, element)
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn w4_products() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (i, scheme) in schemes().into_iter().enumerate() {
        for size in SIZES {
            let case = Case::new(&gpu, scheme, size)?;
            for m in [1, 3, 8, 13, 17, 70, 140, 300] {
                let half = [DType::F16, DType::BF16][(i + m) % 2];
                let out = [half, DType::F32][i / 2 % 2];
                let x = case.x(&gpu, m, half)?;
                let options = MatmulOptions::default().out_dtype(out);
                let got = tune::w4_matmul(&x, &case.weight, &options, None)?;
                case.check(&format!("{scheme:?} {size:?} {m} {half:?}"), &x, &got, |_, x| x)?;
            }
        }
    }
    Ok(())
}

/// All shapes of the kernel, with depths that leave some warps and parts little or nothing.
#[test]
fn w4_stream_shapes() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let target = match std::env::var("KAIO_ARCH").as_deref() {
        Ok("sm_80" | "sm_89") => Target::Sm80,
        _ => Target::Sm90a,
    };
    let (mut count, mut whole) = (0, 0);
    for (i, scheme) in schemes().into_iter().enumerate() {
        for (j, (warps, split)) in
            [(4, 1), (8, 1), (16, 1), (4, 2), (8, 4), (4, 8)].into_iter().enumerate()
        {
            let k = [1100, 2048, 136][(i + j) % 3];
            if k / 128 < split as usize {
                continue;
            }
            let n = [72, 65, 128][(i / 3 + j) % 3];
            let case = Case::new(&gpu, scheme, [k, n])?;
            let tokens = [1, 2, 4, 8, 16][(i + 2 * j) % 5];
            let m = (tokens as usize * if j % 4 == 3 { 9 } else { 3 }).div_ceil(4);
            let half = [Half::F16, Half::Bf16][(i + j) % 2];
            let cols = [64, 32][(i + j / 3) % 2];
            let config = stream::Config {
                target,
                half,
                scheme,
                tokens,
                several: j % 4 == 3,
                cols,
                cut: k % 128 > 0 || n % cols as usize > 0,
                warps,
                slots: [2, 4, 6][j % 3],
                table: [Table::Narrow, Table::Wide][(i + j) % 2],
                split,
                blocks_per_sm: 1,
                unit: if case.weight.size[1] % 4 == 0 { 4 } else { 1 },
                weights: 1,
                gated: false,
                epilogue: Epilogue::round(Element::Half(half)),
            };
            let slots = config.slots.min(config.max_slots(232_448));
            let config = stream::Config { slots, ..config };
            if let Err(why) = config.check(232_448) {
                panic!("{}: {why}", config.name());
            }
            let x = case.x(&gpu, m, dtype(Element::Half(half)))?;
            let options = MatmulOptions::default().out_dtype(x.dtype());
            let got = tune::w4_matmul(&x, &case.weight, &options, Some(config.into()))?;
            case.check(&config.name(), &x, &got, |_, x| x)?;
            let again = tune::w4_matmul(&x, &case.weight, &options, Some(config.into()))?;
            identical(&config.name(), &again, &Nd::of(&got)?)?;
            count += 1;
            whole += u32::from(!config.cut);
        }
    }
    assert!(count > 50 && whole > 5, "{count} shapes, {whole} of whole blocks");
    Ok(())
}

/// All candidates for Hopper, with depths that leave some parts little.
#[test]
fn w4_tile_shapes() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if std::env::var("KAIO_ARCH").as_deref() == Ok("sm_80") {
        return Ok(());
    }
    let mut shapes = std::collections::HashSet::new();
    for (i, scheme) in schemes().into_iter().enumerate() {
        for (j, m) in [18, 33, 64, 100, 200, 300].into_iter().enumerate() {
            let size @ [k, n] = [[600, 200], [136, 67], [1100, 136], [64, 64]][(i + j) % 4];
            let case = Case::new(&gpu, scheme, size)?;
            let half = [Half::F16, Half::Bf16][(i / 2 + j) % 2];
            let out = [Element::Half(half), Element::F32][(i + j / 2) % 2];
            let x = case.x(&gpu, m, dtype(Element::Half(half)))?;
            let options = MatmulOptions::default().out_dtype(dtype(out));
            let epilogue = Epilogue::round(out);
            let [m, n, k] = [m, n, k].map(|size| size as u64);
            let problem =
                w4::Problem { m, n, others: [0; 2], gated: false, k, half, scheme, epilogue };
            for (number, config) in tiles::candidates(&problem, &HOPPER).into_iter().enumerate() {
                // A third of them for each case, other ones each time.
                if (number + i + j) % 3 != 0 {
                    continue;
                }
                let got = tune::w4_matmul(&x, &case.weight, &options, Some(config.into()))?;
                case.check(&format!("{} {m}x{n}x{k}", config.name()), &x, &got, |_, x| x)?;
                let again = tune::w4_matmul(&x, &case.weight, &options, Some(config.into()))?;
                identical(&config.name(), &again, &Nd::of(&got)?)?;
                shapes.insert((config.rows, config.cols, config.split, config.store));
            }
        }
    }
    assert!(shapes.len() > 30, "{} shapes", shapes.len());
    Ok(())
}

/// Rings of few stages, and of numbers that producers and teams do not divide: many rounds of them.
#[test]
fn w4_rings() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    if std::env::var("KAIO_ARCH").as_deref() == Ok("sm_80") {
        return Ok(());
    }
    let (half, [k, n]) = (Half::Bf16, [64 * 23, 264]);
    let element = Element::Half(half);
    let mut count = [0; 3];
    for scheme in [INT4, Scheme { codes: Codes::Nf4, group: Some(64), ..INT4 }] {
        let case = Case::new(&gpu, scheme, [k, n])?;
        for m in [40, 130] {
            let x = case.x(&gpu, m, dtype(element))?;
            let options = MatmulOptions::default().out_dtype(dtype(element));
            let epilogue = Epilogue::round(element);
            let [m, n, k] = [m, n, k].map(|size| size as u64);
            let problem =
                w4::Problem { m, n, others: [0; 2], gated: false, k, half, scheme, epilogue };
            for config in tiles::candidates(&problem, &HOPPER) {
                let orders = match config.store {
                    Store::Tma => &[Order::Grid, Order::Raster][..],
                    Store::Staged { .. } => &[Order::Grid],
                };
                for (stages, &order) in
                    [3, 5, 6, 8].into_iter().flat_map(|s| orders.iter().map(move |o| (s, o)))
                {
                    let config = sm90::Config { stages, order, ..config };
                    if config.check(HOPPER.shared_per_block).is_err() {
                        continue;
                    }
                    let got = tune::w4_matmul(&x, &case.weight, &options, Some(config.into()))?;
                    case.check(&config.name(), &x, &got, |_, x| x)?;
                    count[0] += 1;
                    count[1] += u32::from(config.teams > 1);
                    count[2] += u32::from(stages == 3 && config.blocks_per_sm == 1);
                }
            }
        }
    }
    assert!(count.into_iter().all(|count| count > 3), "{count:?} rings");
    Ok(())
}

#[test]
fn w4_bias_and_activation() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (n, bias_dtype) in [(72, DType::F16), (65, DType::F32)] {
        let case = Case::new(&gpu, INT4, [384, n])?;
        let bias =
            Source::new("bias", &gpu).tensor(bias_dtype, &[n], super::suites::Layout::Plain)?;
        let steps = Nd::of(&bias)?;
        let options = MatmulOptions::default().bias(bias).activation(Activation::Relu);
        let options = options.out_dtype(DType::F32);
        for m in [5, 70] {
            let x = case.x(&gpu, m, DType::F16)?;
            let got = tune::w4_matmul(&x, &case.weight, &options, None)?;
            case.check("bias", &x, &got, |col, sum| (sum + steps.data[col]).max(0.0))?;
        }
    }
    Ok(())
}

/// Rows of `x`, of scales and of zero points that lie apart, or begin anywhere.
#[test]
fn w4_views() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let scheme = Scheme { zeros: true, ..INT4 };
    let case = Case::new(&gpu, scheme, [256, 72])?;
    let wide = |t: &Tensor, before: usize, after: usize| -> Result<Tensor> {
        let (rows, cols) = t.dims2()?;
        let host = t.to_device(&Device::Cpu)?;
        let apart = Tensor::zeros((rows, before + cols + after), t.dtype(), &Device::Cpu)?;
        let apart = apart.slice_assign(&[0..rows, before..before + cols], &host)?;
        apart.to_device(&gpu)?.narrow(1, before, cols)
    };
    let options = MatmulOptions::default().out_dtype(DType::F32);
    for (m, (before, after)) in [(4, (8, 8)), (4, (1, 3)), (70, (8, 8)), (70, (1, 3))] {
        let x = case.x(&gpu, m, DType::F16)?;
        let zeros = case.weight.zeros.as_ref();
        let weight = W4 {
            scales: wide(&case.weight.scales, before, after)?,
            zeros: zeros.map(|zeros| wide(zeros, 2 * before, 2 * after)).transpose()?,
            ..case.weight.clone()
        };
        let view = wide(&x, before, after)?;
        let got = tune::w4_matmul(&view, &weight, &options, None)?;
        case.check(&format!("{before} {after}"), &x, &got, |_, x| x)?;
    }
    Ok(())
}

/// What users hold.
const SCHEMES: [QuantScheme; 4] = [
    QuantScheme::Int4 { group: 128, zero_points: false },
    QuantScheme::Int4 { group: 32, zero_points: true },
    QuantScheme::Int4 { group: -1, zero_points: true },
    QuantScheme::Nf4 { block: 64 },
];

/// What users hold: packed by the first product, and in no other form then; back as it was.
#[test]
fn w4_weights_of_users() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    for (i, scheme) in SCHEMES.into_iter().enumerate() {
        for (k, n) in [(256, 128), (200, 72)] {
            let mut source = Source::new(&format!("{scheme:?} {k} {n}"), &Device::Cpu);
            let plain = super::suites::Layout::Plain;
            let w = source.tensor(DType::BF16, &[k, n], plain)?;
            let host = QuantWeight::quantize(&w, &scheme)?;
            let weight = host.to_device(&gpu)?;
            let dtype = [DType::F16, DType::BF16][i % 2];
            for rows in [&[1][..], &[2, 3], &[5, 4, 7]] {
                let x = source.tensor(dtype, &[rows, &[k]].concat(), plain)?;
                let got = x.to_device(&gpu)?.kaio_matmul_quant(&weight)?;
                let want = x.kaio_matmul_quant(&host)?;
                let last = ulp(dtype, Nd::of(&want)?.peak());
                close(&format!("{scheme:?} {rows:?}"), &got, &Nd::of(&want)?, |_| 2.0 * last)?;
            }
            let blocks = k.div_ceil(64) * n.div_ceil(64) * 2048;
            let others = host.bytes() - k.div_ceil(8) * 4 * n;
            // Rows of zero points are of whole 16 columns.
            let more = match scheme {
                QuantScheme::Int4 { group: -1, zero_points: true } => 1,
                QuantScheme::Int4 { group, zero_points: true } => k.div_ceil(group as usize),
                _ => 0,
            } * (n.next_multiple_of(16) - n);
            assert_eq!(weight.bytes(), blocks + others + more, "{scheme:?}");
            let back = weight.to_device(&Device::Cpu)?.dequantize(DType::F32)?;
            let want = Nd::of(&host.dequantize(DType::F32)?)?;
            identical(&format!("{scheme:?}"), &back, &want)?;
            identical(&format!("{scheme:?}"), &weight.dequantize(DType::F32)?, &want)?;
        }
    }
    Ok(())
}

/// Products with several weights of four or eight bits, by one kernel.
#[test]
fn w4_projections() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let plain = super::suites::Layout::Plain;
    let bytes = [
        QuantScheme::Int8 { per: Per::Channel },
        QuantScheme::Fp8 { per: Per::Tensor },
        QuantScheme::Fp8 { per: Per::Block },
    ];
    for (i, scheme) in SCHEMES.into_iter().chain(bytes).enumerate() {
        for (k, widths) in [(256, [192, 64, 64]), (600, [72, 65, 1]), (136, [1, 130, 64])] {
            let mut source = Source::new(&format!("{scheme:?} {widths:?}"), &Device::Cpu);
            let mut weight = |n| -> Result<[QuantWeight; 2]> {
                let w = source.tensor(DType::BF16, &[k, n], plain)?;
                let host = QuantWeight::quantize(&w, &scheme)?;
                Ok([host.to_device(&gpu)?, host])
            };
            let [q, key, v] = [weight(widths[0])?, weight(widths[1])?, weight(widths[2])?];
            let widest = if widths[0] > widths[1] { 0 } else { 1 };
            let other = weight(widths[widest])?;
            for m in [1, 5, 16, 40, 150] {
                let dtype = [DType::F16, DType::BF16][(i + m) % 2];
                let x = source.tensor(dtype, &[m, k], plain)?;
                let on_gpu = x.to_device(&gpu)?;
                // In f64, and of elements that are rounded to the dtype of x.
                let exact = |[_, w]: &[QuantWeight; 2]| -> Result<[Nd; 2]> {
                    let value = Nd::of(&w.dequantize(DType::F32)?)?;
                    let rounded = Nd::of(&value.tensor(dtype)?)?;
                    Ok([value, rounded].map(|w| product(&Nd::of(&x).expect("a matrix"), &w)))
                };
                let error =
                    |[want, rounded]: &[Nd; 2]| want.max_error(&rounded.tensor(DType::F32)?);
                let near = |what: &str, got: &Tensor, want: &Nd, error: f64| {
                    let allowed = 2.0 * error;
                    let last = ulp(dtype, want.peak());
                    close(&format!("{what} {scheme:?} {widths:?} {m}"), got, want, |_| {
                        allowed + last
                    })
                };
                let got: [Tensor; 3] = on_gpu.kaio_qkv_project([&q[0], &key[0], &v[0]])?.into();
                let want = [exact(&q)?, exact(&key)?, exact(&v)?];
                // Of all three: a single column may be near by chance.
                let errors = want.iter().map(error).collect::<Result<Vec<_>>>()?;
                let largest = errors.into_iter().fold(0.0, f64::max);
                for (got, [want, _]) in got.iter().zip(&want) {
                    near("projection", got, want, largest)?;
                }
                // One kernel where there are few rows; else both products are rounded before.
                let gate = [&q, &key][widest];
                let round = |nd: Nd| Nd::of(&nd.tensor(dtype)?);
                let ([mut want, rounded], [by, up]) = (exact(gate)?, exact(&other)?);
                let mut rounded = round(rounded)?;
                for (sums, by) in [(&mut want, by), (&mut rounded, round(up)?)] {
                    let both = sums.data.iter_mut().zip(by.data);
                    both.for_each(|(gate, up)| *gate *= up / (1.0 + (-*gate).exp()));
                }
                let got = on_gpu.kaio_swiglu_project(&gate[0], &other[0])?;
                let both = [want, rounded];
                near("gated", &got, &both[0], error(&both)?)?;
            }
        }
    }
    Ok(())
}
