//! The training loop and its progress.

use std::time::Instant;

use candle_core::Result;
use indicatif::{ProgressBar, ProgressStyle};
use kaio_candle::train::{AdamW, AdamWConfig, Schedule, peak_memory};

use crate::args::Args;
use crate::checkpoint;
use crate::data::Corpus;
use crate::model::Gpt;
use crate::ops::Arithmetic;
use crate::rng::Rng;

/// Losses are smoothed by the mean over this many steps.
pub const SMOOTHING: usize = 20;
/// How often progress is a line of its own when there is no terminal to draw a bar on.
const STEPS_PER_LINE: usize = 25;

const MAX_GRADIENT_NORM: f64 = 1.0;
const WARM_UP_STEPS: u64 = 20;
/// The learning rate ends at this part of its peak.
const FINAL_RATE: f64 = 0.1;

pub struct Trained {
    pub model: Gpt,
    /// The training loss of every step, in nats per token.
    pub losses: Vec<f32>,
}

impl Trained {
    /// The mean loss of every step and those before it, at most [`SMOOTHING`] in all.
    pub fn smoothed(&self) -> Vec<f64> {
        (1..=self.losses.len()).map(|end| recent_mean(&self.losses[..end])).collect()
    }
}

/// Trains one model from its initial weights or, for `--resume`, from a checkpoint.
pub fn train(args: &Args, arithmetic: Arithmetic, corpus: &Corpus) -> Result<Trained> {
    let device = &args.device;
    let model = Gpt::new(args.model, arithmetic, args.seed, device)?.recompute(args.recompute);
    let mut optimizer = optimizer(args, &model)?;
    let mut losses = match &args.resume {
        Some(path) => checkpoint::load(path, &model, &mut optimizer, device)?,
        None => Vec::new(),
    };
    let checkpoint = match arithmetic {
        Arithmetic::Kaio { .. } => Some(&args.checkpoint),
        Arithmetic::Reference => None,
    };

    let progress = Progress::new(arithmetic, losses.len(), args);
    for step in losses.len()..args.steps {
        losses.push(training_step(args, &model, &mut optimizer, corpus, step)?);
        progress.step(&losses);

        let due = args.checkpoint_every.is_some_and(|every| losses.len().is_multiple_of(every));
        if let Some(path) = checkpoint
            && (due || losses.len() == args.steps)
        {
            checkpoint::save(path, &model, &optimizer, &losses, device)?;
        }
    }
    progress.finish()?;
    Ok(Trained { model, losses })
}

/// AdamW with warm-up and a cosine, as scripts/torch_train_gpt.py has it.
pub fn optimizer(args: &Args, model: &Gpt) -> Result<AdamW> {
    let schedule = Schedule::cosine(args.steps as u64).warm_up(WARM_UP_STEPS).floor(FINAL_RATE);
    let config = AdamWConfig::default().lr(args.rate).betas(0.9, 0.98).weight_decay(0.1);
    let config = config.clip_norm(MAX_GRADIENT_NORM).schedule(schedule);
    AdamW::named(model.parameters().iter().cloned(), config)
}

/// The loss, and the weights changed against it.
pub fn training_step(
    args: &Args,
    model: &Gpt,
    optimizer: &mut AdamW,
    corpus: &Corpus,
    step: usize,
) -> Result<f32> {
    let mut rng = batch_rng(args.seed, step);
    let (tokens, targets) = corpus.training_batch(&mut rng, args.batch, &args.device)?;
    let loss = model.loss(&tokens, &targets)?;
    optimizer.backward_step(&loss)?;
    loss.to_scalar()
}

/// A batch follows from the seed and the step alone, so a resumed run sees the same ones.
pub fn batch_rng(seed: u64, step: usize) -> Rng {
    Rng::new(seed, step as u64)
}

/// The part of `--peak` that a rate of tokens a second uses, and the peak in TFLOP/s.
pub fn utilisation(args: &Args, rate: f64) -> Option<(f64, f64)> {
    let peak = args.peak?;
    Some((rate * args.model.flops_per_token() / (peak * 1e12), peak))
}

fn recent_mean(losses: &[f32]) -> f64 {
    let recent = &losses[losses.len().saturating_sub(SMOOTHING)..];
    recent.iter().copied().map(f64::from).sum::<f64>() / recent.len() as f64
}

/// A bar on a terminal, now and then a line elsewhere.
struct Progress<'a> {
    args: &'a Args,
    bar: ProgressBar,
    name: &'static str,
    first_step: usize,
    started: Instant,
}

impl<'a> Progress<'a> {
    fn new(arithmetic: Arithmetic, first_step: usize, args: &'a Args) -> Self {
        let style =
            ProgressStyle::with_template("{prefix} {bar:40} {pos}/{len} steps, {msg}, {eta} left");
        let bar = ProgressBar::new(args.steps as u64)
            .with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
            .with_prefix(arithmetic.name())
            .with_position(first_step as u64);
        bar.reset_eta();
        Self { args, bar, name: arithmetic.name(), first_step, started: Instant::now() }
    }

    fn step(&self, losses: &[f32]) {
        let steps = losses.len();
        let tokens = (steps - self.first_step) * self.args.batch * self.args.model.seq;
        let rate = tokens as f64 / self.started.elapsed().as_secs_f64();
        let mut message = format!("loss {:.3}, {rate:.0} tokens/s", recent_mean(losses));
        if let Some((part, _)) = utilisation(self.args, rate) {
            message += &format!(", MFU {:.1} %", part * 100.0);
        }
        if self.bar.is_hidden() && steps.is_multiple_of(STEPS_PER_LINE) {
            eprintln!("{}: step {steps}, {message}", self.name);
        }
        self.bar.set_message(message);
        self.bar.inc(1);
    }

    fn finish(&self) -> Result<()> {
        self.bar.finish();
        if let Some(bytes) = peak_memory(&self.args.device)? {
            println!("{}: at most {:.2} GiB", self.name, bytes as f64 / f64::from(1 << 30));
        }
        Ok(())
    }
}
