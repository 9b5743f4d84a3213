//! Fine-tunes a Llama by low-rank matrices beside its frozen weights (LoRA; Hu et al. 2021, arXiv 2106.09685), with this crate's
//! operations and its optimizer.
//!
//! ```text
//! cargo run --release --example lora_llama
//! cargo run --release --example lora_llama -- --base nf4 --recompute
//! cargo run --release --example lora_llama -- --help
//! cargo run --release --features cuda --example lora_llama -- --device cuda:0 \
//!     --model Llama-3.2-1B --text book.txt --merge Llama-3.2-1B-book
//! ```
//!
//! The model is a folder of Hugging Face's, read as candle-transformers reads it; model/ is what takes the place of its
//! `models::llama`, and a test in examples/llama compares both. Without one, a small Llama of bytes learns from this crate's
//! documents first, and is then taught its sources. The run ends with the loss on text that it has not seen, before and
//! after, and an adapter in the files of PEFT, from which it can go on.

mod args;
#[path = "../common/command.rs"]
mod command;
#[path = "../common/data.rs"]
mod data;
mod model;
mod random;
#[path = "../common/rng.rs"]
mod rng;
mod train;

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use args::{Args, Preset};
use candle_core::{DType, Device, Result, Tensor, Var, bail, safetensors};
use data::{Alphabet, Corpus};
use kaio_candle::train::{AdamW, AdamWConfig, Schedule, peak_memory, reset_peak_memory};
use model::peft::{self, Lora};
use model::{Config, Llama, Options, weights};
use rng::Rng;
use train::{Trainer, WARM_UP};

/// The state of the optimizer, beside the adapter.
const STATE: &str = "optimizer.safetensors";

fn main() -> ExitCode {
    command::exit(run())
}

fn run() -> std::result::Result<(), Box<dyn Error>> {
    let Some(args) = Args::parse()? else {
        return Ok(());
    };
    // Now, so that a path that cannot be written does not cost a whole run.
    let adapter_folder = args.out.join("adapter");
    fs::create_dir_all(&adapter_folder)
        .map_err(|e| format!("cannot make the folder {}: {e}", adapter_folder.display()))?;
    let folder = match (&args.model, &args.preset) {
        (Some(folder), _) => Some(folder.clone()),
        (None, Preset::Small) => Some(args.out.join("base")),
        (None, Preset::Random(_)) => None,
    };
    if let (Some(to), Some(from)) = (&args.merge, &folder) {
        if args.model.is_none() {
            fs::create_dir_all(from)?;
        }
        peft::other_folder(from, to)?;
    }
    // What can be wrong is read first, and the weights last.
    let config = config(&args)?;
    let corpus = corpus(args.model.as_deref(), &config, &args)?;
    let given = args.adapter.as_deref().map(Lora::load).transpose()?;
    if let (None, Some(base)) = (&args.model, &folder) {
        random::pretrain(base, &args)?;
    }
    let mut model = load(folder.as_deref(), config, &args)?;
    let lora = given.as_ref().map_or(&args.lora, |(lora, _)| lora);
    let vars = adapt(&mut model, lora, given.as_ref().map(|(_, tensors)| tensors), &args)?;
    let mut optimizer = optimizer(&vars, &args)?;
    let learnt: usize = vars.iter().map(|(_, var)| var.elem_count()).sum();
    println!(
        "{:.2} M parameters in matrices of rank {} learn beside {:.1} MB of frozen weights",
        learnt as f64 * 1e-6,
        lora.rank,
        model.bytes() as f64 * 1e-6
    );

    let trainer = Trainer { model: &model, corpus: &corpus, args: &args };
    let before = trainer.held_out()?;
    println!("before: loss on unseen text {before:.3} nats a token");
    reset_peak_memory(&args.device)?;
    let stop = args.stop.map_or(args.steps, |stop| stop.min(args.steps));
    let rate = trainer.run(&mut optimizer, stop)?;
    let peak = peak_memory(&args.device)?;
    let after = trainer.held_out()?;
    println!("after: loss on unseen text {after:.3} nats a token");
    if let Some(rate) = rate {
        println!("{rate:.0} tokens/s");
    }
    if let Some(bytes) = peak {
        println!("at most {:.2} GiB", bytes as f64 / f64::from(1 << 30));
    }

    let name = folder.as_deref().unwrap_or(Path::new("random")).display().to_string();
    lora.save(&adapter_folder, &name, &vars)?;
    weights::save(&optimizer.state()?, &adapter_folder.join(STATE))?;
    println!("adapter: {}", adapter_folder.display());
    if let (Some(to), Some(from)) = (&args.merge, &folder) {
        let tensors = vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
        lora.merge(&tensors.collect(), from, to)?;
        println!("merged model: {}", to.display());
    }
    Ok(())
}

