//! The Llama of examples/lora_llama, and that of candle-transformers of the same files, beside the plain formulas in f64: logits,
//! gradients, and a merged adapter.

#[allow(dead_code, reason = "the example uses more of it")]
#[path = "../../lora_llama/model/mod.rs"]
mod model;
mod plain;
#[path = "../../common/rng.rs"]
mod rng;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device::Cpu, IndexOp, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap};
use candle_transformers::models::llama::{self, Cache, Llama, LlamaConfig};
use kaio_candle::train::{self, grads_complete};
use model::peft::Lora;
use model::{Base, Options, weights};
use plain::Plain;
use rng::Rng;
use serde_json::{Value, json};

const BATCH: usize = 2;
const SEQ: usize = 80;

/// A model's folder, which goes with the test.
struct Folder(PathBuf);

impl Folder {
    fn new(name: &str) -> Result<Self> {
        let path = std::env::temp_dir().join(format!("kaio-{}-{name}", std::process::id()));
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    /// With a model of random weights, in one file or, with an index, in two.
    fn of_model(name: &str, config: &Value, dtype: DType, sharded: bool) -> Result<Self> {
        let folder = Self::new(name)?;
        fs::write(folder.0.join("config.json"), config.to_string())?;
        // A model that is loaded from an empty map fills it. Its names and shapes are what counts: a generator without a seed
        // has drawn the values.
        let map = VarMap::new();
        Llama::load(VarBuilder::from_varmap(&map, DType::F32, &Cpu), &parsed(config))?;
        let map: BTreeMap<_, _> = map.data().lock().unwrap().clone().into_iter().collect();
        let mut rng = Rng::new(0, Rng::WEIGHTS);
        let tensors = map.into_iter().map(|(name, var)| {
            // Norms that are all ones would not be missed.
            let (mean, std) = if var.rank() == 1 { (1., 0.2) } else { (0., 0.15) };
            let t = normal(&mut rng, var.dims())?.affine(std, mean)?;
            Ok((name, t.to_dtype(dtype)?))
        });
        let tensors = tensors.collect::<Result<HashMap<_, _>>>()?;
        if !sharded {
            weights::save(&tensors, &folder.0.join("model.safetensors"))?;
            return Ok(folder);
        }
        let mut map = HashMap::new();
        for (file, first) in [("a.safetensors", true), ("b.safetensors", false)] {
            let part = tensors.iter().filter(|(name, _)| name.contains(".0.") == first);
            let part: HashMap<_, _> = part.map(|(name, t)| (name.clone(), t.clone())).collect();
            map.extend(part.keys().map(|name| (name.clone(), file)));
            weights::save(&part, &folder.0.join(file))?;
        }
        let index = json!({ "metadata": {}, "weight_map": map });
        fs::write(folder.0.join("model.safetensors.index.json"), index.to_string())?;
        Ok(folder)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn normal(rng: &mut Rng, dims: &[usize]) -> Result<Tensor> {
    let values = (0..dims.iter().product()).map(|_| rng.normal() as f32);
    Tensor::from_vec(values.collect(), dims, &Cpu)
}

fn config(heads: usize, kv_heads: usize, tied: bool, rope_scaling: Value) -> Value {
    json!({
        "model_type": "llama", "vocab_size": 200, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 500.0, "rope_scaling": rope_scaling, "tie_word_embeddings": tied,
    })
}

/// As candle-transformers reads it.
fn parsed(config: &Value) -> llama::Config {
    serde_json::from_value::<LlamaConfig>(config.clone()).unwrap().into_config(false)
}

fn llama3() -> Value {
    json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    })
}

/// The weights in a model's folder.
fn tensors(folder: &Path) -> Result<HashMap<String, Tensor>> {
    let files = weights::files(folder)?;
    let tensors = files.iter().map(|file| candle_core::safetensors::load(file, &Cpu));
    Ok(tensors.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect())
}

/// Of all positions: the logits of the last one are those that candle-transformers gives.
fn theirs(folder: &Path, config: &Value, dtype: DType, tokens: &Tensor) -> Result<Tensor> {
    let config = parsed(config);
    let vb = VarBuilder::from_tensors(tensors(folder)?, dtype, &Cpu);
    let llama = Llama::load(vb, &config)?;
    let logits = (1..=tokens.dim(1)?).map(|seq| {
        let mut cache = Cache::new(false, dtype, &config, &Cpu)?;
        llama.forward(&tokens.narrow(1, 0, seq)?, 0, &mut cache)
    });
    Tensor::stack(&logits.collect::<Result<Vec<_>>>()?, 1)
}

fn ours(folder: &Path, dtype: DType, recompute: bool) -> Result<model::Llama> {
    let options = Options { base: Base::Plain, seq: SEQ, recompute };
    model::Llama::load(weights::open(folder, dtype, &Cpu)?, weights::config(folder)?, options)
}

/// Tokens, and the ones that follow them.
fn tokens(seq: usize) -> Result<[Tensor; 2]> {
    let ids = (0..BATCH * (seq + 1)).map(|i| (i * 7919 % 193) as u32);
    let ids = Tensor::from_iter(ids, &Cpu)?.reshape((BATCH, seq + 1))?;
    Ok([ids.i((.., ..seq))?.contiguous()?, ids.i((.., 1..))?.contiguous()?])
}

fn largest(t: &Tensor) -> Result<f64> {
    t.to_dtype(DType::F64)?.abs()?.flatten_all()?.max(0)?.to_scalar()
}

fn distance(a: &Tensor, b: &Tensor) -> Result<f64> {
    largest(&(a.to_dtype(DType::F64)? - b.to_dtype(DType::F64)?)?)
}

/// How far from the exact result one may be that is computed in a dtype: twice as far as the plain formula's, and an ulp of the
/// largest number.
fn allowed(dtype: DType, plain: &Tensor, exact: &Tensor) -> Result<f64> {
    let digits = match dtype {
        DType::BF16 => 7,
        DType::F16 => 10,
        _ => 23,
    };
    Ok(2. * distance(plain, exact)? + 0.5f64.powi(digits) * largest(exact)?)
}

fn assert_within(what: &str, got: &Tensor, exact: &Tensor, allowed: f64) -> Result<()> {
    let error = distance(got, exact)?;
    println!("{what}: {error:.1e} away, {allowed:.1e} is allowed");
    assert!(error <= allowed, "{what}: {error} away, {allowed} is allowed");
    Ok(())
}

#[test]
fn logits_are_those_of_candle_transformers() -> Result<()> {
    let [tokens, _] = tokens(SEQ)?;
    let cases = [
        ("tied", config(4, 4, true, Value::Null), false),
        ("groups", config(4, 2, false, Value::Null), false),
        ("shards", config(8, 1, false, llama3()), true),
        ("llama3", config(4, 2, true, llama3()), false),
    ];
    for (name, config, sharded) in cases {
        let folder = Folder::of_model(name, &config, DType::BF16, sharded)?;
        let (parsed, weights) = (parsed(&config), tensors(&folder.0)?);
        let plain = |dtype| {
            let adapter = (HashMap::new(), 0.);
            Plain { config: &parsed, weights: &weights, adapter, dtype }.logits(&tokens)
        };
        let exact = plain(DType::F64)?;
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let allowed = allowed(dtype, &plain(dtype)?, &exact)?;
            let what = |model| format!("{name}, {dtype:?}, {model}");
            let logits = theirs(&folder.0, &config, dtype, &tokens)?;
            assert_within(&what("candle-transformers"), &logits, &exact, allowed)?;
            let logits = ours(&folder.0, dtype, false)?.logits(&tokens)?;
            assert_within(&what("this crate"), &logits, &exact, allowed)?;
        }
    }
    Ok(())
}

