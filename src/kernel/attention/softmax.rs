//! The softmax of rows that come in blocks: their sums so far, of exponentials to base 2.
//!
//! A thread has fragments of two rows, in the [order](crate::ptx::Kernel::wgmma) in which `mma.sync` and
//! `wgmma` leave them: score `4j + 2h + c` is of row `h`. Four neighbouring lanes share a row.
//!
//! What is subtracted from the scores of a block makes the exponential of its largest one a power of two.
//! So the exponential that weighs most is rounded to f16 or bf16 without error, in every block. Subtracting
//! the largest score so far would do that only in blocks that have a new one.

use crate::ptx::{Kernel, Reg};

/// Less than any score to base 2 but -∞, whose exponential is then 0 and not that of -∞ - -∞.
const LOWEST: f32 = -f32::MAX;
/// By how much less than the row's, at most, a block's largest score counts, to base 2: scores below that
/// are lost in the row's sum.
const NEGLIGIBLE: f32 = 30.0;
/// 1.5·2²³: a number of this size has no bits for a fraction, so that adding it rounds.
const TO_WHOLE: f32 = 12_582_912.0;

/// The state of a thread's two rows.
#[derive(Clone, Copy)]
pub struct Softmax<'k> {
    /// What has been subtracted from the last block's scores, to base 2. It is at most 1 below the row's
    /// largest score, and at most 1 above.
    offset: [Reg<'k, f32>; 2],
    /// This thread's share of the sum of the exponentials.
    sum: [Reg<'k, f32>; 2],
    /// What scores are multiplied with, including log₂e: more than 0. `None` if they are to base 2.
    scale: Option<Reg<'k, f32>>,
}

/// What is known of rows after their last block.
#[derive(Clone, Copy)]
pub struct Finished<'k> {
    /// The reciprocals of the sums: 0 for a row without keys.
    pub inverse: [Reg<'k, f32>; 2],
    /// The natural logarithms of the sums of the exponentials.
    pub lse: [Reg<'k, f32>; 2],
    /// What the backward pass rebuilds probabilities from, if it is wanted.
    pub stats: Option<RowStats<'k>>,
}

/// The numbers that make probabilities of the scores of two rows, `exp2(score - max - log)`, all to base 2.
///
/// They are apart: where scores are huge, their sum in f32 has lost the logarithm.
#[derive(Clone, Copy)]
pub struct RowStats<'k> {
    /// What was subtracted from the scores: 0 for a row without keys.
    pub max: [Reg<'k, f32>; 2],
    /// The logarithms of what their exponentials then add up to: ∞ for a row without keys.
    pub log: [Reg<'k, f32>; 2],
}

impl<'k> Softmax<'k> {
    pub fn new(k: &'k Kernel, scale: Option<Reg<'k, f32>>) -> Self {
        Self { offset: k.regs(), sum: k.regs(), scale }
    }

    /// Sets the state to that of rows without any key.
    pub fn reset(&self) {
        self.offset.iter().for_each(|offset| offset.set(LOWEST));
        self.sum.iter().for_each(|sum| sum.set(0.0));
    }

    /// The first block: the exponentials of its scores.
    pub fn first(&self, scores: &[Reg<'k, f32>]) -> Vec<Reg<'k, f32>> {
        let exponentials = self.exponentials(scores, |row| {
            self.offset[row].set(across_quad(self.largest(scores, row), Reg::max).max(LOWEST));
        });
        for (row, sum) in self.sum.iter().enumerate() {
            sum.set(fold(&exponentials, row, |a, b| a + b));
        }
        exponentials
    }

    /// Another block: the exponentials of its scores, and by what both rows' former sums shrink (or, by
    /// less than 2, grow).
    pub fn next(&self, scores: &[Reg<'k, f32>]) -> (Vec<Reg<'k, f32>>, [Reg<'k, f32>; 2]) {
        let factors = self.sum[0].kernel().regs();
        let exponentials = self.exponentials(scores, |row| {
            let before = self.offset[row];
            let largest = self.largest(scores, row).max(before - NEGLIGIBLE);
            let largest = across_quad(largest, Reg::max);
            // The distance between both after rounding, or 0 if that is no number.
            let up = ((before + TO_WHOLE) - (largest + TO_WHOLE)).max(0.0);
            let offset = largest + up;
            factors[row].set((before - offset).exp2_ftz());
            before.set(offset);
        });
        for (row, sum) in self.sum.iter().enumerate() {
            sum.scale(factors[row]);
            sum.increase(fold(&exponentials, row, |a, b| a + b));
        }
        (exponentials, factors)
    }

    /// This thread's largest score of a row, to base 2.
    fn largest(&self, scores: &[Reg<'k, f32>], row: usize) -> Reg<'k, f32> {
        let largest = fold(scores, row, Reg::max);
        self.scale.map_or(largest, |scale| largest * scale)
    }

    /// The exponentials of a block's scores, row by row: some are computed while the other row's largest
    /// score is looked for. `offset` sets a row's.
    fn exponentials(&self, scores: &[Reg<'k, f32>], offset: impl Fn(usize)) -> Vec<Reg<'k, f32>> {
        let rows = [0, 1].map(|row| {
            offset(row);
            let less = -self.offset[row];
            let exponential = |score: Reg<'k, f32>| match self.scale {
                Some(scale) => score.fma(scale, less).exp2_ftz(),
                None => (score + less).exp2_ftz(),
            };
            let pairs = scores.chunks(4).map(|quad| [quad[2 * row], quad[2 * row + 1]]);
            pairs.map(|pair| pair.map(exponential)).collect::<Vec<_>>()
        });
        let [one, other] = rows;
        one.into_iter().zip(other).flat_map(|(one, other)| [one, other]).flatten().collect()
    }

    /// Finishes the rows. `wants_stats`: for a backward pass, too.
    pub fn finish(&self, wants_stats: bool) -> Finished<'k> {
        let sums = self.sum.map(|sum| across_quad(sum, |a, b| a + b));
        let logarithm = |row: usize| {
            let lse = (self.offset[row] + sums[row].log2()) * std::f32::consts::LN_2;
            unless_zero(sums[row], lse, f32::NEG_INFINITY)
        };
        Finished {
            inverse: sums.map(|sum| unless_zero(sum, sum.recip(), 0.0)),
            lse: std::array::from_fn(logarithm),
            stats: wants_stats.then(|| RowStats {
                max: [0, 1].map(|row| unless_zero(sums[row], self.offset[row], 0.0)),
                log: sums.map(|sum| unless_zero(sum, sum.log2(), f32::INFINITY)),
            }),
        }
    }
}

/// The value, or something else where the sum is 0. NaN stays NaN.
fn unless_zero<'k>(sum: Reg<'k, f32>, value: Reg<'k, f32>, otherwise: f32) -> Reg<'k, f32> {
    let (k, otherwise) = (sum.kernel(), sum.kernel().var(otherwise));
    k.select(sum.eq(0.0), otherwise, value)
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
    [1, 2].into_iter().fold(value, |value, xor| combine(value, k.shfl_bfly(value, xor)))
}
