//! Configurations of the kernel on several lengths, as lines of JSON: what the chooser's rules are read
//! from.

use std::io::Write;

use candle_core::{DType, Tensor};
use kaio_candle::kernel::attention::choose;
use kaio_candle::kernel::attention::sm90::Config;
use kaio_candle::kernel::{self, Device};
use kaio_candle::ptx::Target;
use kaio_candle::tune;
use serde_json::json;

use super::common::Result;
use super::common::args::directory;
use super::common::gpu::Gpu;
use super::common::turns::median;
use super::rows::{TOKENS, WIDTH};

const H200: Device =
    Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };
/// The slowest of a length that are printed are so much slower than the fastest.
const NEAR: f64 = 1.03;

/// Those that differ from the chooser's in tiles and in what may overlap.
fn candidates(chosen: &Config) -> Vec<Config> {
    let mut all = Vec::new();
    for rows in [64, 128, 192] {
        for keys in (48..=208).step_by(16) {
            for pingpong in [false, true] {
                let config = Config { rows, keys, pingpong, ..*chosen };
                let config = config.filled(H200.shared_per_block);
                all.extend(config.check(H200.shared_per_block).is_ok().then_some(config));
            }
        }
    }
    all
}

/// `filter`: widths of heads, separated by commas.
pub fn run(gpu: &mut Gpu, filter: &str) -> Result<()> {
    let directory = directory();
    std::fs::create_dir_all(&directory)?;
    let mut file = std::fs::File::create(directory.join("sweep.jsonl"))?;
    for dim in filter.split(',') {
        let dim: usize = dim.parse()?;
        for causal in [false, true] {
            for length in [512, 1024, 2048, 4096, 8192] {
                let (batch, heads) = (TOKENS / length, (WIDTH + dim / 2) / dim);
                let random = || {
                    let dims = (batch, heads, length, dim);
                    Tensor::randn(0f32, 1., dims, &gpu.device)?.to_dtype(DType::BF16)
                };
                let (q, k, v) = (random()?, random()?, random()?);
                let inputs = [&q, &k, &v];
                let (want, problem) = tune::flash_attn(inputs, causal, None)?;
                let want = want.to_dtype(DType::F32)?;
                let chosen = choose::choose(&problem, &H200);
                let mut times = Vec::new();
                for config in candidates(&chosen) {
                    let call = || {
                        let config = Some(kernel::Config::FlashSm90(config));
                        tune::flash_attn(inputs, causal, config)
                    };
                    let (got, _) = call()?;
                    let mut run = || call().map(drop);
                    let differs = (got.to_dtype(DType::F32)? - &want)?.abs()?.max_all()?;
                    let differs = differs.to_scalar::<f32>()?;
                    // Roundings to bf16 of exponentials and of results below 4.
                    if differs.is_nan() || differs > 1.0 / 32.0 {
                        println!("{config:?} DIFFERS by {differs}");
                    }
                    let samples = (0..4).map(|_| gpu.time(false, &mut run));
                    let us = median(samples.collect::<candle_core::Result<Vec<_>>>()?);
                    times.push((us, config));
                    let Config { rows, keys, pingpong, stages, store_stages, .. } = config;
                    let line = json!({
                        "dim": dim, "causal": causal, "length": length, "us": us, "rows": rows,
                        "keys": keys, "pingpong": pingpong, "stages": stages, "store_stages": store_stages,
                    });
                    writeln!(file, "{line}")?;
                }
                times.sort_by(|a, b| a.0.total_cmp(&b.0));
                let fastest = times[0].0;
                println!("D{dim} {} S{length}", if causal { "causal" } else { "full" });
                for (us, c) in times.iter().filter(|(us, c)| *us < fastest * NEAR || *c == chosen) {
                    let turns = if c.pingpong { " ping-pong" } else { "" };
                    let mark = if *c == chosen { " chosen" } else { "" };
                    println!("  {us:8.1} µs {}x{} x{}{turns}{mark}", c.rows, c.keys, c.stages);
                }
            }
        }
    }
    Ok(())
}
