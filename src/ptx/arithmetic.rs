//! Instructions that are operators and methods of registers.

use std::fmt::Display;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Rem, Shl, Shr, Sub};

use super::{Integer, Kernel, Number, Reg, Scalar, Value};

impl Kernel {
    /// `selp`: `a` where the predicate holds, else `b`.
    pub fn select<'k, T: Scalar>(
        &'k self,
        holds: Reg<'k, bool>,
        a: Reg<'k, T>,
        b: impl Into<Value<'k, T>>,
    ) -> Reg<'k, T> {
        let (d, b) = (self.reg(), b.into());
        self.emit(format_args!("selp.{} {d}, {a}, {b}, {holds}", T::BITS));
        d
    }

    /// `op d, a`
    pub(super) fn unary<'k, A: Scalar, D: Scalar>(
        &'k self,
        op: impl Display,
        a: Reg<'k, A>,
    ) -> Reg<'k, D> {
        let d = self.reg();
        self.emit(format_args!("{op} {d}, {a}"));
        d
    }

    /// `op d, a, b`
    pub(super) fn binary<'k, A: Scalar, D: Scalar>(
        &'k self,
        op: impl Display,
        a: impl Display,
        b: impl Into<Value<'k, A>>,
    ) -> Reg<'k, D> {
        let d = self.reg();
        self.emit(format_args!("{op} {d}, {a}, {}", b.into()));
        d
    }
}

macro_rules! operators {
    ($($trait:ident $method:ident $bound:ident $op:expr;)*) => {$(
        impl<'k, T: $bound, R: Into<Value<'k, T>>> $trait<R> for Reg<'k, T> {
            type Output = Self;
            fn $method(self, other: R) -> Self {
                let op: fn() -> String = $op;
                self.kernel().binary(op(), self, other)
            }
        }
    )*};
}

operators! {
    Add add Number || format!("add.{}", T::SUFFIX);
    Sub sub Number || format!("sub.{}", T::SUFFIX);
    Mul mul Number || T::MUL.to_string();
    BitAnd bitand Logic || format!("and.{}", T::BITS);
    BitOr bitor Logic || format!("or.{}", T::BITS);
    BitXor bitxor Logic || format!("xor.{}", T::BITS);
}

impl<'k, T: Number, R: Into<Value<'k, T>>> Div<R> for Reg<'k, T> {
    type Output = Self;
    fn div(self, other: R) -> Self {
        let other = other.into();
        match other.shift() {
            Some(0) => self.kernel().var(self),
            Some(shift) => self.kernel().binary(format_args!("shr.{}", T::SUFFIX), self, shift),
            None => self.kernel().binary(T::DIV, self, other),
        }
    }
}

impl<'k, T: Integer, R: Into<Value<'k, T>>> Rem<R> for Reg<'k, T> {
    type Output = Self;
    fn rem(self, other: R) -> Self {
        let other = other.into();
        match other.shift() {
            Some(shift) => {
                let d = self.kernel().reg();
                let mask = (1u64 << shift) - 1;
                self.kernel().emit(format_args!("and.{} {d}, {self}, {mask}", T::BITS));
                d
            }
            None => self.kernel().binary(format_args!("rem.{}", T::SUFFIX), self, other),
        }
    }
}

/// A type with bitwise or boolean logic.
pub trait Logic: Scalar {}
impl Logic for bool {}
impl Logic for u32 {}
impl Logic for i32 {}
impl Logic for u64 {}

impl<'k, T: Integer, R: Into<Value<'k, u32>>> Shl<R> for Reg<'k, T> {
    type Output = Self;
    fn shl(self, bits: R) -> Self {
        self.kernel().binary(format_args!("shl.{}", T::BITS), self, bits)
    }
}

impl<'k, T: Integer, R: Into<Value<'k, u32>>> Shr<R> for Reg<'k, T> {
    type Output = Self;
    fn shr(self, bits: R) -> Self {
        self.kernel().binary(format_args!("shr.{}", T::SUFFIX), self, bits)
    }
}

impl Neg for Reg<'_, f32> {
    type Output = Self;
    fn neg(self) -> Self {
        self.kernel().unary("neg.f32", self)
    }
}

impl Not for Reg<'_, bool> {
    type Output = Self;
    fn not(self) -> Self {
        self.kernel().unary("not.pred", self)
    }
}