fn config(args: &Args) -> Result<Config> {
    let config = match (&args.model, &args.preset) {
        (Some(folder), _) => weights::config(folder)?,
        (None, Preset::Random(config)) => Config::clone(config),
        (None, Preset::Small) => Config::SMALL,
    };
    if args.seq > config.max_position_embeddings {
        bail!("--seq {} is over the model's {}", args.seq, config.max_position_embeddings)
    }
    Ok(config)
}

fn load(folder: Option<&Path>, config: Config, args: &Args) -> Result<Llama> {
    let options = Options { base: args.base, seq: args.seq, recompute: args.recompute };
    match folder {
        Some(folder) => {
            let vb = weights::open(folder, args.dtype, &args.device)?;
            Llama::load(vb, config, options).map_err(|error| weights::of_file(folder, error))
        }
        None => random::model(config, options, args),
    }
}

/// The text, in the model's tokens: those of its tokenizer, or bytes.
fn corpus(folder: Option<&Path>, config: &Config, args: &Args) -> Result<Corpus> {
    let tokenizer = folder.map(|folder| folder.join("tokenizer.json"));
    let tokenizer: Option<PathBuf> = tokenizer.filter(|path| path.exists());
    let alphabet = Alphabet::new(tokenizer.as_deref(), config.vocab_size)?;
    match (&alphabet, folder) {
        (Alphabet::Numbers, Some(folder)) => {
            bail!(
                "there is no tokenizer.json in {}, and this is no model of bytes",
                folder.display()
            )
        }
        (Alphabet::Numbers, None) if args.text.is_some() => {
            bail!("this preset has no tokenizer: it is for timing, without --text")
        }
        (Alphabet::Bytes, _) if args.text.is_none() => {
            Corpus::of_this_crate(&["rs"], config.vocab_size, args.seq)
        }
        _ => Corpus::load(args.text.as_deref(), &alphabet, config.vocab_size, args.seq),
    }
}

/// Puts matrices beside the weights: those that are given, or at first normal ones (A) and zeros (B), with which the model is
/// what it was.
fn adapt(
    model: &mut Llama,
    lora: &Lora,
    given: Option<&HashMap<String, Tensor>>,
    args: &Args,
) -> Result<Vec<(String, Var)>> {
    let mut rng = Rng::new(args.seed, Rng::ADAPTER);
    let vars = model.adapt(lora, |name, dims| match given {
        Some(given) => match given.get(name) {
            Some(t) if t.dims2()? == dims => t.to_device(&args.device),
            Some(t) => bail!("the adapter's `{name}` is {:?}, and the model's {dims:?}", t.dims()),
            None => bail!("the adapter has no `{name}`"),
        },
        None if name.ends_with("lora_B.weight") => Tensor::zeros(dims, DType::F32, &args.device),
        None => {
            let std = (dims.1 as f64).powf(-0.5);
            Tensor::from_vec(rng.normals(dims.0 * dims.1, std), dims, &args.device)
        }
    })?;
    let known = |name: &String| vars.iter().any(|(var, _)| var == name);
    match given.and_then(|given| given.keys().find(|name| !known(name))) {
        Some(name) => bail!("the adapter has a `{name}`, which the model has not"),
        None => Ok(vars),
    }
}

/// AdamW of the adapter, which goes on as that was left which is in the folder of the adapter, if one is.
fn optimizer(vars: &[(String, Var)], args: &Args) -> Result<AdamW> {
    let schedule = Schedule::cosine(args.steps as u64).warm_up(WARM_UP).floor(0.1);
    let config = AdamWConfig::default().lr(args.rate).weight_decay(0.0).clip_norm(1.0);
    let mut optimizer = AdamW::named(vars.iter().cloned(), config.schedule(schedule))?;
    if let Some(path) = args.adapter.as_ref().map(|folder| folder.join(STATE)) {
        match path.exists() {
            true => optimizer.set_state(&safetensors::load(path, &Device::Cpu)?)?,
            false => println!("there is no {STATE} beside the adapter: the optimizer begins anew"),
        }
        println!("goes on after {} steps", optimizer.steps());
    }
    Ok(optimizer)
}
