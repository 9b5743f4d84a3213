//! The Llama of examples/lora_llama beside that of candle-transformers: models of the same files have the same logits, its
//! gradients are the slopes of the other one's loss, and a merged adapter is the adapted model.

#[allow(dead_code, reason = "the example uses more of it")]
#[path = "../../lora_llama/model/mod.rs"]
mod model;
#[path = "../../common/rng.rs"]
mod rng;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device::Cpu, IndexOp, Result, Tensor, Var};
use candle_nn::{VarBuilder, VarMap, loss::cross_entropy};
use candle_transformers::models::llama::{Cache, Llama, LlamaConfig};
use kaio_candle::train::{self, grads_complete};
use model::peft::Lora;
use model::{Base, Options, weights};
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
        Llama::load(
            VarBuilder::from_varmap(&map, DType::F32, &Cpu),
            &parsed(config).into_config(false),
        )?;
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
fn parsed(config: &Value) -> LlamaConfig {
    serde_json::from_value(config.clone()).unwrap()
}

fn llama3() -> Value {
    json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    })
}

/// Of all positions: the logits of the last one are those that candle-transformers gives.
fn theirs(folder: &Path, config: &Value, dtype: DType, tokens: &Tensor) -> Result<Tensor> {
    let config = parsed(config).into_config(false);
    let files = weights::files(folder)?;
    let tensors = files.iter().map(|file| candle_core::safetensors::load(file, &Cpu));
    let tensors = tensors.collect::<Result<Vec<_>>>()?.into_iter().flatten().collect();
    let llama = Llama::load(VarBuilder::from_tensors(tensors, dtype, &Cpu), &config)?;
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

fn largest(t: &Tensor) -> Result<f32> {
    t.abs()?.flatten_all()?.max(0)?.to_scalar()
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
        let exact = theirs(&folder.0, &config, DType::F32, &tokens)?;
        let ulps = 200. * f32::EPSILON * largest(&exact)?;
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let own = largest(&(theirs(&folder.0, &config, dtype, &tokens)? - &exact)?)?;
            let error = largest(&(ours(&folder.0, dtype, false)?.logits(&tokens)? - &exact)?)?;
            // Sums of another order in f32; in 16 bits twice as far away as candle's at most.
            let allowed = ulps + 2. * own;
            println!("{name}, {dtype:?}: {error:.1e} away, {allowed:.1e} is allowed");
            assert!(error <= allowed, "{name}, {dtype:?}: {error} away, {allowed} is allowed");
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

/// The logits of candle-transformers' model with the adapter merged into its weights.
fn merged(
    (lora, folder, config): (&Lora, &Folder, &Value),
    adapter: &HashMap<String, Tensor>,
    tokens: &Tensor,
) -> Result<Tensor> {
    let merged = Folder::new("merged")?;
    lora.merge(adapter, &folder.0, &merged.0)?;
    theirs(&merged.0, config, DType::F32, tokens)
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
    let plain = theirs(&folder.0, &config, DType::F32, &tokens)?;
    for targets in [all, vec!["q_proj".into(), "mlp.down_proj".into()]] {
        let lora = Lora::new(4, 8., targets)?;
        let mut model = ours(&folder.0, DType::F32, false)?;
        let vars = adapt(&mut model, &lora)?;
        let logits = model.logits(&tokens)?;
        let want = merged((&lora, &folder, &config), &values(&vars), &tokens)?;
        let allowed = 200. * f32::EPSILON * largest(&want)?;
        let error = largest(&(&logits - &want)?)?;
        assert!(error <= allowed, "{error} away, {allowed} is allowed");
        assert!(largest(&(&logits - &plain)?)? > 0.1, "the adapter has an effect");

        // And what is written is read.
        let saved = Folder::new("adapter")?;
        lora.save(&saved.0, "base", &vars.clone().into_iter().collect::<Vec<_>>())?;
        let (read, tensors) = Lora::load(&saved.0)?;
        assert_eq!(read, lora);
        let mut again = ours(&folder.0, DType::F32, false)?;
        assert_eq!(tensors.len(), again.adapt(&read, |name, _| Ok(tensors[name].clone()))?.len());
        assert_eq!(largest(&(again.logits(&tokens)? - logits)?)?, 0.);
    }
    Ok(())
}

/// Along the gradient of a kind of matrix, in all layers, the other model's loss rises by that gradient's norm.
#[test]
fn gradients_are_slopes_of_the_merged_model() -> Result<()> {
    const STEP: f64 = 0.01;
    let [tokens, targets] = tokens(24)?;
    let config = config(4, 2, true, llama3());
    let folder = Folder::of_model("slopes", &config, DType::F32, false)?;
    let lora = Lora::new(4, 8., model::LINEARS.map(str::to_owned).to_vec())?;
    let mut model = ours(&folder.0, DType::F32, false)?;
    let vars = adapt(&mut model, &lora)?;
    let grads = model.loss(&tokens, &targets)?.backward()?;
    grads_complete(&vars, &grads)?;
    let loss = |adapter: &HashMap<String, Tensor>| -> Result<f64> {
        let logits = merged((&lora, &folder, &config), adapter, &tokens)?.flatten_to(1)?;
        Ok(cross_entropy(&logits, &targets.flatten_all()?)?.to_scalar::<f32>()?.into())
    };
    for kind in model::LINEARS.iter().flat_map(|name| [(name, "lora_A"), (name, "lora_B")]) {
        let kind = format!(".{}.{}.weight", kind.0, kind.1);
        let of_kind: Vec<_> = vars.iter().filter(|(name, _)| name.ends_with(&kind)).collect();
        assert_eq!(of_kind.len(), 3, "{kind}");
        let squares = of_kind
            .iter()
            .map(|(_, var)| grads.get(var).unwrap().sqr()?.sum_all()?.to_scalar::<f32>());
        let norm = f64::from(squares.sum::<Result<f32>>()?).sqrt();
        let at = |step: f64| {
            let mut moved = values(&vars);
            for (name, var) in &of_kind {
                let way = (grads.get(var).unwrap() * (step / norm))?;
                moved.insert(name.to_string(), (var.as_tensor() + way)?.detach());
            }
            loss(&moved)
        };
        let slope = (at(STEP)? - at(-STEP)?) / (2. * STEP);
        println!("{kind}: norm {norm:.5}, slope {slope:.5}");
        assert!((slope - norm).abs() < 0.01 * norm, "{kind}: norm {norm}, slope {slope}");
    }
    Ok(())
}

/// In 16 bits other operations of this crate compute. Errors are of the size of the dtype's epsilon, where a part that is missing
/// would be as large as what there is.
#[test]
fn gradients_in_16_bits_are_those_in_f32() -> Result<()> {
    let [tokens, targets] = tokens(SEQ)?;
    let config = config(4, 2, false, llama3());
    let folder = Folder::of_model("bits", &config, DType::BF16, false)?;
    let lora = Lora::new(4, 8., model::LINEARS.map(str::to_owned).to_vec())?;
    let gradients = |dtype, recompute| -> Result<BTreeMap<String, Tensor>> {
        let mut model = ours(&folder.0, dtype, recompute)?;
        let vars = adapt(&mut model, &lora)?;
        let grads = train::cast_once(|| model.loss(&tokens, &targets)?.backward())?;
        grads_complete(&vars, &grads)?;
        Ok(vars.iter().map(|(name, var)| (name.clone(), grads.get(var).unwrap().clone())).collect())
    };
    let exact = gradients(DType::F32, false)?;
    let norm = |t: &Tensor| t.sqr()?.sum_all()?.to_scalar::<f32>().map(f32::sqrt);
    for (dtype, epsilon) in [(DType::BF16, 2f32.powi(-7)), (DType::F16, 2f32.powi(-10))] {
        let [kept, again] = [gradients(dtype, false)?, gradients(dtype, true)?];
        for (name, exact) in &exact {
            let error = norm(&(&kept[name] - exact)?)? / norm(exact)? / epsilon;
            println!("{name}, {dtype:?}: {error:.1} epsilons");
            assert!(error < 12., "{name}, {dtype:?}: {error} epsilons of its norm away");
            assert_eq!(largest(&(&again[name] - &kept[name])?)?, 0., "{name}, computed again");
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
