//! Adapters in the files of PEFT (`adapter_config.json`, `adapter_model.safetensors`), and weights to which they are added.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device, Error, Result, Tensor, Var, bail};
use serde_json::{Value, json};

use super::LINEARS;
use super::weights;

const CONFIG: &str = "adapter_config.json";
const TENSORS: &str = "adapter_model.safetensors";
/// Before the names of a model's tensors.
const PREFIX: &str = "base_model.model.";

/// What an adapter is: matrices of a rank beside some weights, whose product is added times `alpha / rank`.
#[derive(Clone, Debug, PartialEq)]
pub struct Lora {
    pub rank: usize,
    pub alpha: f64,
    /// The last parts of the names of those weights: `q_proj`, say.
    pub targets: Vec<String>,
}

impl Lora {
    pub fn new(rank: usize, alpha: f64, targets: Vec<String>) -> Result<Self> {
        let lora = Self { rank, alpha, targets };
        for target in &lora.targets {
            if !LINEARS.iter().any(|name| is(name, target)) {
                bail!("there is no `{target}` to adapt, but {}", LINEARS.join(", "))
            }
        }
        if rank == 0 || lora.targets.is_empty() {
            bail!("an adapter of rank {rank} for {} weights of a layer", lora.targets.len())
        }
        Ok(lora)
    }

    pub fn scale(&self) -> f64 {
        self.alpha / self.rank as f64
    }

    /// Whether a weight of a layer is adapted: `self_attn.q_proj`, say.
    pub fn is_for(&self, name: &str) -> bool {
        self.targets.iter().any(|target| is(name, target))
    }

    /// Reads an adapter from its folder: what it is, and its tensors by the model's names for them.
    pub fn load(folder: &Path) -> Result<(Self, HashMap<String, Tensor>)> {
        let path = folder.join(CONFIG);
        let config: Value = serde_json::from_slice(&weights::read(&path)?).map_err(Error::wrap)?;
        let lora = Self::from_json(&config).map_err(|error| weights::of_file(&path, error))?;
        let path = folder.join(TENSORS);
        let tensors = candle_core::safetensors::load(&path, &Device::Cpu);
        let tensors = tensors.map_err(|error| weights::of_file(&path, error))?.into_iter();
        let named = tensors.map(|(name, t)| match name.strip_prefix(PREFIX) {
            Some(name) => Ok((name.to_owned(), t.to_dtype(DType::F32)?)),
            None => bail!("{}: `{name}` does not begin with {PREFIX}", path.display()),
        });
        Ok((lora, named.collect::<Result<_>>()?))
    }

    fn from_json(config: &Value) -> Result<Self> {
        // What would be another model, unless it is absent, null, empty or false.
        let others = [
            "use_dora",
            "use_rslora",
            "lora_bias",
            "fan_in_fan_out",
            "modules_to_save",
            "exclude_modules",
            "layer_replication",
        ];
        let others =
            others.into_iter().chain(["rank_pattern", "alpha_pattern", "layers_to_transform"]);
        for name in others {
            let value = &config[name];
            let unset = matches!(value, Value::Null | Value::Bool(false))
                || value.as_array().is_some_and(Vec::is_empty)
                || value.as_object().is_some_and(|map| map.is_empty());
            if !unset {
                bail!("`{name}` is {value}, and adapters here have none")
            }
        }
        for (name, want) in [("peft_type", "LORA"), ("bias", "none")] {
            if config[name].as_str().is_some_and(|value| value != want) {
                bail!("`{name}` is {}, and adapters here have {want}", config[name])
            }
        }
        // PiSSA, OLoRA, LoftQ and others take from the weights what A and B begin with.
        let init = &config["init_lora_weights"];
        if init.as_str().is_some_and(|init| !["gaussian", "orthogonal", "eva"].contains(&init)) {
            bail!(
                "`init_lora_weights` is {init}: such an adapter belongs to other weights than the model's"
            )
        }
        let (Some(rank), Some(alpha)) = (config["r"].as_u64(), config["lora_alpha"].as_f64())
        else {
            bail!("`r` or `lora_alpha` is missing, or not a number")
        };
        let targets = match &config["target_modules"] {
            Value::String(all) if all == "all-linear" => LINEARS.map(|name| json!(name)).to_vec(),
            Value::Array(names) => names.clone(),
            other => bail!("`target_modules` is {other}, and not a list of names"),
        };
        let targets = targets.iter().map(|name| name.as_str().unwrap_or_default().to_owned());
        Self::new(rank as usize, alpha, targets.collect())
    }

    /// Writes an adapter of the model called `base` to its folder.
    pub fn save(&self, folder: &Path, base: &str, vars: &[(String, Var)]) -> Result<()> {
        let config = json!({
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": 0.0,
            "target_modules": self.targets,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "modules_to_save": null,
            "use_dora": false,
            "use_rslora": false,
        });
        fs::write(folder.join(CONFIG), format!("{config:#}\n"))?;
        let tensors =
            vars.iter().map(|(name, var)| (format!("{PREFIX}{name}"), var.as_tensor().clone()));
        weights::save(&tensors.collect(), &folder.join(TENSORS))
    }

    /// Writes the model in the folder `from` to the folder `to`, with `scale · B·A` added to its weights: in f32, rounded once.
    /// `adapter` has A and B by their names.
    pub fn merge(&self, adapter: &HashMap<String, Tensor>, from: &Path, to: &Path) -> Result<()> {
        other_folder(from, to)?;
        for path in weights::files(from)? {
            let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
            for (name, weight) in &mut tensors {
                let part = |part| {
                    let module = name.strip_suffix("weight")?;
                    adapter.get(&format!("{module}{part}.weight"))
                };
                if let (Some(a), Some(b)) = (part("lora_A"), part("lora_B")) {
                    let [a, b] = [a, b].map(|t| t.to_device(&Device::Cpu));
                    let change = (b?.matmul(&a?)? * self.scale())?;
                    *weight = (weight.to_dtype(DType::F32)? + change)?.to_dtype(weight.dtype())?;
                }
            }
            weights::save(&tensors, &to.join(path.file_name().unwrap_or_default()))?;
        }
        // The configuration, the tokenizer, and which tensors are in which file.
        for entry in fs::read_dir(from)? {
            let path = entry?.path();
            let ends = path.extension().unwrap_or_default();
            if ends == "json" || ends == "model" || ends == "jinja" {
                fs::copy(&path, to.join(path.file_name().unwrap_or_default()))?;
            }
        }
        Ok(())
    }
}

/// Makes the folder `to`, which is not `from`.
pub fn other_folder(from: &Path, to: &Path) -> Result<()> {
    let named = |folder: &Path, e| Error::msg(format!("{}: {e}", folder.display()));
    fs::create_dir_all(to).map_err(|e| named(to, e))?;
    let [a, b] = [from, to].map(|folder| fs::canonicalize(folder).map_err(|e| named(folder, e)));
    if a? == b? {
        bail!("{} has the weights that are read", to.display())
    }
    Ok(())
}

/// As PEFT compares them: whole, or a whole part at the end.
fn is(name: &str, target: &str) -> bool {
    name.strip_suffix(target).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}
