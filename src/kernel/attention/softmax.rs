//! The softmax of rows that come in blocks: the largest score and the sum so far, to base 2.
//!
//! A thread has fragments of two rows, as `mma.sync` and `wgmma` leave them: score `4j + 2h + c` is of
//! row `h`. Four neighbouring lanes share a row.

use crate::ptx::{Kernel, Reg};

/// The state of a thread's two rows.
#[derive(Clone, Copy)]
pub struct Softmax<'k> {
    max: [Reg<'k, f32>; 2],
    /// This thread's share.
    sum: [Reg<'k, f32>; 2],
    /// This thread's share of what rounding has added to exponentials that are multiplied with values.
    rounding: Option<[Reg<'k, f32>; 2]>,
    /// What scores are multiplied with, including log₂e. More than 0. None: they are to base 2.
    scale: Option<Reg<'k, f32>>,
}

/// Rows at their end.
#[derive(Clone, Copy)]
pub struct Finished<'k> {
    /// The reciprocals of the sums: 0 for a row without keys.
    pub inverse: [Reg<'k, f32>; 2],
    /// The natural logarithms of the sums of the exponentials.
    pub lse: [Reg<'k, f32>; 2],
}

impl<'k> Softmax<'k> {
    /// `rounds`: whether [`round`](Self::round) will be called.
    pub fn new(k: &'k Kernel, scale: Option<Reg<'k, f32>>, rounds: bool) -> Self {
        Self { max: k.regs(), sum: k.regs(), rounding: rounds.then(|| k.regs()), scale }
    }

    /// Rows without any key.
    pub fn reset(&self) {
        self.max.iter().for_each(|max| max.set(f32::NEG_INFINITY));
        self.sum.iter().chain(self.rounding.iter().flatten()).for_each(|sum| sum.set(0.0));
    }

    /// The first block: the exponentials of its scores.
    pub fn first(&self, scores: &[Reg<'k, f32>]) -> Vec<Reg<'k, f32>> {
        for (row, max) in self.max.iter().enumerate() {
            max.set(across_quad(fold(scores, row, Reg::max), Reg::max));
        }
        let exponentials = self.exponentials(scores);
        for (row, sum) in self.sum.iter().enumerate() {
            sum.set(fold(&exponentials, row, |a, b| a + b));
        }
        exponentials
    }

    /// Another block: the exponentials of its scores, and by what both rows' former sums shrink.
    pub fn next(&self, scores: &[Reg<'k, f32>]) -> (Vec<Reg<'k, f32>>, [Reg<'k, f32>; 2]) {
        let before = self.max.map(|max| max.kernel().var(max));
        for (row, max) in self.max.iter().enumerate() {
            let here = fold(scores, row, Reg::max).max(before[row]);
            max.set(across_quad(here, Reg::max));
        }
        let used = self.used();
        let factors = std::array::from_fn(|row| self.scaled(before[row] - used[row]).exp2_ftz());
        let exponentials = self.exponentials(scores);
        for (row, sum) in self.sum.iter().enumerate() {
            sum.scale(factors[row]);
            sum.increase(fold(&exponentials, row, |a, b| a + b));
        }
        for (rounding, factor) in self.rounding.iter().flatten().zip(factors) {
            rounding.scale(factor);
        }
        (exponentials, factors)
    }

    /// Of a block whose exponentials are rounded before they are multiplied with the values: where a row
    /// has few keys, its result is that much nearer if it is divided by the sum of what was multiplied.
    /// The logarithm stays that of the exact sum.
    pub fn round(&self, exact: &[Reg<'k, f32>], rounded: &[Reg<'k, f32>]) {
        let roundings = self.rounding.expect("it was announced");
        for (row, rounding) in roundings.iter().enumerate() {
            let [exact, rounded] = [exact, rounded].map(|all| fold(all, row, |a, b| a + b));
            rounding.increase(rounded - exact);
        }
    }

    /// What is subtracted from the scores: the largest one, or 0 while a row has seen no key or none but
    /// of -∞, since -∞ - -∞ is no number.
    fn used(&self) -> [Reg<'k, f32>; 2] {
        self.max.map(|max| max.or_else(max.gt(f32::NEG_INFINITY), 0.0))
    }

    fn scaled(&self, score: Reg<'k, f32>) -> Reg<'k, f32> {
        self.scale.map_or(score, |scale| score * scale)
    }

    fn exponentials(&self, scores: &[Reg<'k, f32>]) -> Vec<Reg<'k, f32>> {
        let least = self.used().map(|max| -self.scaled(max));
        let exponential = |(i, &score): (usize, &Reg<'k, f32>)| {
            let least = least[i / 2 % 2];
            match self.scale {
                Some(scale) => score.fma(scale, least),
                None => score + least,
            }
            .exp2_ftz()
        };
        scores.iter().enumerate().map(exponential).collect()
    }

    /// The end of the rows.
    pub fn finish(&self) -> Finished<'k> {
        let across = |sum| across_quad(sum, |a, b| a + b);
        let sums = self.sum.map(across);
        let divisors = match self.rounding {
            None => sums,
            Some(roundings) => std::array::from_fn(|row| sums[row] + across(roundings[row])),
        };
        let logarithm = |row: usize| {
            let (max, sum) = (self.scaled(self.max[row]), sums[row]);
            let lse = (max + sum.log2()) * std::f32::consts::LN_2;
            unless_zero(sum, lse, f32::NEG_INFINITY)
        };
        Finished {
            inverse: divisors.map(|sum| unless_zero(sum, sum.recip(), 0.0)),
            lse: std::array::from_fn(logarithm),
        }
    }
}

/// The value, or something else where the sum is 0. NaN stays NaN.
fn unless_zero<'k>(sum: Reg<'k, f32>, value: Reg<'k, f32>, otherwise: f32) -> Reg<'k, f32> {
    sum.kernel().var(otherwise).or_else(sum.eq(0.0), value)
}

/// Combines a thread's values of a row: two chains, so that each waits for the other half as often.
fn fold<'k>(
    values: &[Reg<'k, f32>],
    row: usize,
    combine: impl Fn(Reg<'k, f32>, Reg<'k, f32>) -> Reg<'k, f32>,
) -> Reg<'k, f32> {
    let chain = |c: usize| {
        let of_row = values.chunks(4).map(|quad| quad[2 * row + c]);
        of_row.reduce(&combine).expect("there are scores")
    };
    combine(chain(0), chain(1))
}

/// Combines what the four lanes of a row have.
fn across_quad<'k>(
    value: Reg<'k, f32>,
    combine: impl Fn(Reg<'k, f32>, Reg<'k, f32>) -> Reg<'k, f32>,
) -> Reg<'k, f32> {
    let k = value.kernel();
    [1, 2].into_iter().fold(value, |value, xor| combine(value, k.butterfly(value, xor)))
}
