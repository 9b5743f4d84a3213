//! What happens to a sum before it is stored: bias, activation, rounding.

use super::Element;
use crate::Activation;
use crate::ptx::{Factor, Reg};

/// `round(act(scale · sum + bias))`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Epilogue {
    /// The result's type.
    pub out: Element,
    /// What the sum is multiplied with.
    pub scale: Scale,
    /// The bias's type, if there is one: a value for each column.
    pub bias: Option<Element>,
    /// After the bias.
    pub activation: Option<Activation>,
    /// Whether it is added to what is there, in f32, and does not replace it.
    pub adds: bool,
}

/// What turns a sum of products of codes into what they stand for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Scale {
    /// They stand for themselves.
    #[default]
    None,
    /// Nothing: i32 sums are stored as they are, in place of f32.
    Exact,
    /// One number, times one for each row, or one for all, times one for each column.
    Lines,
    /// Likewise, and left codes stand for their distance from a zero point.
    ZeroPoint,
    /// A number for each row and 128 elements along the depth, times one for 128×128 elements of the right operand:
    /// sums are multiplied on their way.
    Blocks,
}

impl Epilogue {
    /// The sum alone, rounded.
    pub const fn round(out: Element) -> Self {
        Self { out, scale: Scale::None, bias: None, activation: None, adds: false }
    }

    /// Added to what is there.
    pub const fn add() -> Self {
        Self { adds: true, ..Self::round(Element::F32) }
    }

    /// `act(sum + bias)`.
    pub(super) fn finish<'k>(&self, sum: Reg<'k, f32>, bias: Option<Reg<'k, f32>>) -> Reg<'k, f32> {
        let x = match bias {
            Some(bias) => sum + bias,
            None => sum,
        };
        match self.activation {
            None => x,
            Some(activation) => activation.apply(x),
        }
    }

    /// Whether it can follow sums of products of a type, or what is in the way.
    pub(super) fn rule(&self, factor: Option<Factor>) -> (bool, String) {
        let alone = self.bias.is_none() && self.activation.is_none() && self.out == Element::F32;
        let holds = match self.scale {
            Scale::None | Scale::Lines => true,
            Scale::Exact => factor == Some(Factor::S8) && alone,
            Scale::ZeroPoint => factor == Some(Factor::S8),
            Scale::Blocks => factor == Some(Factor::E4m3),
        };
        let holds = holds && (!self.adds || alone && self.scale == Scale::None);
        (holds, format!("a scale of {:?} for {factor:?} and {}", self.scale, self.name()))
    }

    /// `·lines→f32 +bf16 relu`, `→+f32`
    pub(super) fn name(&self) -> String {
        let scale = match self.scale {
            Scale::None => "",
            Scale::Exact => "·exact",
            Scale::Lines => "·lines",
            Scale::ZeroPoint => "·lines-zero",
            Scale::Blocks => "·blocks",
        };
        let bias = self.bias.map_or(String::new(), |bias| format!(" +{}", bias.name()));
        let activation = self.activation.map_or(String::new(), |act| format!(" {}", act.name()));
        let adds = if self.adds { "+" } else { "" };
        format!("{scale}→{adds}{}{bias}{activation}", self.out.name())
    }
}

