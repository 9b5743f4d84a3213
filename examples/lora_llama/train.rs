//! Steps, and losses on text that none of them saw.

use std::time::Instant;

use candle_core::{Result, Tensor};
use kaio_candle::train::{AdamW, backward, cast_once};

use crate::args::Args;
use crate::data::Corpus;
use crate::model::Llama;
use crate::rng::Rng;

/// Steps in which the learning rate rises.
pub const WARM_UP: u64 = 10;
/// How often a run says where it is.
const REPORTS: usize = 10;
/// Steps before the clock starts: the first ones compile kernels and fill the allocator's pool.
const UNTIMED: usize = 3;

pub struct Trainer<'a> {
    pub model: &'a Llama,
    pub corpus: &'a Corpus,
    pub args: &'a Args,
}

impl Trainer<'_> {
    /// Goes on to as many steps in all, and gives the tokens a second.
    ///
    /// A variable without a gradient is an error of the step, which names it.
    pub fn run(&self, optimizer: &mut AdamW, steps: usize) -> Result<Option<f64>> {
        let Args { device, batch, seq, .. } = self.args;
        let (first, mut losses, mut timed) = (optimizer.steps() as usize, vec![], None);
        for step in first..steps {
            if step == first + UNTIMED {
                device.synchronize()?;
                timed = Some(Instant::now());
            }
            losses.push(self.step(optimizer, step)?);
            // Only now does the host wait for the device.
            if (step + 1) * REPORTS / steps > step * REPORTS / steps {
                let mean = Tensor::stack(&losses, 0)?.mean_all()?.to_scalar::<f32>()?;
                println!("  step {:5}: loss {mean:.3}", step + 1);
                losses.clear();
            }
        }
        device.synchronize()?;
        let tokens = (steps.saturating_sub(first + UNTIMED) * batch * seq) as f64;
        Ok(timed.map(|begin| tokens / begin.elapsed().as_secs_f64()))
    }

    /// The loss, on the device.
    fn step(&self, optimizer: &mut AdamW, step: usize) -> Result<Tensor> {
        let Args { device, batch, seed, .. } = self.args;
        // A batch follows from the seed and the step alone: a run that goes on sees the same ones.
        let mut rng = Rng::new(*seed, step as u64);
        let (tokens, targets) = self.corpus.training_batch(&mut rng, *batch, device)?;
        // No weight changes until the optimizer's step: each is cast once.
        let (loss, grads) = cast_once(|| -> Result<_> {
            let loss = self.model.loss(&tokens, &targets)?;
            Ok((loss.detach(), backward(&loss)?))
        })?;
        optimizer.step(&grads)?;
        Ok(loss)
    }

    /// The mean loss, in nats per token, on text that is not trained on.
    pub fn held_out(&self) -> Result<f64> {
        let (Args { batch, device, .. }, model) = (self.args, self.model.detached());
        self.corpus.validation_loss(*batch, device, |tokens, targets| model.loss(tokens, targets))
    }
}
