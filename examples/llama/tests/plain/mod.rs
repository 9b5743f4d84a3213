//! The formulas of a Llama in candle's operations that have a gradient. In f64 they are what models are held against, and in
//! other dtypes say how far away from that the plain formula is.

use std::collections::HashMap;
use std::f64::consts::TAU;

use candle_core::{D, DType, Device::Cpu, Result, Tensor, Var};
use candle_nn::{loss::cross_entropy, ops, rotary_emb::rope_slow};
use candle_transformers::models::llama::{Config, Llama3RopeType};

pub struct Plain<'a> {
    pub config: &'a Config,
    /// By their names, in any dtype.
    pub weights: &'a HashMap<String, Tensor>,
    /// Matrices by their names, and what their products are multiplied by.
    pub adapter: (HashMap<String, Var>, f64),
    pub dtype: DType,
}

impl Plain<'_> {
    /// Logits of all positions, `[B, S, V]`.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        let Config { num_hidden_layers, hidden_size, tie_word_embeddings, .. } = *self.config;
        let (batch, seq) = tokens.dims2()?;
        let rotations = self.rotations(seq)?;
        let rows = self.weight("model.embed_tokens")?.index_select(&tokens.flatten_all()?, 0)?;
        let mut x = rows.reshape((batch, seq, hidden_size))?;
        for layer in (0..num_hidden_layers).map(|i| format!("model.layers.{i}")) {
            let normed = self.norm(&format!("{layer}.input_layernorm"), &x)?;
            x = (x + self.attend(&format!("{layer}.self_attn"), &normed, &rotations)?)?;
            let normed = self.norm(&format!("{layer}.post_attention_layernorm"), &x)?;
            let linear = |name, x: &Tensor| self.linear(&format!("{layer}.mlp.{name}"), x);
            let gated = (linear("gate_proj", &normed)?.silu()? * linear("up_proj", &normed)?)?;
            x = (x + linear("down_proj", &gated)?)?;
        }
        let head = if tie_word_embeddings { "model.embed_tokens" } else { "lm_head" };
        self.linear(head, &self.norm("model.norm", &x)?)
    }

    /// Those of the mean cross entropy, of each matrix of the adapter.
    pub fn gradients(&self, tokens: &Tensor, targets: &Tensor) -> Result<HashMap<String, Tensor>> {
        let logits = self.logits(tokens)?.flatten_to(1)?.to_dtype(self.wide())?;
        let grads = cross_entropy(&logits, &targets.flatten_all()?)?.backward()?;
        let of = |(name, var): (&String, &Var)| Some((name.clone(), grads.get(var)?.clone()));
        Ok(self.adapter.0.iter().filter_map(of).collect())
    }

    /// What scores, probabilities and losses are in.
    fn wide(&self) -> DType {
        if self.dtype == DType::F64 { DType::F64 } else { DType::F32 }
    }

    fn weight(&self, name: &str) -> Result<Tensor> {
        self.weights[&format!("{name}.weight")].to_dtype(self.dtype)
    }

    fn norm(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        ops::rms_norm_slow(x, &self.weight(name)?, self.config.rms_norm_eps as f32)
    }

    fn linear(&self, name: &str, x: &Tensor) -> Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        let product = |x: &Tensor, weight: &Tensor| x.matmul(&weight.to_dtype(self.dtype)?.t()?);
        let x = x.flatten_to(1)?;
        let mut y = product(&x, &self.weight(name)?)?;
        let (adapter, scale) = &self.adapter;
        let [a, b] = ["lora_A", "lora_B"].map(|part| adapter.get(&format!("{name}.{part}.weight")));
        if let (Some(a), Some(b)) = (a, b) {
            y = (y + product(&(product(&x, a)? * *scale)?, b)?)?;
        }
        y.reshape((batch, seq, ()))
    }

    fn attend(&self, name: &str, x: &Tensor, [cos, sin]: &[Tensor; 2]) -> Result<Tensor> {
        let Config { num_attention_heads, num_key_value_heads, hidden_size, .. } = *self.config;
        let (batch, seq, _) = x.dims3()?;
        let dim = hidden_size / num_attention_heads;
        let heads = |part, count: usize| {
            let all = self.linear(&format!("{name}.{part}"), x)?;
            all.reshape((batch, seq, count, dim))?.transpose(1, 2)?.contiguous()
        };
        // A head of keys for each of queries.
        let shared = |t: Tensor| {
            let share = num_attention_heads / num_key_value_heads;
            let all = (batch, num_key_value_heads, share, seq, dim);
            let repeated = t.unsqueeze(2)?.broadcast_as(all)?;
            repeated.reshape((batch, num_attention_heads, seq, dim))?.to_dtype(self.wide())
        };
        let q = rope_slow(&heads("q_proj", num_attention_heads)?, cos, sin)?;
        let q = q.to_dtype(self.wide())?;
        let k = shared(rope_slow(&heads("k_proj", num_key_value_heads)?, cos, sin)?)?;
        let v = shared(heads("v_proj", num_key_value_heads)?)?;
        let hidden = |i| (0..seq).map(move |j| if j > i { f32::NEG_INFINITY } else { 0. });
        let mask = Tensor::from_iter((0..seq).flat_map(hidden), &Cpu)?.reshape((seq, seq))?;
        let scores = (q.matmul(&k.t()?)? / (dim as f64).sqrt())?;
        let scores = scores.broadcast_add(&mask.to_dtype(self.wide())?)?;
        let out = ops::softmax(&scores, D::Minus1)?.matmul(&v)?.to_dtype(self.dtype)?;
        self.linear(&format!("{name}.o_proj"), &out.transpose(1, 2)?.flatten_from(2)?)
    }

    /// Cosines and sines, of angles in f64 or in f32.
    fn rotations(&self, positions: usize) -> Result<[Tensor; 2]> {
        let rounded = |x: f64| if self.dtype == DType::F64 { x } else { f64::from(x as f32) };
        let dim = self.config.hidden_size / self.config.num_attention_heads;
        let steps = (0..dim).step_by(2).map(|i| {
            let power = f64::from(self.config.rope_theta).powf(rounded(i as f64 / dim as f64));
            let step = rounded(1.0 / rounded(power));
            let Some(llama3) = &self.config.rope_scaling else { return step };
            assert!(matches!(llama3.rope_type, Llama3RopeType::Llama3));
            let [low, high, factor] =
                [llama3.low_freq_factor, llama3.high_freq_factor, llama3.factor].map(f64::from);
            // How often it turns within the context that the model was first trained on.
            let turns = llama3.original_max_position_embeddings as f64 * step / TAU;
            rounded(match turns {
                turns if turns < low => step / factor,
                turns if turns > high => step,
                _ => step / factor + (turns - low) / (high - low) * (step - step / factor),
            })
        });
        let steps: Vec<f64> = steps.collect();
        let angles = (0..positions)
            .flat_map(|at| steps.iter().map(move |step| at as f64 * step))
            .map(rounded);
        let angles = Tensor::from_iter(angles, &Cpu)?.reshape((positions, dim / 2))?;
        Ok([angles.cos()?.to_dtype(self.dtype)?, angles.sin()?.to_dtype(self.dtype)?])
    }
}
