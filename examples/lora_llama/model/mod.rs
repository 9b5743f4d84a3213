//! A Llama of the shape of candle-transformers', with this crate's operations: the same configuration, the same names of
//! tensors, the same logits, and gradients of what is adapted.

mod config;
mod linear;
pub mod peft;
pub mod weights;

use candle_core::{DType, Result, Tensor, Var};
use candle_nn::VarBuilder;
use kaio_candle::{prelude::*, train};

pub use config::Config;
pub use linear::Base;
use linear::{Adapter, Linear, product};
use peft::Lora;

/// What of a model is a choice of the one who loads it.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    pub base: Base,
    /// The longest sequence.
    pub seq: usize,
    /// Whether layers are computed again in the backward pass, rather than kept.
    pub recompute: bool,
}

/// A clone shares the weights.
#[derive(Clone)]
pub struct Llama {
    config: Config,
    recompute: bool,
    /// `[vocab_size, hidden_size]`
    embedding: Tensor,
    layers: Vec<Layer>,
    norm: Tensor,
    /// `[vocab_size, hidden_size]`
    head: Tensor,
}

impl Llama {
    /// With weights in the builder's dtype: bf16, f16 or f32.
    pub fn load(vb: VarBuilder, config: Config, options: Options) -> Result<Self> {
        let Config { vocab_size, hidden_size, .. } = config;
        let model = vb.pp("model");
        let embedding = model.get((vocab_size, hidden_size), "embed_tokens.weight")?;
        let head = match config.tie_word_embeddings {
            true => embedding.clone(),
            false => vb.get((vocab_size, hidden_size), "lm_head.weight")?,
        };
        let rotations = config.rotations(options.seq, vb.device())?;
        let layer = |i| Layer::load(model.pp(format!("layers.{i}")), &config, &rotations, options);
        Ok(Self {
            recompute: options.recompute,
            embedding,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?,
            norm: model.get(hidden_size, "norm.weight")?,
            head,
            config,
        })
    }

    /// Of the frozen weights.
    pub fn bytes(&self) -> usize {
        let table = self.embedding.elem_count() * self.embedding.dtype().size_in_bytes();
        let tables = if self.config.tie_word_embeddings { table } else { 2 * table };
        let linears = self.layers.iter().flat_map(|layer| layer.linears());
        tables + linears.map(|(_, linear)| linear.bytes()).sum::<usize>()
    }

    /// Puts matrices beside the weights that `lora` is for, and gives them by their names: `value` makes each, of
    /// `[rank, in]` or `[out, rank]`.
    pub fn adapt(
        &mut self,
        lora: &Lora,
        mut value: impl FnMut(&str, (usize, usize)) -> Result<Tensor>,
    ) -> Result<Vec<(String, Var)>> {
        let mut vars = vec![];
        for (i, layer) in self.layers.iter_mut().enumerate() {
            for (name, linear) in
                layer.linears_mut().into_iter().filter(|(name, _)| lora.is_for(name))
            {
                let [from, to] = linear.dims()?;
                let mut var = |part, dims| {
                    let name = format!("model.layers.{i}.{name}.{part}.weight");
                    let var = Var::from_tensor(&value(&name, dims)?)?;
                    vars.push((name, var.clone()));
                    Ok::<_, candle_core::Error>(var.into_inner())
                };
                let (a, b) = (var("lora_A", (lora.rank, from))?, var("lora_B", (to, lora.rank))?);
                linear.adapt(Adapter { a, b, scale: lora.scale() });
            }
        }
        Ok(vars)
    }

    /// The same model without variables: no graph is kept of what it computes, and its loss computes no gradient.
    pub fn detached(&self) -> Self {
        let mut model = self.clone();
        model
            .layers
            .iter_mut()
            .flat_map(Layer::linears_mut)
            .for_each(|(_, linear)| linear.detach());
        model
    }

    /// The last layer's result, normalised, `[B, S, hidden_size]`.
    fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let mut stream = vec![self.embedding.kaio_embedding(tokens)?];
        for layer in &self.layers {
            let inputs: Vec<_> = stream.iter().collect();
            stream = match self.recompute {
                false => layer.forward(&stream)?.into(),
                // Within it no tape is there but its own.
                true => {
                    let layer = layer.clone();
                    let again = move |x: &[Tensor]| {
                        train::block(|x| layer.forward(x), &x.iter().collect::<Vec<_>>())
                    };
                    train::checkpoint(again, &inputs)?.into()
                }
            };
        }
        Ok(norm(&stream, &self.norm, self.config.rms_norm_eps)?.0)
    }

    /// Logits of the token that follows each of `tokens` `[B, S]`: f32 `[B, S, vocab_size]`.
    pub fn logits(&self, tokens: &Tensor) -> Result<Tensor> {
        product(&self.hidden(tokens)?, &self.head, DType::F32)
    }

    /// The mean cross entropy, in nats per token, of predicting `targets` from `tokens`.
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let opts = CrossEntropyOptions::default();
        train::block(
            |_| match self.embedding.dtype() {
                DType::F32 => self.logits(tokens)?.kaio_cross_entropy(targets, &opts),
                _ => self.hidden(tokens)?.kaio_linear_cross_entropy(&self.head, targets, &opts),
            },
            &[],
        )
    }
}