/// An adapter of which both matrices are normal, by their names.
fn adapt(model: &mut model::Llama, lora: &Lora) -> Result<HashMap<String, Var>> {
    let mut rng = Rng::new(0, Rng::ADAPTER);
    let vars = model.adapt(lora, |_, (rows, columns)| normal(&mut rng, &[rows, columns])? * 0.1)?;
    Ok(vars.into_iter().collect())
}

fn values(vars: &HashMap<String, Var>) -> HashMap<String, Tensor> {
    vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor())).collect()
}

#[test]
fn a_merged_adapter_is_the_adapted_model() -> Result<()> {
    let [tokens, _] = tokens(SEQ)?;
    let config = config(4, 2, false, llama3());
    let folder = Folder::of_model("adapted", &config, DType::F32, true)?;
    let all = model::LINEARS.map(str::to_owned).to_vec();
    let (parsed, weights) = (parsed(&config), tensors(&folder.0)?);
    let plain = |weights: &_, adapter, dtype| {
        Plain { config: &parsed, weights, adapter, dtype }.logits(&tokens)
    };
    let none = || (HashMap::new(), 0.);
    for targets in [all, vec!["q_proj".into(), "mlp.down_proj".into()]] {
        let lora = Lora::new(4, 8., targets)?;
        let mut model = ours(&folder.0, DType::F32, false)?;
        let vars = adapt(&mut model, &lora)?;
        let logits = model.logits(&tokens)?;
        let adapter = || (vars.clone(), lora.scale());
        let exact = plain(&weights, adapter(), DType::F64)?;
        let formula = plain(&weights, adapter(), DType::F32)?;
        let within = allowed(DType::F32, &formula, &exact)?;
        assert_within("adapted", &logits, &exact, within)?;
        assert!(distance(&exact, &plain(&weights, none(), DType::F64)?)? > 0.1, "it has an effect");

        let merged = Folder::new("merged")?;
        lora.merge(&values(&vars), &folder.0, &merged.0)?;
        let sums = tensors(&merged.0)?;
        let formula = plain(&sums, none(), DType::F32)?;
        let within = allowed(DType::F32, &formula, &exact)?;
        assert_within("merged", &theirs(&merged.0, &config, DType::F32, &tokens)?, &exact, within)?;

        // And what is written is read.
        let saved = Folder::new("adapter")?;
        lora.save(&saved.0, "base", &vars.clone().into_iter().collect::<Vec<_>>())?;
        let (read, tensors) = Lora::load(&saved.0)?;
        assert_eq!(read, lora);
        let mut again = ours(&folder.0, DType::F32, false)?;
        assert_eq!(tensors.len(), again.adapt(&read, |name, _| Ok(tensors[name].clone()))?.len());
        assert_eq!(distance(&again.logits(&tokens)?, &logits)?, 0.);
    }
    Ok(())
}

