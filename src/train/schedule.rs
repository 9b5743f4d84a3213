//! Learning rates over the steps of a run.

use std::f64::consts::PI;

/// The learning rate of a step as a part of its peak: a linear warm-up, then constant, or a descent to a floor.
///
/// With `w` steps of warm-up, `n` steps in all and a floor `f`, step `s` (counted from 0) has `(s + 1) / w` while
/// `s < w`, and then, of `q = (s − w) / max(n − w, 1)`, at most 1: 1 if constant, `1 − (1 − f)·q` if linear,
/// `f + (1 − f)·(1 + cos πq)/2` if a cosine (Loshchilov and Hutter, "SGDR", 2016).
///
/// ```
/// use kaio_candle::train::Schedule;
///
/// let schedule = Schedule::cosine(1000).warm_up(100).floor(0.1);
/// assert_eq!(schedule.factor(0), 0.01);
/// assert_eq!(schedule.factor(100), 1.0);
/// assert_eq!(schedule.factor(5000), 0.1);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Schedule {
    descent: Descent,
    steps: u64,
    warm_up: u64,
    pub(super) floor: f64,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Descent {
    None,
    Linear,
    Cosine,
}

impl Default for Schedule {
    fn default() -> Self {
        Self::constant()
    }
}

impl Schedule {
    /// The peak in every step.
    pub fn constant() -> Self {
        Self::new(Descent::None, 0)
    }

    /// A line down to the floor, which is reached after `steps` steps.
    pub fn linear(steps: u64) -> Self {
        Self::new(Descent::Linear, steps)
    }

    /// Half a cosine down to the floor, which is reached after `steps` steps.
    pub fn cosine(steps: u64) -> Self {
        Self::new(Descent::Cosine, steps)
    }

    fn new(descent: Descent, steps: u64) -> Self {
        Self { descent, steps, warm_up: 0, floor: 0.0 }
    }

    /// Steps in which the learning rate rises to its peak. They are among those of the descent.
    pub fn warm_up(mut self, steps: u64) -> Self {
        self.warm_up = steps;
        self
    }

    /// Where the descent ends, as a part of the peak: a finite number of at least 0, which is 0 if not set.
    pub fn floor(mut self, part: f64) -> Self {
        self.floor = part;
        self
    }

    /// The part of the peak that a step has, counted from 0.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warm_up {
            return (step + 1) as f64 / self.warm_up as f64;
        }
        let span = self.steps.saturating_sub(self.warm_up).max(1);
        let done = ((step - self.warm_up) as f64 / span as f64).min(1.0);
        match self.descent {
            Descent::None => 1.0,
            Descent::Linear => 1.0 - (1.0 - self.floor) * done,
            Descent::Cosine => self.floor + (1.0 - self.floor) * 0.5 * (1.0 + (PI * done).cos()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rises_and_falls() {
        for schedule in [Schedule::linear(110), Schedule::cosine(110)] {
            let schedule = schedule.warm_up(10).floor(0.2);
            let rates: Vec<_> = (0..200).map(|step| schedule.factor(step)).collect();
            assert_eq!([rates[0], rates[9], rates[10]], [0.1, 1.0, 1.0]);
            assert!((rates[60] - 0.6).abs() < 1e-12, "{}", rates[60]);
            assert!(rates[10..=110].is_sorted_by(|a, b| a > b));
            assert!(rates[110..].iter().all(|rate| (rate - 0.2).abs() < 1e-12));
        }
        let constant = Schedule::constant().warm_up(2);
        assert_eq!([0, 1, 2, 1 << 40].map(|step| constant.factor(step)), [0.5, 1.0, 1.0, 1.0]);
        // A run that ends within its warm-up.
        assert_eq!(Schedule::cosine(5).warm_up(10).factor(10), 1.0);
    }
}