/// The norm of the residual stream, and the stream: a sum, and perhaps what is still to add to it, which norms do on their way.
fn norm(stream: &[Tensor], weight: &Tensor, eps: f64) -> Result<(Tensor, Tensor)> {
    match stream {
        [sum, added] => added.kaio_add_rms_norm(sum, weight, eps as f32),
        _ => Ok((stream[0].kaio_rms_norm(weight, eps as f32)?, stream[0].clone())),
    }
}

/// A clone shares the weights.
#[derive(Clone)]
struct Layer {
    eps: f64,
    head_dim: usize,
    /// Cosines and sines.
    rotations: [Tensor; 2],
    input_norm: Tensor,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    post_attention_norm: Tensor,
    gate: Linear,
    up: Linear,
    down: Linear,
}

impl Layer {
    fn load(
        vb: VarBuilder,
        config: &Config,
        rotations: &[Tensor; 2],
        options: Options,
    ) -> Result<Self> {
        let &Config { hidden_size: width, intermediate_size: inner, head_dim, .. } = config;
        let [q, kv] =
            [config.num_attention_heads, config.num_key_value_heads].map(|heads| heads * head_dim);
        let linear = |name: &str, dims| Linear::load(vb.pp(name), dims, options.base);
        Ok(Self {
            eps: config.rms_norm_eps,
            head_dim,
            rotations: rotations.clone(),
            input_norm: vb.get(width, "input_layernorm.weight")?,
            q: linear(Q, [width, q])?,
            k: linear(K, [width, kv])?,
            v: linear(V, [width, kv])?,
            o: linear(O, [q, width])?,
            post_attention_norm: vb.get(width, "post_attention_layernorm.weight")?,
            gate: linear(GATE, [width, inner])?,
            up: linear(UP, [width, inner])?,
            down: linear(DOWN, [inner, width])?,
        })
    }

    fn linears(&self) -> [(&'static str, &Linear); 7] {
        let Self { q, k, v, o, gate, up, down, .. } = self;
        [(Q, q), (K, k), (V, v), (O, o), (GATE, gate), (UP, up), (DOWN, down)]
    }

    fn linears_mut(&mut self) -> [(&'static str, &mut Linear); 7] {
        let Self { q, k, v, o, gate, up, down, .. } = self;
        [(Q, q), (K, k), (V, v), (O, o), (GATE, gate), (UP, up), (DOWN, down)]
    }

    /// The residual stream before it to that after it: the sum, and what is to add to it.
    fn forward(&self, stream: &[Tensor]) -> Result<[Tensor; 2]> {
        let (x, sum) = norm(stream, &self.input_norm, self.eps)?;
        let attended = self.attend(&x)?;
        let (x, sum) = norm(&[sum, attended], &self.post_attention_norm, self.eps)?;
        let hidden = self.gate.forward(&x)?.kaio_swiglu(&self.up.forward(&x)?)?;
        Ok([sum, self.down.forward(&hidden)?])
    }

    fn attend(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        // [B, S, H, D]
        let heads = |linear: &Linear| linear.forward(x)?.reshape((batch, seq, (), self.head_dim));
        let turned = |linear| {
            let [cos, sin] = &self.rotations;
            heads(linear)?.transpose(1, 2)?.kaio_rope(cos, sin, RopeLayout::Halves)?.transpose(1, 2)
        };
        let opts = FlashAttnOptions::default().causal(true).layout(AttnLayout::Bshd);
        let (q, k) = (turned(&self.q)?, turned(&self.k)?);
        self.o.forward(&q.kaio_flash_attn_with(&k, &heads(&self.v)?, &opts)?.flatten_from(2)?)
    }
}

const Q: &str = "self_attn.q_proj";
const K: &str = "self_attn.k_proj";
const V: &str = "self_attn.v_proj";
const O: &str = "self_attn.o_proj";
const GATE: &str = "mlp.gate_proj";
const UP: &str = "mlp.up_proj";
const DOWN: &str = "mlp.down_proj";

/// The names of all weights that can be adapted.
pub const LINEARS: [&str; 7] = [Q, K, V, O, GATE, UP, DOWN];
