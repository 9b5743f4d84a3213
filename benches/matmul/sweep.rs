//! Every candidate of the chooser on many problems, as lines of JSON: what its estimate is fitted to.

use std::io::Write;

use candle_core::{DType, Tensor};
use kaio_candle::kernel::gemm::{choose, sm90};
use kaio_candle::kernel::{Config, Device};
use kaio_candle::ptx::Target;
use kaio_candle::tune;
use serde_json::json;

use super::common::Result;
use super::common::args::directory;
use super::common::gpu::Gpu;
use super::common::turns::median;

const WEIGHTS: [[usize; 2]; 5] =
    [[4096, 4096], [6144, 4096], [4096, 14336], [28672, 4096], [128256, 4096]];

/// M, N, K, whether B is column-major, the result's dtype.
fn problems() -> Vec<([usize; 3], bool, DType)> {
    let mut all = Vec::new();
    for m in [1, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384] {
        for [n, k] in WEIGHTS.into_iter().chain([[8192, 8192], [2048, 2048], [1024, 4096]]) {
            if m <= 16 || m == 64 || (m * n <= 1 << 23 && n != 4096 + 2048) {
                all.push(([m, n, k], false, DType::BF16));
            }
        }
    }
    for m in [512, 768, 1024, 2048] {
        for [n, k] in [[512, 2048], [1024, 4096], [4096, 4096], [6144, 4096], [4096, 14336]] {
            all.push(([m, n, k], false, DType::BF16));
        }
    }
    for n in [256, 384, 512, 640, 768, 1024, 1280, 1536, 1792, 2048, 2560, 3072, 4096] {
        all.push(([n, n, n], false, DType::BF16));
        all.push(([n, n, n], false, DType::F32));
    }
    for (m, n, k) in [
        (8192, 8192, 8192),
        (16384, 4096, 4096),
        (4096, 28672, 4096),
        (2000, 1504, 1000),
        (1504, 2000, 8200),
        (1999, 1504, 40),
    ] {
        for transposed in [false, true] {
            all.push(([m, n, k], transposed, DType::BF16));
            all.push(([m, n, k], transposed, DType::F32));
        }
    }
    all
}

const H200: Device =
    Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };

pub fn run(gpu: &mut Gpu, filter: &str) -> Result<()> {
    let directory = directory();
    std::fs::create_dir_all(&directory)?;
    let mut file = std::fs::File::create(directory.join("sweep.jsonl"))?;
    for ([m, n, k], transposed, out) in problems() {
        let name = format!("{m}x{n}x{k} {}", if transposed { "nt" } else { "nn" });
        if filter != "all" && !filter.split(',').any(|f| f == name) {
            continue;
        }
        let random = |dims: (usize, usize)| {
            Tensor::randn(0f32, 1., dims, &gpu.device)?.to_dtype(DType::BF16)
        };
        let a = random((m, k))?;
        let b = if transposed { random((n, k))?.t()? } else { random((k, n))? };
        let (_, problem) = tune::matmul(&a, &b, out, None)?;
        let candidates = choose::candidates(&problem, &H200);
        let (want, _) = tune::matmul(&a, &b, out, None)?;
        let want = want.to_dtype(DType::F32)?;
        gpu.device.synchronize()?;
        let mut best: Option<(f64, sm90::Config)> = None;
        for config in candidates {
            let mut run = || tune::matmul(&a, &b, out, Some(Config::MatmulSm90(config))).map(drop);
            if m * n <= 1 << 24 {
                let (got, _) = tune::matmul(&a, &b, out, Some(Config::MatmulSm90(config)))?;
                let differs = (got.to_dtype(DType::F32)? - &want)?.abs()?.max_all()?;
                let differs = differs.to_scalar::<f32>()?;
                // The order of the sum, and one rounding.
                if differs.is_nan() || differs > (k as f32).sqrt() / 16.0 {
                    println!("{name} {config:?} DIFFERS by {differs}");
                }
            }
            run()?;
            let samples = (0..4).map(|_| gpu.time(m <= 64, &mut run));
            let us = median(samples.collect::<candle_core::Result<Vec<_>>>()?);
            if best.is_none_or(|(fastest, _)| us < fastest) {
                best = Some((us, config));
            }
            let sm90::Config { orient, rows, cols, stages, split, blocks_per_sm, store, .. } =
                config;
            let line = json!({
                "m": m, "n": n, "k": k, "nt": transposed, "out": out.as_str(), "us": us,
                "orient": format!("{orient:?}"), "rows": rows, "cols": cols, "stages": stages,
                "split": split, "pingpong": config.pingpong,
                "slabs": config.store_stages, "order": format!("{:?}", config.order), "bps": blocks_per_sm, "tma": store == sm90::Store::Tma,
            });
            writeln!(file, "{line}")?;
        }
        let (us, c) = best.expect("a candidate");
        println!(
            "{name} {}: {us:.1} µs {:?} {}x{} split {} x{} stages {} {:?}{}",
            out.as_str(),
            c.orient,
            c.rows,
            c.cols,
            c.split,
            c.blocks_per_sm,
            c.stages,
            c.store,
            if c.pingpong { " pingpong" } else { "" }
        );
    }
    Ok(())
}
