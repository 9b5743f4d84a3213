//! Contestants that take turns.

use candle_core::Result;

/// Something to time.
pub struct Contestant {
    pub name: &'static str,
    pub run: Box<dyn FnMut() -> Result<()>>,
}

pub fn contestant(name: &'static str, run: impl FnMut() -> Result<()> + 'static) -> Contestant {
    Contestant { name, run: Box::new(run) }
}

const WARM_UP: usize = 3;

/// What `once` measured of each contestant in each of `rounds` rounds, after warm-up rounds.
pub fn take_turns<S>(
    contestants: &mut [Contestant],
    rounds: usize,
    mut once: impl FnMut(&mut dyn FnMut() -> Result<()>) -> Result<S>,
) -> Result<Vec<Vec<S>>> {
    let mut samples: Vec<Vec<S>> = contestants.iter().map(|_| Vec::new()).collect();
    for round in 0..WARM_UP + rounds {
        for turn in 0..contestants.len() {
            // Another one goes first in each round: who follows whom matters to caches and queues.
            let i = (round + turn) % contestants.len();
            let sample = once(&mut contestants[i].run)?;
            if round >= WARM_UP {
                samples[i].push(sample);
            }
        }
    }
    Ok(samples)
}

pub fn median(mut samples: Vec<f64>) -> f64 {
    samples.sort_by(f64::total_cmp);
    samples[samples.len() / 2]
}
