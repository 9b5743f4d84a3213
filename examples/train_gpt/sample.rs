//! Text from a trained model.

use candle_core::{Result, Tensor};
use candle_nn::ops::softmax;

use crate::args::Args;
use crate::model::Gpt;
use crate::rng::Rng;

/// Continues `--prompt` byte by byte; the higher `--temperature`, the likelier are unlikely bytes.
pub fn generate(model: &Gpt, args: &Args) -> Result<Vec<u8>> {
    let mut rng = Rng::new(args.seed, Rng::SAMPLE);
    let mut text = args.prompt.clone().into_bytes();
    for _ in 0..args.sample_bytes {
        let context = &text[text.len().saturating_sub(model.config().seq)..];
        let ids: Vec<u32> = context.iter().map(|&byte| u32::from(byte)).collect();
        let logits = model.forward(&Tensor::new(ids, &args.device)?.unsqueeze(0)?)?;
        let last = logits.narrow(1, context.len() - 1, 1)?.flatten_all()?;
        let probabilities = softmax(&(last / args.temperature)?, 0)?.to_vec1::<f32>()?;
        text.push(draw(&probabilities, &mut rng));
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
