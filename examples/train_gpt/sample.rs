//! Text from a trained model.

use candle_core::{Device, Result, Tensor};
use candle_nn::ops::softmax;

use crate::model::Gpt;
use crate::rng::Rng;

/// Continues `prompt` by `count` bytes, each drawn from the softmax of the logits divided by `temperature`.
pub fn generate(
    model: &Gpt,
    prompt: &[u8],
    count: usize,
    temperature: f64,
    rng: &mut Rng,
    device: &Device,
) -> Result<Vec<u8>> {
    let mut text = prompt.to_vec();
    for _ in 0..count {
        let context = &text[text.len().saturating_sub(model.config().seq)..];
        let ids: Vec<u32> = context.iter().map(|&byte| u32::from(byte)).collect();
        let logits = model.forward(&Tensor::new(ids, device)?.unsqueeze(0)?)?;
        let last = logits.narrow(1, context.len() - 1, 1)?.flatten_all()?;
        let probabilities = softmax(&(last / temperature)?, 0)?.to_vec1::<f32>()?;
        text.push(draw(&probabilities, rng));
    }
    Ok(text)
}

fn draw(probabilities: &[f32], rng: &mut Rng) -> u8 {
    let mut rest = rng.uniform() as f32;
    let drawn = probabilities.iter().position(|&p| {
        rest -= p;
        rest < 0.0
    });
    // Rounding can leave a little over after the last byte.
    drawn.unwrap_or(probabilities.len() - 1) as u8
}
