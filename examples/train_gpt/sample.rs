//! Text from a trained model.

use candle_core::{Result, Tensor};
use candle_nn::ops::softmax;

use crate::args::Args;
use crate::data::Alphabet;
use crate::model::Gpt;
use crate::rng::Rng;

/// Continues `--prompt` token by token; the higher `--temperature`, the likelier are unlikely ones.
pub fn generate(model: &Gpt, alphabet: &Alphabet, args: &Args) -> Result<String> {
    let mut rng = Rng::new(args.seed, Rng::SAMPLE);
    let mut text = alphabet.encode(args.prompt.as_bytes())?;
    for _ in 0..args.sample {
        let context = &text[text.len().saturating_sub(model.config().seq)..];
        let logits = model.forward(&Tensor::new(context, &args.device)?.unsqueeze(0)?)?;
        let last = logits.narrow(1, context.len() - 1, 1)?.flatten_all()?;
        let probabilities = softmax(&(last / args.temperature)?, 0)?.to_vec1::<f32>()?;
        text.push(draw(&probabilities, &mut rng));
    }
    alphabet.decode(&text)
}

fn draw(probabilities: &[f32], rng: &mut Rng) -> u32 {
    let mut rest = rng.uniform() as f32;
    let drawn = probabilities.iter().position(|&p| {
        rest -= p;
        rest < 0.0
    });
    // Rounding can leave a little over after the last token.
    drawn.unwrap_or(probabilities.len() - 1) as u32
}