impl Activation {
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Relu => "relu",
            Self::GeluTanh => "gelu_tanh",
            Self::GeluErf => "gelu_erf",
            Self::Silu => "silu",
        }
    }

    /// `act(x)`.
    pub(super) fn apply<'k>(self, x: Reg<'k, f32>) -> Reg<'k, f32> {
        match self {
            Self::Relu => relu(x),
            Self::GeluTanh => x * sigmoid(gelu_logit(x, x * x)),
            Self::GeluErf => x * one_plus_erf(x * std::f32::consts::FRAC_1_SQRT_2) * 0.5,
            Self::Silu => x * sigmoid(x),
        }
    }

    /// `act′(x)`.
    ///
    /// SiLU and GELU by its tanh are `x · σ(z)` of some `z(x)`, whose slope is `σ(z) · (1 + x · (1 − σ(z)) · z′)`. GELU is
    /// `x · Φ(x)`, of which it is `Φ(x) + x · φ(x)`.
    pub(super) fn slope<'k>(self, x: Reg<'k, f32>) -> Reg<'k, f32> {
        // Further out it is 0 or 1 in f32, and powers of x would be infinite. NaN stays.
        const FAR: f32 = 40.0;
        let k = x.kernel();
        if self == Self::Relu {
            // NaN has the slope of what stays NaN.
            return k.select(x.le(0.0), k.var(0f32), 1.0);
        }
        let x = k.select(x.abs().gt(FAR), k.var(FAR).copysign(x), x);
        // `z` and `x · z′`.
        let (z, steep) = match self {
            Self::Relu => unreachable!("see above"),
            Self::GeluErf => {
                const ROOT_1_OVER_2_PI: f32 = 0.398_942_3;
                let density = (x * x * (-0.5 * std::f32::consts::LOG2_E)).exp2() * ROOT_1_OVER_2_PI;
                let below = one_plus_erf(x * std::f32::consts::FRAC_1_SQRT_2) * 0.5;
                return x.fma(density, below);
            }
            Self::Silu => (x, x),
            Self::GeluTanh => {
                let square = x * x;
                (gelu_logit(x, square), x * square.fma(3.0 * GELU_CUBIC, ROOT_8_OVER_PI))
            }
        };
        // 1 − σ = σ · e^-z keeps its digits where σ comes near 1. Where e^-z is infinite it is 0 · ∞, of which
        // `min` takes the number.
        let power = exp_minus(z);
        let sigmoid = (power + 1.0).recip();
        sigmoid * steep.fma((sigmoid * power).min(1.0), 1.0)
    }
}

/// NaN stays NaN.
fn relu(x: Reg<f32>) -> Reg<f32> {
    let (k, zero) = (x.kernel(), x.kernel().var(0f32));
    k.select(x.le(0.0), zero, x)
}

const ROOT_8_OVER_PI: f32 = 1.595_769;
const GELU_CUBIC: f32 = 0.044_715 * ROOT_8_OVER_PI;

/// `2u`, of which GELU by its tanh is `0.5·x·(1 + tanh u) = x·σ(2u)`, given x².
fn gelu_logit<'k>(x: Reg<'k, f32>, square: Reg<'k, f32>) -> Reg<'k, f32> {
    x * square.fma(GELU_CUBIC, ROOT_8_OVER_PI)
}

/// `1 / (1 + e^-z)`.
fn sigmoid(z: Reg<f32>) -> Reg<f32> {
    (exp_minus(z) + 1.0).recip()
}

/// `e^-z`.
fn exp_minus(z: Reg<f32>) -> Reg<f32> {
    (z * -std::f32::consts::LOG2_E).exp2()
}

/// `1 + erf(x)`, absolute error 1.5e-7: Abramowitz and Stegun, Handbook of Mathematical Functions,
/// 7.1.26: `erf x = 1 - (a1 t + .. + a5 t⁵) e^(-x²)`, `t = 1 / (1 + p x)`, for `x ≥ 0`.
fn one_plus_erf(x: Reg<f32>) -> Reg<f32> {
    const P: f32 = 0.327_591_1;
    const A: [f32; 5] = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    let k = x.kernel();
    let t = x.abs().fma(P, 1.0).recip();
    let polynomial = A[1..].iter().fold(k.var(A[0]), |sum, &a| sum.fma(t, a)) * t;
    let tail = polynomial * (x * x * -std::f32::consts::LOG2_E).exp2();
    // Above 0 it is 2 - tail; below, tail: nothing is cancelled.
    let above = -tail + 2.0;
    k.select(x.ge(0.0), above, tail)
}
