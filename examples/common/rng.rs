//! Random numbers that a seed decides.
//!
//! candle's CPU generator cannot be seeded; a run that can be repeated and resumed needs one that
//! can.
#![allow(dead_code, reason = "each example that includes this file uses some of it")]

use rayon::prelude::*;

/// What the state grows by with each number.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64 (Steele, Lea and Flood, 2014).
pub struct Rng(u64);

impl Rng {
    /// The stream of the initial weights; a training step's is its number.
    pub const WEIGHTS: u64 = u64::MAX;
    /// The stream of the generated text.
    pub const SAMPLE: u64 = u64::MAX - 1;
    /// The stream of a text that nobody wrote.
    pub const TEXT: u64 = u64::MAX - 2;
    /// The stream of the initial weights of an adapter.
    pub const ADAPTER: u64 = u64::MAX - 3;

    /// One of the independent streams of a seed.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Self(seed);
        Self(rng.next() ^ Self(stream).next().rotate_left(32))
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(STEP);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Uniform in `[0, 1)`.
    pub fn uniform(&mut self) -> f64 {
        (self.next() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform in `0..end`.
    pub fn below(&mut self, end: usize) -> usize {
        (self.uniform() * end as f64) as usize
    }

    /// Standard normal, by Box and Muller.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }

    /// So many of them times `std`, by all threads: the state is a count, so that each knows its numbers.
    pub fn normals(&mut self, count: usize, std: f64) -> Vec<f32> {
        let from = self.0;
        let after = |i: usize| from.wrapping_add(STEP.wrapping_mul(2 * i as u64));
        self.0 = after(count);
        let normal = |i| (std * Self(after(i)).normal()) as f32;
        (0..count).into_par_iter().map(normal).collect()
    }
}
