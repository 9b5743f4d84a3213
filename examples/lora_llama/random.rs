//! Models of weights that nobody trained, and a small one that is taught to read before it is tuned.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::{collections::BTreeMap, fs};

use candle_core::{DType, Device, Result, Shape, Tensor, Var, bail};
use candle_nn::{Init, VarBuilder, var_builder::SimpleBackend};
use kaio_candle::train::{AdamW, AdamWConfig, Schedule};

use crate::args::Args;
use crate::data::Corpus;
use crate::model::{Base, Config, Llama, Options, weights};
use crate::rng::Rng;
use crate::train::{Trainer, WARM_UP};

/// Of the small model. The width of others says how large their weights are.
const STD: f64 = 0.05;
const RATE: f64 = 3e-3;

/// Tensors that are drawn when they are asked for.
struct Drawn {
    /// On the CPU, by a generator that a seed decides, and kept; else on the device.
    kept: Option<(Mutex<Rng>, Vars)>,
    layers: usize,
}

type Vars = Arc<Mutex<BTreeMap<String, Var>>>;

impl SimpleBackend for Drawn {
    fn get(
        &self,
        shape: Shape,
        name: &str,
        _: Init,
        dtype: DType,
        device: &Device,
    ) -> Result<Tensor> {
        if shape.rank() < 2 {
            return self.keep(name, Tensor::ones(shape, dtype, device)?);
        }
        let Some((rng, _)) = &self.kept else {
            let std = (shape.dims()[1] as f32).powf(-0.5);
            return Tensor::randn(0f32, std, shape, device)?.to_dtype(dtype);
        };
        // What is added to the residual stream is smaller, so that its variance does not grow with the depth (GPT-2).
        let adds = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        let std = if adds { STD / (2.0 * self.layers as f64).sqrt() } else { STD };
        let mut rng = rng.lock().unwrap_or_else(PoisonError::into_inner);
        let values = Tensor::from_vec(rng.normals(shape.elem_count(), std), shape, device)?;
        self.keep(name, values.to_dtype(dtype)?)
    }

    fn get_unchecked(&self, name: &str, _: DType, _: &Device) -> Result<Tensor> {
        bail!("a tensor {name} of what shape?")
    }

    fn contains_tensor(&self, _: &str) -> bool {
        true
    }
}

impl Drawn {
    fn keep(&self, name: &str, t: Tensor) -> Result<Tensor> {
        let Some((_, vars)) = &self.kept else { return Ok(t) };
        let var = Var::from_tensor(&t)?;
        let t = var.as_tensor().clone();
        vars.lock().unwrap_or_else(PoisonError::into_inner).insert(name.to_owned(), var);
        Ok(t)
    }
}

/// A model to time: of weights as large as trained ones.
pub fn model(config: Config, options: Options, args: &Args) -> Result<Llama> {
    let drawn = Drawn { kept: None, layers: config.num_hidden_layers };
    let vb = VarBuilder::from_backend(Box::new(drawn), args.dtype, args.device.clone());
    Llama::load(vb, config, options)
}

/// Trains all weights of the small model on the documents of this crate, and writes it to a folder as a model of
/// Hugging Face's.
pub fn pretrain(folder: &Path, args: &Args) -> Result<()> {
    let config = Config::SMALL;
    let corpus = Corpus::of_this_crate(&["md"], config.vocab_size, args.seq)?;
    let vars = Vars::default();
    let rng = Mutex::new(Rng::new(args.seed, Rng::WEIGHTS));
    let drawn = Drawn { kept: Some((rng, vars.clone())), layers: config.num_hidden_layers };
    let vb = VarBuilder::from_backend(Box::new(drawn), args.dtype, args.device.clone());
    let options = Options { base: Base::Plain, seq: args.seq, recompute: false };
    let model = Llama::load(vb, config.clone(), options)?;
    let vars = vars.lock().unwrap_or_else(PoisonError::into_inner).clone();

    println!("first all weights of a small model learn from this crate's documents");
    let steps = args.pretrain as u64;
    let schedule = Schedule::cosine(steps).warm_up(WARM_UP).floor(0.1);
    let adamw = AdamWConfig::default().lr(RATE).weight_decay(0.1).clip_norm(1.0).schedule(schedule);
    let mut optimizer = AdamW::named(vars.clone(), adamw)?.decay_where(|_, var| var.rank() >= 2);
    let trainer = Trainer { model: &model, corpus: &corpus, args };
    trainer.run(&mut optimizer, args.pretrain)?;

    fs::create_dir_all(folder)?;
    fs::write(folder.join("config.json"), config.to_json(args.dtype))?;
    let tensors = vars.into_iter().map(|(name, var)| (name, var.as_detached_tensor()));
    weights::save(&tensors.collect(), &folder.join("model.safetensors"))
}