#[test]
fn a_detached_model_has_the_loss_and_no_graph() -> Result<()> {
    let [tokens, targets] = tokens(24)?;
    let folder = Folder::of_model("detached", &config(4, 2, false, llama3()), DType::BF16, false)?;
    let lora = Lora::new(4, 8., model::LINEARS.map(str::to_owned).to_vec())?;
    for (dtype, recompute) in [(DType::F32, false), (DType::BF16, false), (DType::BF16, true)] {
        let mut model = ours(&folder.0, dtype, recompute)?;
        adapt(&mut model, &lora)?;
        let [loss, value] = [&model, &model.detached()].map(|model| model.loss(&tokens, &targets));
        let (loss, value) = (loss?, value?);
        assert!(loss.track_op() && !value.track_op(), "{dtype:?}");
        assert_eq!(loss.to_scalar::<f32>()?, value.to_scalar::<f32>()?, "{dtype:?}");
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_the_plain_formula() -> Result<()> {
    let [tokens, targets] = tokens(SEQ)?;
    let lora = Lora::new(4, 8., model::LINEARS.map(str::to_owned).to_vec())?;
    for (name, config) in
        [("tied", config(4, 4, true, Value::Null)), ("llama3", config(4, 2, false, llama3()))]
    {
        let folder = Folder::of_model(&format!("slopes-{name}"), &config, DType::BF16, false)?;
        let (parsed, weights) = (parsed(&config), tensors(&folder.0)?);
        let gradients = |dtype, recompute| -> Result<_> {
            let mut model = ours(&folder.0, dtype, recompute)?;
            let vars = adapt(&mut model, &lora)?;
            let grads = train::cast_once(|| model.loss(&tokens, &targets)?.backward())?;
            grads_complete(&vars, &grads)?;
            Ok((vars, grads))
        };
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let (vars, kept) = gradients(dtype, false)?;
            let (again, recomputed) = gradients(dtype, true)?;
            let plain = |dtype| {
                let adapter = (vars.clone(), lora.scale());
                Plain { config: &parsed, weights: &weights, adapter, dtype }
                    .gradients(&tokens, &targets)
            };
            let (exact, plain) = (plain(DType::F64)?, plain(dtype)?);
            assert_eq!(exact.len(), 3 * 2 * model::LINEARS.len());
            for (matrix, exact) in &exact {
                let got = kept.get(&vars[matrix]).unwrap();
                let within = allowed(dtype, &plain[matrix], exact)?;
                assert_within(&format!("{name}, {dtype:?}, {matrix}"), got, exact, within)?;
                let same = distance(recomputed.get(&again[matrix]).unwrap(), got)?;
                assert_eq!(same, 0., "{name}, {dtype:?}, {matrix}, computed again");
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_another_model_is_refused() {
    let with = |name: &str, value: Value| {
        let mut config = config(4, 2, true, Value::Null);
        config[name] = value;
        config
    };
    let yarn = json!({ "rope_type": "yarn", "factor": 2.0 });
    let short = json!({ "rope_type": "llama3", "factor": 2.0 });
    for (config, message) in [
        (
            with("model_type", json!("mistral")),
            "`model_type` is \"mistral\", and this model has \"llama\"",
        ),
        (with("attention_bias", json!(true)), "`attention_bias` is true, and this model has false"),
        (with("quantization_config", json!({ "bits": 4 })), "the weights are quantised"),
        (with("rope_scaling", yarn.clone()), "rotary positions of the type \"yarn\""),
        (with("rope_parameters", yarn), "rotary positions of the type \"yarn\""),
        (with("rope_scaling", short), "`low_freq_factor` of `rope_scaling` is missing"),
        (with("hidden_size", Value::Null), "`hidden_size` is missing"),
        (with("vocab_size", json!("many")), "`vocab_size` is \"many\", and not a whole number"),
        (
            with("num_attention_heads", json!(0)),
            "`num_attention_heads` is 0, and not a whole number",
        ),
        (with("num_key_value_heads", json!(3)), "4 heads of 16 do not share 3 heads of keys"),
    ] {
        let error = model::Config::from_json(&config.to_string()).unwrap_err().to_string();
        assert!(error.starts_with(message), "{error}");
    }
    let folder = Folder::new("refused").unwrap();
    let config = json!({ "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"] });
    for (name, value, message) in [
        ("use_dora", json!(true), "`use_dora` is true, and adapters here have none"),
        ("rank_pattern", json!({ "q_proj": 8 }), "`rank_pattern` is {\"q_proj\":8}"),
        ("init_lora_weights", json!("pissa"), "`init_lora_weights` is \"pissa\""),
        ("bias", json!("all"), "`bias` is \"all\", and adapters here have none"),
        ("target_modules", json!(["lm_head"]), "there is no `lm_head` to adapt"),
        ("target_modules", json!(".*_proj"), "`target_modules` is \".*_proj\", and not a list"),
        ("r", json!(0), "an adapter of rank 0"),
    ] {
        let mut config = config.clone();
        config[name] = value;
        fs::write(folder.0.join("adapter_config.json"), config.to_string()).unwrap();
        let error = Lora::load(&folder.0).unwrap_err().to_string();
        assert!(error.contains(message), "{error}");
    }
    let error = weights::files(&folder.0).unwrap_err().to_string();
    assert!(error.starts_with("there is neither model.safetensors nor"), "{error}");
}