macro_rules! comparisons {
    ($($name:ident $text:literal;)*) => {$(
        #[doc = concat!("`setp.", stringify!($name), "`: whether `self ", $text, " other`.")]
        pub fn $name(self, other: impl Into<Value<'k, T>>) -> Reg<'k, bool> {
            let op = format_args!(concat!("setp.", stringify!($name), ".{}"), T::SUFFIX).to_string();
            self.kernel().binary(op, self, other)
        }
    )*};
}

impl<'k, T: Number> Reg<'k, T> {
    comparisons! { eq "="; ne "≠"; lt "<"; le "≤"; gt ">"; ge "≥"; }

    /// `min`
    pub fn min(self, other: impl Into<Value<'k, T>>) -> Self {
        self.kernel().binary(format_args!("min.{}", T::SUFFIX), self, other)
    }

    /// `max`
    pub fn max(self, other: impl Into<Value<'k, T>>) -> Self {
        self.kernel().binary(format_args!("max.{}", T::SUFFIX), self, other)
    }

    /// Adds in place.
    pub fn increase(self, by: impl Into<Value<'k, T>>) {
        self.kernel().emit(format_args!("add.{} {self}, {self}, {}", T::SUFFIX, by.into()));
    }
}

impl<'k> Reg<'k, u32> {
    /// The quotient rounded up; `by` is at least 1.
    pub fn div_ceil(self, by: u32) -> Self {
        (self + (by - 1)) / by
    }

    /// Zero-extended.
    pub fn wide(self) -> Reg<'k, u64> {
        self.kernel().unary("cvt.u64.u32", self)
    }

    /// `mad.wide`: `self · factor + addend`, without overflow.
    pub fn mul_wide(self, factor: impl Into<Value<'k, u32>>) -> Reg<'k, u64> {
        self.kernel().binary("mul.wide.u32", self, factor)
    }

    /// `popc`: how many bits are set.
    pub fn popc(self) -> Self {
        self.kernel().unary("popc.b32", self)
    }

    /// `bfe`: `len` bits from bit `start` on.
    pub fn bfe(self, start: u32, len: u32) -> Self {
        let d = self.kernel().reg();
        self.kernel().emit(format_args!("bfe.u32 {d}, {self}, {start}, {len}"));
        d
    }

    /// The nearest float.
    pub fn to_f32(self) -> Reg<'k, f32> {
        self.kernel().unary("cvt.rn.f32.u32", self)
    }

    /// A 64-bit register from this low and that high half.
    pub fn with_high(self, high: impl Into<Value<'k, u32>>) -> Reg<'k, u64> {
        let d = self.kernel().reg();
        let high = match high.into() {
            Value::Reg(r) => r,
            literal => self.kernel().var(literal),
        };
        self.kernel().emit(format_args!("mov.b64 {d}, {{{self}, {high}}}"));
        d
    }
}

impl<'k> Reg<'k, i32> {
    /// The nearest float.
    pub fn to_float(self) -> Reg<'k, f32> {
        self.kernel().unary("cvt.rn.f32.s32", self)
    }

    /// 0 where it is negative.
    pub fn or_zero(self) -> Reg<'k, u32> {
        self.max(0).cast()
    }
}

impl<'k> Reg<'k, u64> {
    /// The address of element `index`, of `bytes` bytes each, of those that begin at this address.
    pub fn element(self, index: Reg<'k, u32>, bytes: u32) -> Self {
        let d = self.kernel().reg();
        self.kernel().emit(format_args!("mad.wide.u32 {d}, {index}, {bytes}, {self}"));
        d
    }

    /// The low half.
    pub fn low(self) -> Reg<'k, u32> {
        self.kernel().unary("cvt.u32.u64", self)
    }
}

impl<'k> Reg<'k, f32> {
    /// `fma.rn`: `self · factor + addend`, rounded once.
    pub fn fma(self, factor: impl Into<Value<'k, f32>>, addend: impl Into<Value<'k, f32>>) -> Self {
        let d = self.kernel().reg();
        let (factor, addend) = (factor.into(), addend.into());
        self.kernel().emit(format_args!("fma.rn.f32 {d}, {self}, {factor}, {addend}"));
        d
    }

    /// `mul.rn`: a product that the assembler leaves alone. Of `mul` and `add` it makes one `fma`, which rounds once
    /// less.
    pub fn mul_rn(self, other: impl Into<Value<'k, f32>>) -> Self {
        self.kernel().binary("mul.rn.f32", self, other)
    }

    /// `sqrt.rn`: the square root, rounded once.
    pub fn sqrt(self) -> Self {
        self.kernel().unary("sqrt.rn.f32", self)
    }

    /// `cvt.rni.s32`: the nearest integer, the even one of two; of NaN 0.
    pub fn nearest(self) -> Reg<'k, i32> {
        self.kernel().unary("cvt.rni.s32.f32", self)
    }

    /// `abs`
    pub fn abs(self) -> Self {
        self.kernel().unary("abs.f32", self)
    }

    /// `ex2.approx`: 2 to the power of `self`, relative error 2^-22.
    pub fn exp2(self) -> Self {
        self.kernel().unary("ex2.approx.f32", self)
    }

    /// `ex2.approx.ftz`: as [`exp2`](Self::exp2), but 0 where that is subnormal: one instruction.
    pub fn exp2_ftz(self) -> Self {
        self.kernel().unary("ex2.approx.ftz.f32", self)
    }

    /// `tanh.approx`: the hyperbolic tangent, relative error 2^-11.
    pub fn tanh(self) -> Self {
        self.kernel().unary("tanh.approx.f32", self)
    }

    /// Multiplies in place.
    pub fn scale(self, by: impl Into<Value<'k, f32>>) {
        self.kernel().emit(format_args!("mul.f32 {self}, {self}, {}", by.into()));
    }

    /// `lg2.approx`: the logarithm to base 2.
    pub fn log2(self) -> Self {
        self.kernel().unary("lg2.approx.f32", self)
    }

    /// `rcp.approx.ftz`: the reciprocal to one ulp; 0 where that is subnormal.
    pub fn recip(self) -> Self {
        self.kernel().unary("rcp.approx.ftz.f32", self)
    }

    /// `rsqrt.approx`: 1 over the square root, relative error 2^-22.9.
    pub fn rsqrt(self) -> Self {
        self.kernel().unary("rsqrt.approx.f32", self)
    }

    /// `copysign`: the magnitude of `self` with the sign of `of`.
    pub fn copysign(self, of: Reg<'k, f32>) -> Self {
        let d = self.kernel().reg();
        self.kernel().emit(format_args!("copysign.f32 {d}, {of}, {self}"));
        d
    }
}
