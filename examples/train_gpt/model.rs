//! Decoders of two families: GPT (layer norms, learned positions, GELU) and Llama (RMS norms, rotary positions, SwiGLU,
//! fewer heads of keys than of queries), both with the embedding for output layer.

use std::sync::Arc;

use candle_core::{Context, Device, Result, Tensor, Var, bail};
use kaio_candle::train;

use crate::ops::{Arithmetic, Linear, Norm, NormKind};
use crate::rng::Rng;

const ROPE_BASE: f64 = 500_000.0;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// Of which products and norms may have biases.
    Gpt {
        biases: bool,
    },
    Llama,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Config {
    pub family: Family,
    /// Tokens that there are; 256 are bytes.
    pub vocabulary: usize,
    pub seq: usize,
    pub layers: usize,
    pub heads: usize,
    /// Heads of keys and values.
    pub kv_heads: usize,
    pub dim: usize,
    /// Width between the two products of a block's second half.
    pub hidden: usize,
}

impl Config {
    /// The byte-level GPT that learns on a laptop.
    pub const SMALL: Self = Self::bytes(128, 3, 4, 128);
    /// The same of 86 M parameters.
    pub const BYTE_86M: Self = Self::bytes(1024, 12, 12, 768);
    /// GPT-2 (Radford et al. 2019), its 50257 tokens padded to a multiple of 64.
    pub const GPT2_124M: Self =
        Self { family: Family::Gpt { biases: true }, vocabulary: 50304, ..Self::BYTE_86M };
    /// The smallest Llama 3.2 (Meta 2024), of 1.24 G parameters.
    pub const LLAMA_1B: Self = Self {
        family: Family::Llama,
        vocabulary: 128_256,
        seq: 2048,
        layers: 16,
        heads: 32,
        kv_heads: 8,
        dim: 2048,
        hidden: 8192,
    };

    const fn bytes(seq: usize, layers: usize, heads: usize, dim: usize) -> Self {
        let family = Family::Gpt { biases: false };
        Self { family, vocabulary: 256, seq, layers, heads, kv_heads: heads, dim, hidden: 4 * dim }
    }

    /// A GPT of another width.
    pub fn set_dim(&mut self, dim: usize) {
        (self.dim, self.hidden) = (dim, dim * self.hidden / self.dim);
    }

    /// Another number of heads, of which as many share keys.
    pub fn set_heads(&mut self, heads: usize) {
        (self.heads, self.kv_heads) = (heads, (heads * self.kv_heads / self.heads).max(1));
    }

    fn norm(&self) -> NormKind {
        match self.family {
            Family::Gpt { .. } => NormKind::Layer,
            Family::Llama => NormKind::RootMeanSquare,
        }
    }

    fn biases(&self) -> bool {
        self.family == Family::Gpt { biases: true }
    }

    /// Floating-point operations of a training step for each token, as model FLOPs are usually counted (PaLM, appendix B):
    /// six for each weight of a product, and for attention's two products, of all keys although a causal one needs half.
    pub fn flops_per_token(&self) -> f64 {
        let Self { vocabulary, seq, layers, heads, kv_heads, dim, hidden, .. } = *self;
        let kv = dim / heads * kv_heads;
        let products = if self.family == Family::Llama { 3 } else { 2 };
        let layer = 2 * dim * (dim + kv) + products * dim * hidden;
        (6 * (layers * layer + vocabulary * dim) + 12 * layers * seq * dim) as f64
    }
}

pub struct Gpt {
    config: Config,
    arithmetic: Arithmetic,
    embedding: Tensor,
    positions: Positions,
    blocks: Vec<Arc<Block>>,
    /// Whether what a block computes on its way is computed again in the backward pass.
    recompute: bool,
    norm: Norm,
    parameters: Vec<(String, Var)>,
}

/// How a block knows where a token is.
enum Positions {
    /// By a vector that is added to the token's.
    Learned(Tensor),
    /// By the angle by which queries and keys are turned: cosines and sines `[seq, D/2]`.
    Rotary([Tensor; 2]),
}

impl Gpt {
    /// The weights depend on the configuration and the seed alone: models of either arithmetic start
    /// alike, but for the rounding of what is kept in 16 bits.
    pub fn new(config: Config, arithmetic: Arithmetic, seed: u64, device: &Device) -> Result<Self> {
        let Config { family, vocabulary, seq, layers, heads, kv_heads, dim, .. } = config;
        if !dim.is_multiple_of(heads) || !heads.is_multiple_of(kv_heads) {
            bail!("--dim {dim} does not divide into --heads {heads}, or these into {kv_heads}")
        }
        let rng = Rng::new(seed, Rng::WEIGHTS);
        let mut init = Init { rng, device, arithmetic, parameters: Vec::new() };
        let std = init.std(&config);
        Ok(Self {
            config,
            arithmetic,
            embedding: init.normal("embedding", (vocabulary, dim), std)?,
            positions: match family {
                Family::Gpt { .. } => {
                    Positions::Learned(init.normal("positions", (seq, dim), std)?)
                }
                Family::Llama => Positions::Rotary(angles(seq, dim / heads, arithmetic, device)?),
            },
            blocks: (0..layers)
                .map(|layer| Block::new(&mut init, &format!("block{layer}"), config).map(Arc::new))
                .collect::<Result<_>>()?,
            recompute: false,
            norm: init.norm("norm", &config)?,
            parameters: init.parameters,
        })
    }

