//! A byte-level GPT: pre-norm blocks, squared ReLU, learned positions, no biases, and the embedding
//! for output layer.

use candle_core::{D, DType, Device, Result, Tensor, Var, bail};

use crate::ops::Arithmetic;
use crate::rng::Rng;

/// A token is a byte.
const VOCABULARY: usize = 256;
const INITIAL_STD: f64 = 0.05;
const NORM_EPSILON: f64 = 1e-5;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GptConfig {
    pub seq: usize,
    pub layers: usize,
    pub heads: usize,
    pub dim: usize,
}

pub struct Gpt {
    config: GptConfig,
    arithmetic: Arithmetic,
    embedding: Tensor,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: Norm,
    parameters: Vec<(String, Var)>,
}

impl Gpt {
    /// The weights depend on the configuration and the seed alone: models of either arithmetic start
    /// alike.
    pub fn new(
        config: GptConfig,
        arithmetic: Arithmetic,
        seed: u64,
        device: &Device,
    ) -> Result<Self> {
        let GptConfig { seq, layers, heads, dim } = config;
        if !dim.is_multiple_of(heads) {
            bail!("--dim {dim} does not divide into --heads {heads}")
        }
        let mut init = Init { rng: Rng::new(seed, Rng::WEIGHTS), device, parameters: Vec::new() };
        Ok(Self {
            config,
            arithmetic,
            embedding: init.normal("embedding", (VOCABULARY, dim), INITIAL_STD)?,
            positions: init.normal("positions", (seq, dim), INITIAL_STD)?,
            blocks: (0..layers)
                .map(|layer| Block::new(&mut init, &format!("block{layer}"), config, arithmetic))
                .collect::<Result<_>>()?,
            norm: Norm::new(&mut init, "norm", dim)?,
            parameters: init.parameters,
        })
    }

    pub fn config(&self) -> GptConfig {
        self.config
    }

    /// Every trained tensor with its name, always in the same order.
    pub fn parameters(&self) -> &[(String, Var)] {
        &self.parameters
    }

    /// Logits `[B, S, 256]` of the byte that follows each of `tokens` `[B, S]`.
    pub fn forward(&self, tokens: &Tensor) -> Result<Tensor> {
        let (batch, seq) = tokens.dims2()?;
        let embedded = self.embedding.index_select(&tokens.flatten_all()?, 0)?.reshape((
            batch,
            seq,
            self.config.dim,
        ))?;
        let mut x = embedded.broadcast_add(&self.positions.narrow(0, 0, seq)?)?;
        for block in &self.blocks {
            x = block.forward(&x)?;
        }
        self.arithmetic.linear(&self.norm.forward(&x)?, &self.embedding.t()?)
    }

    /// The mean cross entropy, in nats per byte, of predicting `targets` from `tokens`.
    pub fn loss(&self, tokens: &Tensor, targets: &Tensor) -> Result<Tensor> {
        let logits = self.forward(tokens)?;
        candle_nn::loss::cross_entropy(&logits.flatten_to(1)?, &targets.flatten_all()?)
    }
}

struct Block {
    heads: usize,
    arithmetic: Arithmetic,
    attention_norm: Norm,
    qkv: Tensor,
    attention_out: Tensor,
    mlp_norm: Norm,
    mlp_in: Tensor,
    mlp_out: Tensor,
}

impl Block {
    fn new(init: &mut Init, name: &str, config: GptConfig, arithmetic: Arithmetic) -> Result<Self> {
        let GptConfig { layers, heads, dim, .. } = config;
        // Each block adds twice to the residual stream; scaled so, as in GPT-2, the variance of the
        // sum does not grow with the depth.
        let residual_std = INITIAL_STD / (2.0 * layers as f64).sqrt();
        Ok(Self {
            heads,
            arithmetic,
            attention_norm: Norm::new(init, &format!("{name}.attention_norm"), dim)?,
            qkv: init.normal(&format!("{name}.qkv"), (dim, 3 * dim), INITIAL_STD)?,
            attention_out: init.normal(
                &format!("{name}.attention_out"),
                (dim, dim),
                residual_std,
            )?,
            mlp_norm: Norm::new(init, &format!("{name}.mlp_norm"), dim)?,
            mlp_in: init.normal(&format!("{name}.mlp_in"), (dim, 4 * dim), INITIAL_STD)?,
            mlp_out: init.normal(&format!("{name}.mlp_out"), (4 * dim, dim), residual_std)?,
        })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let x = (x + self.attend(&self.attention_norm.forward(x)?)?)?;
        let hidden =
            self.arithmetic.linear(&self.mlp_norm.forward(&x)?, &self.mlp_in)?.relu()?.sqr()?;
        &x + self.arithmetic.linear(&hidden, &self.mlp_out)?
    }

    fn attend(&self, x: &Tensor) -> Result<Tensor> {
        let (batch, seq, dim) = x.dims3()?;
        let shape = (batch, seq, 3, self.heads, dim / self.heads);
        let qkv = self.arithmetic.projection(x, &self.qkv)?.reshape(shape)?;
        // [B, S, H, D] views of the one projection.
        let view = |index: usize| qkv.narrow(2, index, 1)?.squeeze(2);
        let attended = self.arithmetic.attention(&view(0)?, &view(1)?, &view(2)?)?;
        self.arithmetic.linear(&attended.flatten_from(2)?, &self.attention_out)
    }
}

/// Layer norm with a gain, in plain tensor operations: the fused one behind `candle_nn::LayerNorm`
/// has no gradient.
struct Norm {
    gain: Tensor,
}

impl Norm {
    fn new(init: &mut Init, name: &str, dim: usize) -> Result<Self> {
        let gain = init.parameter(name, Tensor::ones(dim, DType::F32, init.device)?)?;
        Ok(Self { gain })
    }

    fn forward(&self, x: &Tensor) -> Result<Tensor> {
        let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
        let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
        let deviation = (variance + NORM_EPSILON)?.sqrt()?;
        centred.broadcast_div(&deviation)?.broadcast_mul(&self.gain)
    }
}

/// Makes the initial weights and keeps the list of them.
struct Init<'a> {
    rng: Rng,
    device: &'a Device,
    parameters: Vec<(String, Var)>,
}

impl Init<'_> {
    fn normal(&mut self, name: &str, (rows, columns): (usize, usize), std: f64) -> Result<Tensor> {
        let values: Vec<f32> =
            (0..rows * columns).map(|_| (std * self.rng.normal()) as f32).collect();
        self.parameter(name, Tensor::from_vec(values, (rows, columns), self.device)?)
    }

    fn parameter(&mut self, name: &str, value: Tensor) -> Result<Tensor> {
        let var = Var::from_tensor(&value)?;
        let tensor = var.as_tensor().clone();
        self.parameters.push((name.to_owned(), var));
        Ok(tensor)
    }
}
