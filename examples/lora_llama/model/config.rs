//! What `config.json` says of a model: the fields that candle-transformers' `LlamaConfig` has, and those of which another
//! value than Llama's would be another model.

use std::f64::consts::TAU;

use candle_core::{DType, Device, Error, Result, Tensor, bail};
use serde_json::{Value, json};

/// The fields have the names of the file.
#[derive(Clone, Debug, PartialEq)]
pub struct Config {
    pub vocab_size: usize,
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub num_key_value_heads: usize,
    pub head_dim: usize,
    pub max_position_embeddings: usize,
    pub rms_norm_eps: f64,
    pub rope_theta: f64,
    pub rope_scaling: Option<RopeScaling>,
    pub tie_word_embeddings: bool,
}

/// Rotary positions of Llama 3.1 and later: frequencies of long waves are divided by `factor`.
#[derive(Clone, Debug, PartialEq)]
pub struct RopeScaling {
    pub factor: f64,
    pub low_freq_factor: f64,
    pub high_freq_factor: f64,
    pub original_max_position_embeddings: f64,
}

impl Config {
    /// A Llama of bytes that learns on a laptop.
    pub const SMALL: Self = Self {
        vocab_size: 256,
        hidden_size: 128,
        intermediate_size: 384,
        num_hidden_layers: 2,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 32,
        max_position_embeddings: 1024,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: None,
        tie_word_embeddings: true,
    };
    /// Llama 3.2 1B.
    pub const LLAMA_1B: Self = Self {
        vocab_size: 128_256,
        hidden_size: 2048,
        intermediate_size: 8192,
        num_hidden_layers: 16,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 64,
        max_position_embeddings: 131_072,
        rms_norm_eps: 1e-5,
        rope_theta: 500_000.0,
        rope_scaling: Some(RopeScaling {
            factor: 32.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        }),
        tie_word_embeddings: true,
    };
    /// Llama 3.1 8B.
    pub const LLAMA_8B: Self = Self {
        hidden_size: 4096,
        intermediate_size: 14_336,
        num_hidden_layers: 32,
        head_dim: 128,
        rope_scaling: Some(RopeScaling {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 8192.0,
        }),
        tie_word_embeddings: false,
        ..Self::LLAMA_1B
    };

    pub fn from_json(text: &str) -> Result<Self> {
        let json: Value = serde_json::from_str(text).map_err(Error::wrap)?;
        // Absent or null is what they are by default.
        let expected = [
            ("model_type", json!("llama")),
            ("hidden_act", json!("silu")),
            ("attention_bias", json!(false)),
            ("mlp_bias", json!(false)),
        ];
        for (name, value) in &expected {
            if !json[*name].is_null() && json[*name] != *value {
                bail!("`{name}` is {}, and this model has {value}", json[*name])
            }
        }
        if !json["quantization_config"].is_null() {
            bail!("the weights are quantised; --base quantises those of the original model")
        }
        let size = |name| count(&json, name)?.map_or_else(|| bail!("`{name}` is missing"), Ok);
        let hidden_size = size("hidden_size")?;
        let num_attention_heads = size("num_attention_heads")?;
        let num_key_value_heads =
            count(&json, "num_key_value_heads")?.unwrap_or(num_attention_heads);
        // Files of transformers 5 have all of it in one place.
        let rope = [&json["rope_parameters"], &json["rope_scaling"]];
        let rope = rope.into_iter().find(|rope| !rope.is_null()).unwrap_or(&Value::Null);
        let rope_theta = number(&json, "rope_theta")?.or(number(rope, "rope_theta")?);
        let config = Self {
            vocab_size: size("vocab_size")?,
            hidden_size,
            intermediate_size: size("intermediate_size")?,
            num_hidden_layers: size("num_hidden_layers")?,
            num_attention_heads,
            num_key_value_heads,
            head_dim: count(&json, "head_dim")?.unwrap_or(hidden_size / num_attention_heads),
            max_position_embeddings: size("max_position_embeddings")?,
            rms_norm_eps: number(&json, "rms_norm_eps")?.unwrap_or(1e-6),
            rope_theta: rope_theta.unwrap_or(10_000.0),
            rope_scaling: RopeScaling::from_json(rope)?,
            tie_word_embeddings: json["tie_word_embeddings"].as_bool().unwrap_or(false),
        };
        if !num_attention_heads.is_multiple_of(num_key_value_heads)
            || !config.head_dim.is_multiple_of(2)
        {
            bail!(
                "{num_attention_heads} heads of {} do not share {num_key_value_heads} heads of keys evenly, or have no pairs",
                config.head_dim
            )
        }
        Ok(config)
    }