    /// Lets the graph keep what goes into each block alone, or all that gradients read.
    pub fn recompute(self, recompute: bool) -> Self {
        Self { recompute, ..self }
    }

    pub fn config(&self) -> Config {
        self.config
    }

    /// Every trained tensor with its name, always in the same order.
    pub fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    /// The last layer's result, normalised, `[B, S, dim]`, of tokens `[B, S]`.
    fn hidden(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, seq) = tokens.dims2()?;
        let embedded = self.arithmetic.embedding(&self.embedding, tokens)?;
        let mut stream = match &self.positions {
            Positions::Rotary(_) => Stream { sum: embedded, added: None },
            Positions::Learned(table) => {
                let numbers = Tensor::arange(0, seq as u32, tokens.device())?;
                let numbers = numbers.broadcast_as((batch, seq))?;
                let added = self.arithmetic.embedding(table, &numbers)?;
                Stream { sum: embedded, added: Some(added) }
            }
        };
        let rotary = match &self.positions {
            Positions::Rotary(angles) => {
                let [cos, sin] = angles;
                Some([cos.narrow(0, 0, seq)?, sin.narrow(0, 0, seq)?])
            }
            Positions::Learned(_) => None,
        };
        for block in &self.blocks {
            stream = match self.recompute {
                true => block.recomputed(self.arithmetic, stream, rotary.as_ref())?,
                false => block.forward(self.arithmetic, stream, rotary.as_ref())?,
            };
        }
        Ok(stream.norm(self.arithmetic, &self.norm)?.0)
    }

    /// Logits `[B, S, V]` of the token that follows each of `tokens` `[B, S]`.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        self.arithmetic.logits(&self.hidden(tokens)?, &self.embedding)
    }

    /// The mean cross entropy, in nats per token, of predicting `targets` from `tokens`.
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        self.arithmetic.block(|| {
            let hidden = self.hidden(tokens)?.flatten_to(1)?;
            self.arithmetic.loss(&hidden, &self.embedding, &targets.flatten_all()?)
        })
    }

    /// Its value alone, without the gradients that the loss of bf16 computes with it.
    pub fn loss_value(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let hidden = self.hidden(tokens)?.flatten_to(1)?.detach();
        self.arithmetic.loss(&hidden, &self.embedding.detach(), &targets.flatten_all()?)
    }
}

/// The sum of what all blocks so far have added, of which the last part is still to add: norms do that on their way.
struct Stream {
    sum: Tensor,
    added: Option<Tensor>,
}

impl Stream {
    /// The normalised sum, and the sum.
    fn norm(self, arithmetic: Arithmetic, norm: &Norm) -> Result<(Tensor, Tensor)> {
        match self.added {
            None => Ok((arithmetic.norm(&self.sum, norm)?, self.sum)),
            Some(added) => arithmetic.add_norm(&added, &self.sum, norm),
        }
    }
}

struct Block {
    head_dim: usize,
    attention_norm: Norm,
    q: Linear,
    k: Linear,
    v: Linear,
    attention_out: Linear,
    mlp_norm: Norm,
    /// Of a Llama.
    mlp_gate: Option<Linear>,
    mlp_in: Linear,
    mlp_out: Linear,
}

impl Block {
    fn new(init: &mut Init, name: &str, config: Config) -> Result<Self> {
        let Config { layers, heads, kv_heads, dim, hidden, .. } = config;
        let head_dim = dim / heads;
        let std = init.std(&config);
        // Each block adds twice to the residual stream; scaled so, as in GPT-2, the variance of the
        // sum does not grow with the depth.
        let last_std = std / (2.0 * layers as f64).sqrt();
        let mut linear = |part: &str, from: usize, to: usize, std: f64| {
            init.linear(&format!("{name}.{part}"), (from, to), std, &config)
        };
        let kv = kv_heads * head_dim;
        let [q, k, v] =
            [linear("q", dim, dim, std)?, linear("k", dim, kv, std)?, linear("v", dim, kv, std)?];
        let attention_out = linear("attention_out", dim, dim, last_std)?;
        let mlp_gate = match config.family {
            Family::Llama => Some(linear("mlp_gate", dim, hidden, std)?),
            Family::Gpt { .. } => None,
        };
        let mlp_in = linear("mlp_in", dim, hidden, std)?;
        let mlp_out = linear("mlp_out", hidden, dim, last_std)?;
        let attention_norm = init.norm(&format!("{name}.attention_norm"), &config)?;
        let mlp_norm = init.norm(&format!("{name}.mlp_norm"), &config)?;
        Ok(Self {
            head_dim,
            attention_norm,
            q,
            k,
            v,
            attention_out,
            mlp_norm,
            mlp_gate,
            mlp_in,
            mlp_out,
        })
    }

