//! What follows a product: bias and activation, in f32.

use std::borrow::Cow;

use candle_core::cpu::erf::erfc_f32;
use candle_core::{CpuStorage, Layout, Result};
use rayon::prelude::*;

use super::exp::exp;
use super::widen::packed;
use crate::{Activation, op::View, stack::Stack};

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// `out = act(out + bias)`, where `out` has rows of `n`.
pub(crate) fn epilogue(
    out: &mut [f32],
    n: usize,
    bias: Option<View<CpuStorage>>,
    activation: Option<Activation>,
) -> Result<()> {
    if out.is_empty() {
        return Ok(());
    }
    let bias = bias.map(|(storage, layout)| row(storage, layout)).transpose()?;
    if bias.is_none() && activation.is_none() {
        return Ok(());
    }
    out.par_chunks_mut((CHUNK / n).max(1) * n).for_each(|rows| {
        if let Some(bias) = &bias {
            for row in rows.chunks_mut(n) {
                row.iter_mut().zip(bias.iter()).for_each(|(x, b)| *x += b);
            }
        }
        if let Some(activation) = activation {
            activate(activation, rows);
        }
    });
    Ok(())
}

/// A vector in f32, without gaps.
fn row<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<Cow<'a, [f32]>> {
    let (n, stride) = (layout.dims()[0], layout.stride()[0]);
    let row = Layout::new((1, n).into(), vec![n, stride], layout.start_offset());
    packed(storage, &Stack::new(&row))
}

/// One loop for each function, so that each is vectorised on its own.
pub(super) fn activate(activation: Activation, xs: &mut [f32]) {
    match activation {
        Activation::Relu => xs.iter_mut().for_each(|x| *x = relu(*x)),
        Activation::GeluTanh => xs.iter_mut().for_each(|x| *x = gelu_tanh(*x)),
        Activation::GeluErf => xs.iter_mut().for_each(|x| *x = gelu_erf(*x)),
        Activation::Silu => xs.iter_mut().for_each(|x| *x = silu(*x)),
    }
}

/// `act′(x)` of each.
pub(super) fn slopes(activation: Activation, xs: &mut [f32]) {
    match activation {
        // NaN has the slope of what stays NaN.
        Activation::Relu => xs.iter_mut().for_each(|x| *x = if *x <= 0.0 { 0.0 } else { 1.0 }),
        Activation::GeluTanh => xs.iter_mut().for_each(|x| *x = gelu_tanh_slope(*x)),
        Activation::GeluErf => xs.iter_mut().for_each(|x| *x = gelu_erf_slope(*x)),
        Activation::Silu => xs.iter_mut().for_each(|x| *x = silu_slope(*x)),
    }
}

/// `f32::max` would turn NaN into 0.
fn relu(x: f32) -> f32 {
    if x <= 0.0 { 0.0 } else { x }
}

/// `2·√(2/π)`.
const ROOT_8_OVER_PI: f32 = 1.595_769;
const GELU_CUBIC: f32 = 0.044_715;

/// `1 + tanh(u)` is `2σ(2u)`, which keeps its digits where tanh comes near −1.
#[inline(always)]
pub(super) fn gelu_tanh(x: f32) -> f32 {
    x * sigmoid(gelu_logit(x))
}

/// `2u`.
#[inline(always)]
fn gelu_logit(x: f32) -> f32 {
    ROOT_8_OVER_PI * x * (1.0 + GELU_CUBIC * x * x)
}

/// `1 + erf(z)` is `erfc(−z)`, which keeps its digits where erf comes near −1.
fn gelu_erf(x: f32) -> f32 {
    let twice = match x {
        // Under f32's normal numbers, which cost time; and 2 to the last digit.
        _ if x < -13.0 => 0.0,
        _ if x > 6.0 => 2.0,
        _ => erfc_f32(-x * std::f32::consts::FRAC_1_SQRT_2),
    };
    0.5 * x * twice
}

#[inline(always)]
pub(super) fn silu(x: f32) -> f32 {
    x * sigmoid(x)
}

#[inline(always)]
pub(super) fn silu_slope(x: f32) -> f32 {
    slope(x, |x| (x, 1.0))
}