    /// As a model of Hugging Face's has it, whose weights are of this dtype.
    pub fn to_json(&self, dtype: DType) -> String {
        let dtype = match dtype {
            DType::F16 => "float16",
            DType::F32 => "float32",
            _ => "bfloat16",
        };
        let scaling = self.rope_scaling.as_ref().map(|scaling| {
            json!({
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_position_embeddings as u64,
            })
        });
        let json = json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "torch_dtype": dtype,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_position_embeddings,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling,
            "tie_word_embeddings": self.tie_word_embeddings,
        });
        format!("{json:#}\n")
    }

    /// The cosines and sines of as many positions, f32 `[positions, head_dim/2]`.
    pub fn rotations(&self, positions: usize, device: &Device) -> Result<[Tensor; 2]> {
        let pairs = self.head_dim / 2;
        let step = |pair| {
            let step = self.rope_theta.powf(-(pair as f64) / pairs as f64);
            self.rope_scaling.as_ref().map_or(step, |scaling| scaling.scaled(step))
        };
        let steps: Vec<f64> = (0..pairs).map(step).collect();
        let table = |of: fn(f64) -> f64| {
            let angles =
                (0..positions).flat_map(|at| steps.iter().map(move |step| at as f64 * step));
            let values: Vec<f32> = angles.map(|angle| of(angle) as f32).collect();
            Tensor::from_vec(values, (positions, pairs), device)
        };
        Ok([table(f64::cos)?, table(f64::sin)?])
    }
}

impl RopeScaling {
    fn from_json(json: &Value) -> Result<Option<Self>> {
        let kind = [&json["rope_type"], &json["type"]].into_iter().find(|kind| !kind.is_null());
        match kind.map_or(Some("default"), Value::as_str) {
            Some("default") => return Ok(None),
            Some("llama3") => {}
            _ => bail!("rotary positions of the type {}, and this model has llama3", kind.unwrap()),
        }
        let need = |name| {
            number(json, name)?.map_or_else(|| bail!("`{name}` of `rope_scaling` is missing"), Ok)
        };
        Ok(Some(Self {
            factor: need("factor")?,
            low_freq_factor: need("low_freq_factor")?,
            high_freq_factor: need("high_freq_factor")?,
            original_max_position_embeddings: need("original_max_position_embeddings")?,
        }))
    }

    /// A frequency, in radians a position. Between those that are kept and those that are divided there is a ramp.
    fn scaled(&self, step: f64) -> f64 {
        let Self { factor, low_freq_factor: low, high_freq_factor: high, .. } = *self;
        let waves = self.original_max_position_embeddings * step / TAU;
        let kept = ((waves - low) / (high - low)).clamp(0.0, 1.0);
        kept * step + (1.0 - kept) * step / factor
    }
}

fn number(json: &Value, name: &str) -> Result<Option<f64>> {
    match &json[name] {
        Value::Null => Ok(None),
        value => match value.as_f64() {
            Some(number) => Ok(Some(number)),
            None => bail!("`{name}` is {value}, and not a number"),
        },
    }
}

/// A number that is not 0.
fn count(json: &Value, name: &str) -> Result<Option<usize>> {
    match &json[name] {
        Value::Null => Ok(None),
        value => match value.as_u64() {
            Some(count @ 1..) => Ok(Some(count as usize)),
            _ => bail!("`{name}` is {value}, and not a whole number from 1 on"),
        },
    }
}
