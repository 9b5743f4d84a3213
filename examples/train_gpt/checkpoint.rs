//! A training run in a safetensors file: the weights, the state of the optimizer, and the losses so
//! far.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{Device, Result, Tensor, bail, safetensors};

use crate::model::{Gpt, GptConfig};
use crate::optim::Optimizer;

const LOSSES: &str = "run.losses";
const CONFIG: &str = "run.config";

/// Writes the run to `path`, and lets it go on from what was written, as a resumed run would.
pub fn save(
    path: &Path,
    model: &Gpt,
    optimizer: &mut Optimizer,
    losses: &[f32],
    device: &Device,
) -> Result<()> {
    let mut tensors = optimizer.state()?;
    optimizer.set_state(&tensors, losses.len())?;
    for (name, var) in model.parameters() {
        tensors.insert(name.clone(), var.as_tensor().clone());
    }
    tensors.insert(LOSSES.into(), Tensor::new(losses, device)?);
    tensors.insert(CONFIG.into(), Tensor::new(&numbers(model.config()), device)?);
    // A run that is killed while it writes must not take the previous checkpoint with it.
    let mut unfinished = path.as_os_str().to_owned();
    unfinished.push(".unfinished");
    safetensors::save(&tensors, &unfinished)?;
    Ok(std::fs::rename(unfinished, path)?)
}

/// Fills the model and the optimizer from `path` and returns the losses of the steps done.
pub fn load(
    path: &Path,
    model: &Gpt,
    optimizer: &mut Optimizer,
    device: &Device,
) -> Result<Vec<f32>> {
    let tensors = match safetensors::load(path, device) {
        Ok(tensors) => tensors,
        Err(error) => bail!("cannot read the checkpoint {}: {error}", path.display()),
    };
    let config = tensor(&tensors, CONFIG)?.to_vec1::<i64>()?;
    if config != numbers(model.config()) {
        bail!(
            "the checkpoint {} is of a model whose --seq, --layers, --heads, --dim are {config:?}, not {:?}",
            path.display(),
            numbers(model.config())
        )
    }
    for (name, var) in model.parameters() {
        var.set(tensor(&tensors, name)?)?;
    }
    let losses = tensor(&tensors, LOSSES)?.to_vec1::<f32>()?;
    optimizer.set_state(&tensors, losses.len())?;
    Ok(losses)
}

fn tensor<'a>(tensors: &'a HashMap<String, Tensor>, name: &str) -> Result<&'a Tensor> {
    match tensors.get(name) {
        Some(tensor) => Ok(tensor),
        None => bail!("the checkpoint has no tensor {name}"),
    }
}

fn numbers(config: GptConfig) -> [i64; 4] {
    [config.seq, config.layers, config.heads, config.dim].map(|number| number as i64)
}
