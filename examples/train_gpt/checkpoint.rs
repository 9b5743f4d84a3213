//! A training run in a safetensors file: the weights, the state of the optimizer, and the losses so
//! far; or, before it, the weights and all batches.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Result, Tensor, bail, safetensors};
use kaio_candle::train::AdamW;

use crate::args::Args;
use crate::data::Corpus;
use crate::model::{Config, Family, Gpt};
use crate::ops::Arithmetic;
use crate::train::batch_rng;

const LOSSES: &str = "run.losses";
const CONFIG: &str = "run.config";
/// Each step's windows of text with the byte that follows: u8 `[steps, batch, seq + 1]`.
const WINDOWS: &str = "run.windows";
/// The peak learning rate.
const RATE: &str = "run.rate";

/// Writes the run to `path`.
pub fn save(
    path: &Path,
    model: &Gpt,
    optimizer: &AdamW,
    losses: &[f32],
    device: &Device,
) -> Result<()> {
    let mut tensors = optimizer.state()?;
    for (name, var) in model.parameters() {
        tensors.insert(name.clone(), var.as_tensor().clone());
    }
    tensors.insert(LOSSES.into(), Tensor::new(losses, device)?);
    tensors.insert(CONFIG.into(), Tensor::new(numbers(model.config()), device)?);
    // A run that is killed while it writes must not take the previous checkpoint with it.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".unfinished");
    safetensors::save(&tensors, &unfinished)?;
    Ok(std::fs::rename(unfinished, path)?)
}

/// Writes what a run begins with, and what it will see, so that another program can train the same model.
pub fn export(path: &Path, args: &Args, corpus: &Corpus) -> Result<()> {
    if args.model.vocabulary != 256 {
        bail!("--export is for models of bytes")
    }
    let model = Gpt::new(args.model, Arithmetic::Reference, args.seed, &args.device)?;
    let parameters = model.parameters().iter();
    let mut tensors: HashMap<_, _> =
        parameters.map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
    let batches = (0..args.steps).map(|step| {
        let mut rng = batch_rng(args.seed, step);
        corpus.training_windows(&mut rng, args.batch).concat()
    });
    let windows: Vec<u8> = batches.collect::<Vec<_>>().concat().iter().map(|&b| b as u8).collect();
    let shape = (args.steps, args.batch, args.model.seq + 1);
    tensors.insert(WINDOWS.into(), Tensor::from_vec(windows, shape, &Device::Cpu)?);
    tensors.insert(CONFIG.into(), Tensor::new(numbers(args.model), &Device::Cpu)?);
    tensors.insert(RATE.into(), Tensor::new(&[args.rate], &Device::Cpu)?);
    safetensors::save(&tensors, path)
}

/// Fills the model and the optimizer from `path` and returns the losses of the steps done.
pub fn load(path: &Path, model: &Gpt, optimizer: &mut AdamW, device: &Device) -> Result<Vec<f32>> {
    let tensors = match safetensors::load(path, device) {
        Ok(tensors) => tensors,
        Err(error) => bail!("cannot read the checkpoint {}: {error}", path.display()),
    };
    let config = tensor(&tensors, CONFIG)?.to_vec1::<i64>()?;
    if config != numbers(model.config()) {
        bail!(
            "the checkpoint {} is of a model whose seq, layers, heads, dim, heads of keys, hidden width, vocabulary and family \
             are {config:?}, not {:?}",
            path.display(),
            numbers(model.config())
        )
    }
    for (name, var) in model.parameters() {
        var.set(tensor(&tensors, name)?)?;
    }
    let losses = tensor(&tensors, LOSSES)?.to_vec1::<f32>()?;
    optimizer.set_state(&tensors)?;
    Ok(losses)
}

fn tensor<'a>(tensors: &'a HashMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    match tensors.get(name) {
        Some(tensor) => Ok(tensor),
        None => bail!("the checkpoint has no tensor {name}"),
    }
}

fn numbers(config: Config) -> Vec<i64> {
    let Config { family, vocabulary, seq, layers, heads, kv_heads, dim, hidden } = config;
    let family = match family {
        Family::Gpt { biases } => usize::from(biases),
        Family::Llama => 2,
    };
    let all = [seq, layers, heads, dim, kv_heads, hidden, vocabulary, family];
    all.iter().map(|&number| number as i64).collect()
}
