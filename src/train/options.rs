//! The options of [`AdamW`](super::AdamW).

use super::Schedule;
use crate::error::{Error, Result};

/// How AdamW keeps its moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Moments {
    /// In f32: 8 bytes for each element.
    #[default]
    F32,
    /// In codes of eight bits with an f32 scale for each 256 elements: 2 bytes for each element. Variables of fewer
    /// than 4096 elements keep theirs in f32, as in bitsandbytes: norms and biases, which need the precision.
    ///
    /// Block-wise dynamic quantisation ([Dettmers et al., 2021](https://arxiv.org/abs/2110.02861)), of the first moment
    /// and of the *root* of the second one: a root has half as many orders of magnitude, so that it does not become 0
    /// where the first moment, which it divides, does not.
    Bits8,
}

/// Options of [`AdamW`](super::AdamW). The defaults are candle-nn's `ParamsAdamW`.
///
/// ```
/// use kaio_candle::train::{AdamWConfig, Moments, Schedule};
///
/// let config = AdamWConfig::default()
///     .lr(3e-4)
///     .betas(0.9, 0.95)
///     .weight_decay(0.1)
///     .clip_norm(1.0)
///     .schedule(Schedule::cosine(10_000).warm_up(500).floor(0.1))
///     .moments(Moments::Bits8);
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AdamWConfig {
    /// The learning rate, or the peak of its schedule: 0.001.
    pub lr: f64,
    /// The decay of the first moment: 0.9.
    pub beta1: f64,
    /// The decay of the second moment: 0.999.
    pub beta2: f64,
    /// What is added to the root of the second moment: 10⁻⁸.
    pub eps: f64,
    /// The decoupled weight decay: 0.01. [`decay_where`](super::AdamW::decay_where) says of which variables.
    pub weight_decay: f64,
    /// The norm of all gradients together beyond which they are scaled down to it; `None`: they are taken as they are.
    pub clip_norm: Option<f64>,
    /// The learning rate over the steps: constant.
    pub schedule: Schedule,
    /// How the moments are kept: in f32.
    pub moments: Moments,
    /// Whether a variable without a gradient keeps its value and its state in a step, as in candle-nn. By default it is
    /// an error that names it.
    pub skip_missing: bool,
}

impl Default for AdamWConfig {
    fn default() -> Self {
        Self {
            lr: 0.001,
            beta1: 0.9,
            beta2: 0.999,
            eps: 1e-8,
            weight_decay: 0.01,
            clip_norm: None,
            schedule: Schedule::constant(),
            moments: Moments::F32,
            skip_missing: false,
        }
    }
}

impl AdamWConfig {
    /// Sets the learning rate.
    pub fn lr(mut self, lr: f64) -> Self {
        self.lr = lr;
        self
    }

    /// Sets the decays of both moments.
    pub fn betas(mut self, beta1: f64, beta2: f64) -> Self {
        (self.beta1, self.beta2) = (beta1, beta2);
        self
    }

    /// Sets what is added to the root of the second moment.
    pub fn eps(mut self, eps: f64) -> Self {
        self.eps = eps;
        self
    }

    /// Sets the weight decay.
    pub fn weight_decay(mut self, weight_decay: f64) -> Self {
        self.weight_decay = weight_decay;
        self
    }

    /// Sets the norm to which gradients are scaled down.
    pub fn clip_norm(mut self, max_norm: f64) -> Self {
        self.clip_norm = Some(max_norm);
        self
    }

    /// Sets the learning rate over the steps.
    pub fn schedule(mut self, schedule: Schedule) -> Self {
        self.schedule = schedule;
        self
    }

    /// Sets how the moments are kept.
    pub fn moments(mut self, moments: Moments) -> Self {
        self.moments = moments;
        self
    }

    /// Sets whether variables without a gradient are left alone.
    pub fn skip_missing(mut self, skip: bool) -> Self {
        self.skip_missing = skip;
        self
    }

    pub(super) fn check(&self, op: &'static str) -> Result<()> {
        at_least_0(op, "lr", self.lr)?;
        at_least_0(op, "eps", self.eps)?;
        at_least_0(op, "weight_decay", self.weight_decay)?;
        for (name, beta) in [("beta1", self.beta1), ("beta2", self.beta2)] {
            number(op, name, beta, (0.0..1.0).contains(&beta), "at least 0 and less than 1")?;
        }
        at_least_0(op, "floor", self.schedule.floor)?;
        self.clip_norm.map_or(Ok(()), |max_norm| norm(op, "clip_norm", max_norm))
    }
}

/// A number that is finite and not negative.
pub(super) fn at_least_0(op: &'static str, name: &'static str, x: f64) -> Result<()> {
    number(op, name, x, x >= 0.0 && x.is_finite(), "a finite number of at least 0")
}

/// The largest norm of gradients.
pub(super) fn norm(op: &'static str, name: &'static str, x: f64) -> Result<()> {
    number(op, name, x, x > 0.0 && x.is_finite(), "a finite number greater than 0")
}

fn number(op: &'static str, name: &'static str, x: f64, holds: bool, want: &str) -> Result<()> {
    if holds {
        return Ok(());
    }
    let (got, want) = (x.to_string(), want.to_owned());
    Err(Error::Value { op, name, got, want, fix: "the defaults are those of `AdamWConfig`" })
}
