//! The same of codes of eight bits: products with 16-bit activations, and with codes of the same kind.

use std::fs::File;
use std::io::Write;

use candle_core::{DType, Tensor};
use kaio_candle::MatmulOptions;
use kaio_candle::kernel::gemm::{self, Epilogue, choose};
use kaio_candle::kernel::w4::{self, Codes, Scheme};
use kaio_candle::kernel::{Config, Element};
use kaio_candle::ptx::Half;
use kaio_candle::tune::{self, W4};
use serde_json::json;

use super::codes::{e4m3, int8_codes};
use super::common::Result;
use super::common::gpu::Gpu;
use super::common::turns::median;
use super::sweep::H200;

const SIZES: [[usize; 2]; 4] = [[8192, 8192], [4096, 4096], [4096, 14336], [28672, 4096]];

pub fn run(gpu: &mut Gpu, filter: &str, file: &mut File) -> Result<()> {
    let wanted = |name: &str| filter == "all" || filter.split(',').any(|f| f == name);
    for (int8, blocks, kind) in
        [(true, false, "int8"), (false, false, "fp8"), (false, true, "fp8-blocks")]
    {
        for [n, k] in SIZES {
            let name = |m: usize, activations| format!("{m}x{n}x{k} {kind}-{activations}");
            let rows = [1, 4, 8, 16, 32, 64, 128, 256, 1024, 4096];
            let some = |m| wanted(&name(m, "16")) || wanted(&name(m, "8"));
            if !rows.into_iter().any(some) {
                continue;
            }
            let codes = |gpu: &Gpu, rows| -> candle_core::Result<Tensor> {
                let (codes, _) = match int8 {
                    true => int8_codes(gpu, rows, k)?,
                    false => e4m3(&Tensor::randn(0f32, 1., (rows, k), &gpu.device)?)?,
                };
                Ok(codes)
            };
            let weight = codes(gpu, n)?;
            let [depth, across] = [k, n].map(|len| len.div_ceil(128));
            let scales = if blocks { (depth, across) } else { (1, n) };
            let scales = Tensor::rand(0.005f32, 0.015, scales, &gpu.device)?;
            let floats = W4 {
                scheme: Scheme {
                    codes: if int8 { Codes::Int8 } else { Codes::E4m3 },
                    zeros: false,
                    scale: Element::F32,
                    group: blocks.then_some(128),
                },
                size: [k, n],
                codes: weight.clone(),
                scales: scales.clone(),
                zeros: None,
            };
            for m in rows {
                let of = name(m, "16");
                if wanted(&of) {
                    let x = Tensor::randn(0f32, 1., (m, k), &gpu.device)?.to_dtype(DType::BF16)?;
                    let options = MatmulOptions::default().out_dtype(DType::BF16);
                    let epilogue = Epilogue::round(Element::Half(Half::Bf16));
                    let [m64, n64, k64] = [m, n, k].map(|size| size as u64);
                    let (half, scheme) = (Half::Bf16, floats.scheme);
                    let problem = w4::Problem {
                        m: m64,
                        n: n64,
                        others: [0; 2],
                        gated: false,
                        k: k64,
                        half,
                        scheme,
                        epilogue,
                    };
                    let product = |config| tune::w4_matmul(&x, &floats, &options, Some(config));
                    compare(gpu, file, &of, m, w4::candidates(&problem, &H200), product)?;
                }
                let of = name(m, "8");
                if wanted(&of) {
                    let x = codes(gpu, m)?;
                    let of_x = if blocks { (m, depth) } else { (m, 1) };
                    let of_x = Tensor::rand(0.005f32, 0.015, of_x, &gpu.device)?;
                    let [of_x, of_w] = match blocks {
                        true => [of_x, scales.clone()],
                        false => [of_x.flatten_all()?, scales.flatten_all()?],
                    };
                    let product =
                        |config| tune::matmul_bytes([&x, &weight], [&of_x, &of_w], int8, config);
                    let (_, problem) = product(None)?;
                    let all = of_bytes(&problem);
                    compare(gpu, file, &of, m, all, |config| Ok(product(Some(config))?.0))?;
                }
            }
        }
    }
    Ok(())
}

fn of_bytes(problem: &gemm::Problem) -> Vec<Config> {
    choose::candidates(problem, &H200).into_iter().map(Config::from).collect()
}

/// The times of all configurations, the fastest one last.
fn compare(
    gpu: &mut Gpu,
    file: &mut File,
    of: &str,
    m: usize,
    all: Vec<Config>,
    product: impl Fn(Config) -> candle_core::Result<Tensor>,
) -> Result<()> {
    let mut best: Option<(f64, String)> = None;
    for config in all {
        let mut run = || product(config).map(drop);
        run()?;
        let samples = (0..7).map(|_| gpu.time(m <= 64, &mut run));
        let us = median(samples.collect::<candle_core::Result<Vec<_>>>()?);
        println!("{of} {us:7.2} µs {}", config.name());
        writeln!(file, "{}", json!({ "of": of, "us": us, "kernel": config.name() }))?;
        if best.as_ref().is_none_or(|(fastest, _)| us < *fastest) {
            best = Some((us, config.name()));
        }
    }
    if let Some((us, config)) = best {
        println!("{of} BEST {us:.2} µs {config}");
    }
    Ok(())
}
