//! `exp` over a slice, in a form that compilers vectorise.

/// Replaces each score by `exp(score − max)` and returns their sum.
///
/// `max` is finite and no score is above it, or a score is NaN, which passes through.
pub(super) fn exp_minus(scores: &mut [f32], max: f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let (body, tail) = scores.as_chunks_mut::<LANES>();
    for chunk in body {
        for (x, sum) in chunk.iter_mut().zip(&mut sums) {
            *x = exp(*x - max);
            *sum += *x;
        }
    }
    for x in &mut *tail {
        *x = exp(*x - max);
    }
    sums.iter().chain(tail.iter()).sum()
}

/// `eˣ` for x ≤ 0, within 2 ulp; results under 2⁻¹²⁶ become 0, NaN stays NaN.
///
/// x = n·ln 2 + r with |r| ≤ ½ ln 2 (Cody and Waite, 1980), a polynomial for eʳ (Cephes `expf`), and
/// n added to the exponent bits.
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    /// 1.5 · 2²³: adding it rounds to an integer, which then stands in the low bits.
    const ROUND: f32 = 12_582_912.0;
    const LN2_HI: f32 = 0.693_359_4;
    const LN2_LO: f32 = -2.121_944_4e-4;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    let r = x - n * LN2_HI - n * LN2_LO;
    let mut p = 1.987_569_1e-4;
    for c in [1.398_199_9e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 0.5] {
        p = p * r + c;
    }
    let e = p * r * r + r + 1.0;
    let power = f32::from_bits(shifted.to_bits().wrapping_add(127) << 23);
    // Written so that NaN takes the second branch.
    if x < -87.0 { 0.0 } else { e * power }
}

/// Within 3 ulp; Cephes `tanhf`: an odd polynomial near 0, where the exponentials would cancel.
#[inline(always)]
pub(super) fn tanh(x: f32) -> f32 {
    let (z, e) = (x * x, exp(-2.0 * x.abs()));
    let mut p = -5.704_988_7e-3;
    for c in [2.063_909e-2, -5.373_971_6e-2, 1.333_144_2e-1, -3.333_328e-1] {
        p = p * z + c;
    }
    let far = ((1.0 - e) / (1.0 + e)).copysign(x);
    if z < 0.39 { p * z * x + x } else { far }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn agrees_with_f64() {
        let mut worst = 0f64;
        for i in 0..=870_000 {
            let x = -(i as f32) / 10_000.0;
            let want = f64::from(x).exp();
            worst = worst.max((f64::from(exp(x)) - want).abs() / want);
        }
        assert!(worst < 2.4e-7, "relative error {worst:e}");
    }

    /// Near 0 too, where it is the argument.
    #[test]
    fn tanh_agrees_with_f64() {
        for i in -900_000..=900_000 {
            let x = (i as f32 / 1e5).powi(3);
            let want = f64::from(x).tanh();
            let error = (f64::from(tanh(x)) - want).abs();
            assert!(error <= 3.6e-7 * want.abs(), "tanh({x}) is {}, not {want}", tanh(x));
        }
        assert_eq!([f32::INFINITY, f32::NEG_INFINITY].map(tanh), [1.0, -1.0]);
        assert!(tanh(f32::NAN).is_nan());
    }

    #[test]
    fn edges() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(-1e4), 0.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
        let mut scores = [0.0; 37];
        assert_eq!(exp_minus(&mut scores, 0.0), 37.0);
    }
}
