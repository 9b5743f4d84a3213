//! Attention of kaio-candle in a Llama of candle-transformers: the same weights, the same logits.
//!
//! ```text
//! cargo run --release --manifest-path examples/llama/Cargo.toml
//! cargo run --release --manifest-path examples/llama/Cargo.toml --features cuda -- cuda
//! ```
//!
//! There are two ways to swap it. In a model file of your own: swapped.rs. Or below the models of
//! candle-transformers as they are: the patch in Cargo.toml, which needs the feature `cuda`.

mod swapped;

use std::time::Instant;

use candle_core::{DType, Device, Result, Tensor, bail};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::llama::{Cache, Config, Llama};
use swapped::{Forward, Load};

const BATCH: usize = 2;
const VOCABULARY: usize = 4096;
/// Tokens of each call: a prompt and more of it, then one by one.
const CALLS: [&[usize]; 2] = [&[384, 128], &[1; 16]];

fn original(vb: VarBuilder, config: &Config) -> Result<Forward> {
    let mut cache = Cache::new(true, vb.dtype(), config, vb.device())?;
    let model = Llama::load(vb, config)?;
    Ok(Box::new(move |tokens, position| model.forward(tokens, position, &mut cache)))
}

/// The logits of all calls, and the tokens per second of the prompt and of those one by one.
fn run(mut model: Forward, device: &Device) -> Result<(Vec<f32>, [f64; 2])> {
    let (mut logits, mut position, mut speeds) = (Vec::new(), 0, [0.; 2]);
    for (speed, calls) in speeds.iter_mut().zip(CALLS) {
        let (start, first) = (Instant::now(), position);
        for &seq in calls {
            let ids = (0..BATCH * seq).map(|i| ((position * BATCH + i) * 7919 % VOCABULARY) as u32);
            logits.push(model(&Tensor::from_iter(ids, device)?.reshape((BATCH, seq))?, position)?);
            position += seq;
        }
        device.synchronize()?;
        *speed = (BATCH * (position - first)) as f64 / start.elapsed().as_secs_f64();
    }
    Ok((Tensor::cat(&logits, 0)?.flatten_all()?.to_vec1()?, speeds))
}

/// The largest magnitude, NaN if there is one.
fn largest(numbers: impl Iterator<Item = f32>) -> f32 {
    numbers.map(f32::abs).max_by(f32::total_cmp).unwrap_or(0.)
}

fn main() -> Result<()> {
    let device = match std::env::args().nth(1).as_deref() {
        None | Some("cpu") => Device::Cpu,
        Some("cuda") => Device::new_cuda(0)?,
        Some(other) => bail!("expected cpu or cuda, not {other:?}"),
    };
    let mut config = Config::config_7b_v2(false);
    (config.hidden_size, config.intermediate_size, config.vocab_size) = (512, 1408, VOCABULARY);
    (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) = (4, 8, 2);
    let patched = Config { use_flash_attn: true, ..config.clone() };

    // A model that is loaded from an empty map fills it, at random. Any bf16 is an f32 as well.
    let map = VarMap::new();
    Llama::load(VarBuilder::from_varmap(&map, DType::BF16, &Device::Cpu), &config)?;
    let map = map.data().lock().unwrap();
    let weights = |dtype| {
        let tensors = map.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
        VarBuilder::from_tensors(tensors.collect(), dtype, &device)
    };

    let (exact, _) = run(original(weights(DType::F32), &config)?, &device)?;
    let measure = |dtype: DType, name: &str, load: Load, config: &Config| -> Result<f32> {
        run(load(weights(dtype), config)?, &device)?; // compiles kernels
        let (logits, [prompt, then]) = run(load(weights(dtype), config)?, &device)?;
        let error = largest(logits.iter().zip(&exact).map(|(a, b)| a - b));
        print!("{:<6} {name:<20} {prompt:>15.0} {then:>13.0}  {error:.1e}", dtype.as_str());
        Ok(error)
    };
    let ours: [(_, Load, _); 2] =
        [("swapped", swapped::llama, &config), ("patched", original, &patched)];
    let ways = if cfg!(feature = "cuda") { 2 } else { 1 };
    println!("       attention            prompt tokens/s  one by one  away from f32's logits");
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        // Sums in another order may move a logit by 200 of f32's epsilons, and a narrower dtype may
        // move it twice as far as candle-transformers' own.
        let own = measure(dtype, "candle-transformers", original, &config)?;
        let allowed = 200. * f32::EPSILON * largest(exact.iter().copied()) + 2. * own;
        println!();
        for &(name, load, config) in &ours[..ways] {
            let error = measure(dtype, name, load, config)?;
            println!(" of {allowed:.1e}");
            if !error.is_finite() || error > allowed {
                bail!("{name}, {dtype:?}: a logit is {error:.1e} away, {allowed:.1e} is allowed")
            }
        }
    }
    Ok(())
}
