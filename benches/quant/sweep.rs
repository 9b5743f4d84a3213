//! Every candidate of the choosers on many problems, as lines of JSON: what their estimates are fitted to.

use std::io::Write;

use candle_core::{D, DType, Tensor};
use kaio_candle::MatmulOptions;
use kaio_candle::kernel::gemm::Epilogue;
use kaio_candle::kernel::w4::{Codes, Problem, Scheme, candidates};
use kaio_candle::kernel::{Device, Element};
use kaio_candle::ptx::{Half, Target};
use kaio_candle::tune::{self, W4};
use serde_json::json;

use super::common::Result;
use super::common::args::directory;
use super::common::gpu::Gpu;
use super::common::turns::median;

pub const H200: Device =
    Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };

pub fn run(gpu: &mut Gpu, filter: &str) -> Result<()> {
    let directory = directory();
    std::fs::create_dir_all(&directory)?;
    let mut file = std::fs::File::create(directory.join("quant-sweep.jsonl"))?;
    let half = Element::Half(Half::Bf16);
    let int4 = Scheme { codes: Codes::Int4, zeros: false, scale: half, group: Some(128) };
    let small = Scheme { zeros: true, group: Some(32), ..int4 };
    let nf4 = Scheme { codes: Codes::Nf4, group: Some(64), ..int4 };
    for (scheme, kind) in [(int4, "int4-g128"), (small, "int4-g32-zeros"), (nf4, "nf4-g64")] {
        for [n, k] in [[8192, 8192], [4096, 4096], [1024, 4096], [4096, 14336], [28672, 4096]] {
            let name = |m| format!("{m}x{n}x{k} {kind}");
            let wanted = |&m: &usize| filter == "all" || filter.split(',').any(|f| f == name(m));
            let rows = [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096];
            let rows: Vec<_> = rows.into_iter().filter(wanted).collect();
            if rows.is_empty() {
                continue;
            }
            let weight = weight(gpu, scheme, [k, n])?;
            for m in rows {
                let name = name(m);
                let epilogue = Epilogue::round(half);
                let [m64, n64, k64] = [m, n, k].map(|size| size as u64);
                let half = Half::Bf16;
                let problem = Problem {
                    m: m64,
                    n: n64,
                    others: [0; 2],
                    gated: false,
                    k: k64,
                    half,
                    scheme,
                    epilogue,
                };
                let x = Tensor::randn(0f32, 1., (m, k), &gpu.device)?.to_dtype(DType::BF16)?;
                let options = MatmulOptions::default().out_dtype(DType::BF16);
                let want = tune::w4_matmul(&x, &weight, &options, None)?.to_dtype(DType::F32)?;
                let largest = want.abs()?.max(D::Minus1)?.max_all()?.to_scalar::<f32>()?;
                let mut best: Option<(f64, String)> = None;
                for config in candidates(&problem, &H200) {
                    let only = std::env::var("KAIO_ONLY").unwrap_or_default();
                    if !only.split(',').any(|o| config.name().contains(o)) {
                        continue;
                    }
                    let mut run = || tune::w4_matmul(&x, &weight, &options, Some(config)).map(drop);
                    let got = tune::w4_matmul(&x, &weight, &options, Some(config))?;
                    let differs = (got.to_dtype(DType::F32)? - &want)?.abs()?.max_all()?;
                    let differs = differs.to_scalar::<f32>()?;
                    if differs.is_nan() || differs > largest / 32.0 {
                        println!("{name} {} DIFFERS by {differs}", config.name());
                    }
                    run()?;
                    let samples = (0..7).map(|_| gpu.time(m <= 64, &mut run));
                    let us = median(samples.collect::<candle_core::Result<Vec<_>>>()?);
                    println!("{name} {us:7.2} µs {}", config.name());
                    writeln!(file, "{}", json!({ "of": name, "us": us, "kernel": config.name() }))?;
                    if best.as_ref().is_none_or(|(fastest, _)| us < *fastest) {
                        best = Some((us, config.name()));
                    }
                }
                if let Some((us, config)) = best {
                    println!("{name} BEST {us:.2} µs {config}");
                }
            }
        }
    }
    super::sweep_bytes::run(gpu, filter, &mut file)
}

/// A random weight with scales in bf16.
fn weight(gpu: &Gpu, scheme: Scheme, size @ [k, n]: [usize; 2]) -> candle_core::Result<W4> {
    // SplitMix64.
    let mut state = (k * n) as u64;
    let words = (0..k.div_ceil(8) * n).map(|_| {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) as u32
    });
    let words = Tensor::from_iter(words, &gpu.device)?.reshape((k.div_ceil(8), n))?;
    let groups = scheme.groups(k as u64) as usize;
    let random = |most: f32| Tensor::rand(0f32, most, (groups, n), &gpu.device);
    let scales = (random(0.01)? + 0.005)?.to_dtype(DType::BF16)?;
    let zeros = || tune::w4_pack_zeros(&random(16.0)?.to_dtype(DType::U8)?);
    let zeros = scheme.zeros.then(zeros).transpose()?;
    let codes = tune::w4_pack(&words, size, &scheme)?;
    Ok(W4 { scheme, size, codes, scales, zeros })
}
