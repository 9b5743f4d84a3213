//! A Llama with attention by kaio-candle: weights, names and the parts that stay are those of
//! candle-transformers.

use candle_core::{DType, Device, Module, Result, Tensor};
use candle_nn::kv_cache::KvCache;
use candle_nn::{VarBuilder, linear_no_bias, ops::silu, rms_norm, rotary_emb::rope_thd};
use candle_transformers::models::llama::{Cache, Config, Llama};
use kaio_candle::prelude::*;

/// What a model, a layer or its attention does to tokens, the first of which stands at a position.
pub type Forward = Box<dyn FnMut(&Tensor, usize) -> Result<Tensor>>;
pub type Load = fn(VarBuilder, &Config) -> Result<Forward>;

/// What is swapped: `CausalSelfAttention` of candle-transformers.
fn attention(vb: VarBuilder, c: &Config) -> Result<Forward> {
    let (width, dim) = (c.hidden_size, c.hidden_size / c.num_attention_heads);
    let linear = |name: &str, columns| linear_no_bias(width, columns, vb.pp(name));
    let (q, k) = (linear("q_proj", width)?, linear("k_proj", c.num_key_value_heads * dim)?);
    let (v, o) = (linear("v_proj", c.num_key_value_heads * dim)?, linear("o_proj", width)?);
    let (cos, sin) = rotations(vb.dtype(), c, vb.device())?;
    let mut cache = KvCache::new(1, c.max_position_embeddings);
    // Heads stay where the projections write them.
    let opts = FlashAttnOptions::default().causal(true).layout(AttnLayout::Bshd);
    Ok(Box::new(move |x, position| {
        let (batch, seq, _) = x.dims3()?;
        let heads = |x: Tensor| x.reshape((batch, seq, (), dim));
        let (cos, sin) = (cos.narrow(0, position, seq)?, sin.narrow(0, position, seq)?);
        let (q, k) = (heads(q.forward(x)?)?, heads(k.forward(x)?)?);
        let (q, k) = (rope_thd(&q, &cos, &sin)?, rope_thd(&k, &cos, &sin)?);
        let (k, v) = cache.append(&k, &heads(v.forward(x)?)?)?;
        // The swap: no transposes, no repeated keys and values, no mask, no scores, no casts. After
        // earlier calls there are more keys than queries; the last query stands at the last key.
        let attended = q.kaio_flash_attn_with(&k, &v, &opts)?;
        o.forward(&attended.flatten_from(2)?)
    }))
}

/// The cosines and sines of candle-transformers' `Cache`, which keeps its own to itself.
fn rotations(dtype: DType, c: &Config, device: &Device) -> Result<(Tensor, Tensor)> {
    let dim = c.hidden_size / c.num_attention_heads;
    let steps = (0..dim).step_by(2).map(|i| 1. / c.rope_theta.powf(i as f32 / dim as f32));
    let steps = Tensor::from_iter(steps, device)?.unsqueeze(0)?;
    let positions = Tensor::arange(0., c.max_position_embeddings as f32, device)?.unsqueeze(1)?;
    let angles = positions.matmul(&steps)?;
    Ok((angles.cos()?.to_dtype(dtype)?, angles.sin()?.to_dtype(dtype)?))
}

fn layer(vb: VarBuilder, c: &Config) -> Result<Forward> {
    let (width, inner) = (c.hidden_size, c.intermediate_size);
    let norm = |name: &str| rms_norm(width, c.rms_norm_eps, vb.pp(name));
    let (norm1, norm2) = (norm("input_layernorm")?, norm("post_attention_layernorm")?);
    let mut attention = attention(vb.pp("self_attn"), c)?;
    let gate = linear_no_bias(width, inner, vb.pp("mlp.gate_proj"))?;
    let up = linear_no_bias(width, inner, vb.pp("mlp.up_proj"))?;
    let down = linear_no_bias(inner, width, vb.pp("mlp.down_proj"))?;
    Ok(Box::new(move |x, position| {
        let x = (attention(&norm1.forward(x)?, position)? + x)?;
        let hidden = norm2.forward(&x)?;
        down.forward(&(silu(&gate.forward(&hidden)?)? * up.forward(&hidden)?)?)? + x
    }))
}

/// The model: tokens `[B, S]` to the logits of the last of them, `[B, vocabulary]`.
pub fn llama(vb: VarBuilder, c: &Config) -> Result<Forward> {
    let layers = (0..c.num_hidden_layers).map(|i| layer(vb.pp(format!("model.layers.{i}")), c));
    let mut layers = layers.collect::<Result<Vec<_>>>()?;
    // candle-transformers' model without layers is the embedding, the last norm and the head.
    let ends = Llama::load(vb.clone(), &Config { num_hidden_layers: 0, ..c.clone() })?;
    let mut no_cache = Cache::new(false, vb.dtype(), c, vb.device())?;
    Ok(Box::new(move |tokens, position| {
        let start = ends.embed(tokens)?;
        let x = layers.iter_mut().try_fold(start, |x, layer| layer(&x, position))?;
        ends.forward_input_embed(&x, position, &mut no_cache)
    }))
}