    fn forward(&self, ops: Arithmetic, x: Stream, rotary: Option<&[Tensor; 2]>) -> Result<Stream> {
        let (normed, sum) = x.norm(ops, &self.attention_norm)?;
        let added = Some(self.attend(ops, &normed, rotary)?);
        let (normed, sum) = Stream { sum, added }.norm(ops, &self.mlp_norm)?;
        let hidden = match &self.mlp_gate {
            Some(gate) => {
                ops.swiglu(&ops.linear(&normed, gate)?, &ops.linear(&normed, &self.mlp_in)?)?
            }
            None => ops.linear_gelu(&normed, &self.mlp_in)?,
        };
        let added = Some(ops.linear(&hidden, &self.mlp_out)?);
        Ok(Stream { sum, added })
    }

    /// The same, of which the graph keeps what goes in and comes out.
    fn recomputed(
        self: &Arc<Self>,
        ops: Arithmetic,
        x: Stream,
        rotary: Option<&[Tensor; 2]>,
    ) -> Result<Stream> {
        let (block, rotary) = (self.clone(), rotary.cloned());
        let forward = move |x: &[Tensor]| {
            let x = Stream { sum: x[0].clone(), added: x.get(1).cloned() };
            ops.block(|| {
                let Stream { sum, added } = block.forward(ops, x, rotary.as_ref())?;
                Ok([sum, added.context("a block adds something")?])
            })
        };
        let inputs: Vec<_> = [&x.sum].into_iter().chain(&x.added).collect();
        let [sum, added] = train::checkpoint(forward, &inputs)?;
        Ok(Stream { sum, added: Some(added) })
    }

    fn attend(&self, ops: Arithmetic, x: &Tensor, rotary: Option<&[Tensor; 2]>) -> Result<Tensor> {
        let (batch, seq, _) = x.dims3()?;
        // [B, S, H, D]
        let heads = |linear| ops.linear(x, linear)?.reshape((batch, seq, (), self.head_dim));
        let (mut q, mut k) = (heads(&self.q)?, heads(&self.k)?);
        if let Some(angles) = rotary {
            (q, k) = (ops.rope(&q, angles)?, ops.rope(&k, angles)?);
        }
        let attended = ops.attention(&q, &k, &heads(&self.v)?)?;
        ops.linear(&attended.flatten_from(2)?, &self.attention_out)
    }
}

/// The cosines and sines of rotary positions (Su et al. 2021), `[seq, width/2]`.
fn angles(
    seq: usize,
    width: usize,
    arithmetic: Arithmetic,
    device: &Device,
) -> Result<[Tensor; 2]> {
    let angle = |i: usize| {
        let (position, pair) = (i / (width / 2), i % (width / 2));
        position as f64 * ROPE_BASE.powf(-2.0 * pair as f64 / width as f64)
    };
    let table = |of: fn(f64) -> f64| {
        let values: Vec<f32> = (0..seq * width / 2).map(|i| of(angle(i)) as f32).collect();
        let table = Tensor::from_vec(values, (seq, width / 2), device)?;
        table.to_dtype(arithmetic.dtype())
    };
    Ok([table(f64::cos)?, table(f64::sin)?])
}

/// Makes the initial weights and keeps the list of them.
struct Init<'a> {
    rng: Rng,
    device: &'a Device,
    arithmetic: Arithmetic,
    parameters: Vec<(String, Var)>,
}

impl Init<'_> {
    /// As in GPT-2, and more for the small model, which learns faster so.
    fn std(&self, config: &Config) -> f64 {
        if config.vocabulary == 256 { 0.05 } else { 0.02 }
    }

    fn normal(&mut self, name: &str, (rows, columns): (usize, usize), std: f64) -> Result<Tensor> {
        let values = self.rng.normals(rows * columns, std);
        let value = Tensor::from_vec(values, (rows, columns), self.device)?;
        self.parameter(name, value.to_dtype(self.arithmetic.dtype())?)
    }

    fn linear(
        &mut self,
        name: &str,
        dims: (usize, usize),
        std: f64,
        config: &Config,
    ) -> Result<Linear> {
        let weight = self.normal(name, dims, std)?;
        let bias = match config.biases() {
            true => Some(self.filled(&format!("{name}.bias"), dims.1, 0.0)?),
            false => None,
        };
        Ok(Linear { weight, bias })
    }

    fn norm(&mut self, name: &str, config: &Config) -> Result<Norm> {
        let gain = self.filled(name, config.dim, 1.0)?;
        let bias = match config.biases() {
            true => Some(self.filled(&format!("{name}.bias"), config.dim, 0.0)?),
            false => None,
        };
        Ok(Norm { kind: config.norm(), gain, bias })
    }

    fn filled(&mut self, name: &str, len: usize, value: f32) -> Result<Tensor> {
        self.parameter(name, Tensor::full(value, len, self.device)?)
    }

    fn parameter(&mut self, name: &str, value: Tensor) -> Result<Tensor> {
        let var = Var::from_tensor(&value)?;
        let tensor = var.as_tensor().clone();
        self.parameters.push((name.to_owned(), var));
        Ok(tensor)
    }
}
