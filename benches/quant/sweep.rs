//! Every candidate of the choosers on many problems, as lines of JSON: what their estimates are fitted to.

use std::io::Write;

use candle_core::{D, DType};
use kaio_candle::MatmulOptions;
use kaio_candle::kernel::gemm::Epilogue;
use kaio_candle::kernel::w4::{Codes, Problem, candidates};
use kaio_candle::kernel::{Device, Element};
use kaio_candle::ptx::{Half, Target};
use kaio_candle::tune;
use serde_json::json;

use super::common::Result;
use super::common::args::directory;
use super::common::gpu::Gpu;
use super::common::turns::median;
use super::contest;
use super::rows::Weight;

const H200: Device =
    Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };

pub fn run(gpu: &mut Gpu, filter: &str) -> Result<()> {
    let directory = directory();
    std::fs::create_dir_all(&directory)?;
    let mut file = std::fs::File::create(directory.join("quant-sweep.jsonl"))?;
    let nf4 = Weight { codes: Codes::Nf4, zeros: false, group: Some(64) };
    let small = Weight { zeros: true, group: Some(32), ..Weight::INT4 };
    for weight in [Weight::INT4, small, nf4] {
        for [n, k] in [[8192, 8192], [4096, 4096], [1024, 4096], [4096, 14336], [28672, 4096]] {
            let scheme = weight.scheme(DType::BF16);
            let w4 = contest::weight(gpu, scheme, [k, n])?;
            for m in [1, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096] {
                let name = format!("{m}x{n}x{k} {}", weight.name().replace(' ', "-"));
                if filter != "all" && !filter.split(',').any(|f| f == name) {
                    continue;
                }
                let half = Element::Half(Half::Bf16);
                let epilogue = Epilogue::round(half);
                let [m64, n64, k64] = [m, n, k].map(|size| size as u64);
                let (half, scheme) = (Half::Bf16, w4.scheme);
                let problem = Problem { m: m64, n: n64, k: k64, half, scheme, epilogue };
                let x = contest::activations(gpu, m, k, DType::BF16)?;
                let options = MatmulOptions::default().out_dtype(DType::BF16);
                let want = tune::w4_matmul(&x, &w4, &options, None)?.to_dtype(DType::F32)?;
                let largest = want.abs()?.max(D::Minus1)?.max_all()?.to_scalar::<f32>()?;
                let mut best: Option<(f64, String)> = None;
                for config in candidates(&problem, &H200) {
                    let mut run = || tune::w4_matmul(&x, &w4, &options, Some(config)).map(drop);
                    let got = tune::w4_matmul(&x, &w4, &options, Some(config))?;
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
    Ok(())
}