#[inline(always)]
pub(super) fn gelu_tanh_slope(x: f32) -> f32 {
    slope(x, |x| (gelu_logit(x), ROOT_8_OVER_PI * (1.0 + 3.0 * GELU_CUBIC * x * x)))
}

/// The slope of `x · σ(z)`, given `z` and its slope.
#[inline(always)]
fn slope(x: f32, logit: impl Fn(f32) -> (f32, f32)) -> f32 {
    // Further out it is 0 or 1, and powers of x would be infinite. NaN stays.
    let x = x.clamp(-FAR, FAR);
    let (z, slope) = logit(x);
    // 1 − σ(z) is σ(−z), which keeps its digits where σ comes near 1.
    sigmoid(z) * (1.0 + x * slope * sigmoid(-z))
}

/// `Φ(x) + x · φ(x)`.
fn gelu_erf_slope(x: f32) -> f32 {
    // `√(2π)⁻¹`
    const PEAK: f32 = 0.398_942_3;
    let x = x.clamp(-FAR, FAR);
    let below = 0.5 * erfc_f32(-x * std::f32::consts::FRAC_1_SQRT_2);
    below + x * PEAK * (-0.5 * x * x).exp()
}

/// From here on all slopes are 0 or 1 in f32.
const FAR: f32 = 40.0;

/// `1 / (1 + e⁻ʸ)`.
#[inline(always)]
fn sigmoid(y: f32) -> f32 {
    let e = exp(-y.abs());
    (if y < 0.0 { e } else { 1.0 }) / (1.0 + e)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn formula(activation: Activation, x: f64) -> f64 {
        let sigmoid = |y: f64| 1.0 / (1.0 + (-y).exp());
        match activation {
            Activation::Relu => x.max(0.0),
            Activation::GeluTanh => {
                x * sigmoid(2.0 * (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3)))
            }
            Activation::GeluErf => {
                0.5 * x * candle_core::cpu::erf::erfc_f64(-x * std::f64::consts::FRAC_1_SQRT_2)
            }
            Activation::Silu => x * sigmoid(x),
        }
    }

    const ALL: [Activation; 4] =
        [Activation::Relu, Activation::GeluTanh, Activation::GeluErf, Activation::Silu];

    /// The tails too, where the textbook forms lose all digits. An f32 argument of an exponential
    /// is itself rounded: hence the factor.
    #[test]
    fn keep_their_digits() {
        for activation in ALL {
            for i in -90_000..=90_000 {
                let x = i as f32 / 7_000.0;
                let mut got = [x];
                activate(activation, &mut got);
                let want = formula(activation, f64::from(x));
                let allowed = 2e-7 * (4.0 + f64::from(x * x)) * want.abs() + 1e-36;
                let error = (f64::from(got[0]) - want).abs();
                assert!(error <= allowed, "{activation:?}({x}) is {}, not {want}", got[0]);
            }
        }
    }

    /// Against differences of the formula, which are good to 1e-9.
    #[test]
    fn slopes_are_those_of_the_formula() {
        const STEP: f64 = 1e-4;
        for activation in ALL {
            for i in -90_000..=90_000 {
                let x = i as f32 / 7_000.0;
                let mut got = [x];
                slopes(activation, &mut got);
                let (above, below) = (f64::from(x) + STEP, f64::from(x) - STEP);
                let want = match activation {
                    Activation::Relu => f64::from(x > 0.0),
                    _ => (formula(activation, above) - formula(activation, below)) / (2.0 * STEP),
                };
                let error = (f64::from(got[0]) - want).abs();
                assert!(error <= 1e-6, "{activation:?}'({x}) is {}, not {want}", got[0]);
            }
            let mut far = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30];
            slopes(activation, &mut far);
            for (got, want) in far[1..].iter().zip([1.0, 0.0, 1.0, 0.0]) {
                assert!((got - want).abs() < 1e-15, "{activation:?}: {far:?}");
            }
            assert_eq!(far[0].is_nan(), activation != Activation::Relu);
        }
    }

    #[test]
    fn edges() {
        for activation in ALL {
            let mut got = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, 1e30, -1e30];
            activate(activation, &mut got);
            assert!(got[0].is_nan());
            assert_eq!((got[1], got[3..].to_vec()), (f32::INFINITY, vec![0.0, 1e30, 0.0]));
            assert_eq!(got[2].is_nan(), activation != Activation::Relu);
        }
    }
}
