//! Typed registers and the instructions that are operators on them.

use std::fmt::{self, Display};
use std::marker::PhantomData;
use std::ops::{Add, BitAnd, BitOr, BitXor, Div, Mul, Neg, Not, Rem, Shl, Shr, Sub};

use super::Kernel;

/// A kind of register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Class {
    Predicate,
    Bits16,
    Bits32,
    Bits64,
    Float,
}

impl Class {
    pub(super) const ALL: [Self; 5] =
        [Self::Predicate, Self::Bits16, Self::Bits32, Self::Bits64, Self::Float];
    pub(super) const COUNT: usize = Self::ALL.len();

    pub(super) fn letter(self) -> char {
        ['p', 'h', 'r', 'd', 'f'][self as usize]
    }

    pub(super) fn kind(self) -> &'static str {
        ["pred", "b16", "b32", "b64", "f32"][self as usize]
    }
}

mod sealed {
    pub trait Sealed {}
}

/// What a register can hold. `u16` is 16 bits of anything, `u32` also two 16-bit floats.
pub trait Scalar: sealed::Sealed + Copy + 'static {
    /// The kind of register.
    #[doc(hidden)]
    const CLASS: Class;
    /// What arithmetic calls it: `u32`.
    const SUFFIX: &'static str;
    /// What loads and stores call it: `b32`.
    const BITS: &'static str;
    /// Bytes in memory.
    const SIZE: usize;
    /// The immediate.
    fn literal(self) -> String;
    /// As a launch passes it: its bytes are the first ones in memory.
    #[doc(hidden)]
    fn bits(self) -> u64;
}

/// A type with arithmetic.
pub trait Number: Scalar {
    /// The product that keeps the type.
    const MUL: &'static str;
    /// The rounded or truncated quotient.
    const DIV: &'static str;
    /// The exponent of an unsigned power of two: the assembler does not turn divisions into shifts.
    #[doc(hidden)]
    fn shift(self) -> Option<u32> {
        None
    }
}

/// A type with bits.
pub trait Integer: Number {}

/// A floating-point type.
pub trait Float: Number {}

macro_rules! scalars {
    ($(
        $t:ty, $class:ident, $suffix:literal, $bits:literal, $size:literal, $literal:expr, $word:expr;
    )*) => {$(
        impl sealed::Sealed for $t {}
        impl Scalar for $t {
            const CLASS: Class = Class::$class;
            const SUFFIX: &'static str = $suffix;
            const BITS: &'static str = $bits;
            const SIZE: usize = $size;
            fn literal(self) -> String {
                let show: fn($t) -> String = $literal;
                show(self)
            }
            fn bits(self) -> u64 {
                let word: fn($t) -> u64 = $word;
                word(self)
            }
        }
    )*};
}

scalars! {
    bool, Predicate, "pred", "pred", 1, |x| u8::from(x).to_string(), u64::from;
    u16, Bits16, "u16", "b16", 2, |x| x.to_string(), u64::from;
    u32, Bits32, "u32", "b32", 4, |x| x.to_string(), u64::from;
    i32, Bits32, "s32", "b32", 4, |x| x.to_string(), |x| x.cast_unsigned().into();
    u64, Bits64, "u64", "b64", 8, |x| x.to_string(), |x| x;
    f32, Float, "f32", "f32", 4, |x| format!("0f{:08X}", x.to_bits()), |x| x.to_bits().into();
}

macro_rules! numbers {
    ($($t:ty, $kind:ident, $mul:literal, $div:literal $(, $shift:expr)?;)*) => {$(
        impl Number for $t {
            const MUL: &'static str = $mul;
            const DIV: &'static str = $div;
            $(fn shift(self) -> Option<u32> {
                let shift: fn($t) -> Option<u32> = $shift;
                shift(self)
            })?
        }
        impl $kind for $t {}
    )*};
}

numbers! {
    u32, Integer, "mul.lo.u32", "div.u32", |x| x.is_power_of_two().then(|| x.ilog2());
    i32, Integer, "mul.lo.s32", "div.s32";
    u64, Integer, "mul.lo.u64", "div.u64", |x| x.is_power_of_two().then(|| x.ilog2());
    f32, Float, "mul.f32", "div.rn.f32";
}

/// A register of a [`Kernel`].
pub struct Reg<'k, T> {
    kernel: &'k Kernel,
    id: u32,
    holds: PhantomData<T>,
}

impl<T> Clone for Reg<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Reg<'_, T> {}

impl<T: Scalar> Display for Reg<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "%{}{}", T::CLASS.letter(), self.id)
    }
}

impl<T: Scalar> fmt::Debug for Reg<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        Display::fmt(self, f)
    }
}

/// A register or an immediate.
#[derive(Clone, Copy, Debug)]
pub enum Value<'k, T: Scalar> {
    /// A register.
    Reg(Reg<'k, T>),
    /// An immediate.
    Literal(T),
}

impl<T: Number> Value<'_, T> {
    fn shift(self) -> Option<u32> {
        match self {
            Self::Reg(_) => None,
            Self::Literal(x) => x.shift(),
        }
    }
}

impl<'k, T: Scalar> From<Reg<'k, T>> for Value<'k, T> {
    fn from(r: Reg<'k, T>) -> Self {
        Self::Reg(r)
    }
}

impl<T: Scalar> From<T> for Value<'_, T> {
    fn from(x: T) -> Self {
        Self::Literal(x)
    }
}

impl<T: Scalar> Display for Value<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Self::Reg(r) => r.fmt(f),
            Self::Literal(x) => f.write_str(&x.literal()),
        }
    }
}

/// A register plus a number of bytes: `[%r1+16]`.
#[derive(Clone, Copy, Debug)]
pub struct Address<'k, T: Scalar> {
    base: Reg<'k, T>,
    bytes: i64,
}

impl<'k, T: Scalar> From<Reg<'k, T>> for Address<'k, T> {
    fn from(base: Reg<'k, T>) -> Self {
        Self { base, bytes: 0 }
    }
}

impl<T: Scalar> Address<'_, T> {
    /// This many bytes further.
    pub fn at(self, bytes: i64) -> Self {
        Self { bytes: self.bytes + bytes, ..self }
    }
}

impl<T: Scalar> Display for Address<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self.bytes {
            0 => write!(f, "[{}]", self.base),
            // A minus sign alone is no PTX: `[%r1+-16]`.
            bytes => write!(f, "[{}+{bytes}]", self.base),
        }
    }
}

impl<'k, T: Scalar> Reg<'k, T> {
    pub(super) fn new(kernel: &'k Kernel, id: u32) -> Self {
        Self { kernel, id, holds: PhantomData }
    }

    pub(super) fn id(self) -> u32 {
        self.id
    }

    /// The kernel that it belongs to.
    pub fn kernel(self) -> &'k Kernel {
        self.kernel
    }

    /// `mov`: overwrites the register.
    pub fn set(self, value: impl Into<Value<'k, T>>) {
        self.kernel.emit(format_args!("mov.{} {self}, {}", T::SUFFIX, value.into()));
    }

    /// The memory this many bytes after the address in the register.
    pub fn at(self, bytes: i64) -> Address<'k, T> {
        Address::from(self).at(bytes)
    }

    /// The same bits as another type of the same size.
    pub fn cast<U: Scalar>(self) -> Reg<'k, U> {
        assert_eq!(T::SIZE, U::SIZE, "a cast keeps the bits");
        if T::CLASS == U::CLASS {
            return Reg::new(self.kernel, self.id);
        }
        self.kernel.unary(format_args!("mov.b{}", 8 * T::SIZE), self)
    }
}

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
                self.kernel.binary(op(), self, other)
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
            Some(0) => self.kernel.var(self),
            Some(shift) => self.kernel.binary(format_args!("shr.{}", T::SUFFIX), self, shift),
            None => self.kernel.binary(T::DIV, self, other),
        }
    }
}

impl<'k, T: Integer, R: Into<Value<'k, T>>> Rem<R> for Reg<'k, T> {
    type Output = Self;
    fn rem(self, other: R) -> Self {
        let other = other.into();
        match other.shift() {
            Some(shift) => {
                let d = self.kernel.reg();
                let mask = (1u64 << shift) - 1;
                self.kernel.emit(format_args!("and.{} {d}, {self}, {mask}", T::BITS));
                d
            }
            None => self.kernel.binary(format_args!("rem.{}", T::SUFFIX), self, other),
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
        self.kernel.binary(format_args!("shl.{}", T::BITS), self, bits)
    }
}

impl<'k, T: Integer, R: Into<Value<'k, u32>>> Shr<R> for Reg<'k, T> {
    type Output = Self;
    fn shr(self, bits: R) -> Self {
        self.kernel.binary(format_args!("shr.{}", T::SUFFIX), self, bits)
    }
}

impl Neg for Reg<'_, f32> {
    type Output = Self;
    fn neg(self) -> Self {
        self.kernel.unary("neg.f32", self)
    }
}

impl Not for Reg<'_, bool> {
    type Output = Self;
    fn not(self) -> Self {
        self.kernel.unary("not.pred", self)
    }
}

macro_rules! comparisons {
    ($($name:ident $text:literal;)*) => {$(
        #[doc = concat!("`setp.", stringify!($name), "`: whether `self ", $text, " other`.")]
        pub fn $name(self, other: impl Into<Value<'k, T>>) -> Reg<'k, bool> {
            let op = format_args!(concat!("setp.", stringify!($name), ".{}"), T::SUFFIX).to_string();
            self.kernel.binary(op, self, other)
        }
    )*};
}

impl<'k, T: Number> Reg<'k, T> {
    comparisons! { eq "="; ne "≠"; lt "<"; le "≤"; gt ">"; ge "≥"; }

    /// `min`
    pub fn min(self, other: impl Into<Value<'k, T>>) -> Self {
        self.kernel.binary(format_args!("min.{}", T::SUFFIX), self, other)
    }

    /// `max`
    pub fn max(self, other: impl Into<Value<'k, T>>) -> Self {
        self.kernel.binary(format_args!("max.{}", T::SUFFIX), self, other)
    }

    /// Adds in place.
    pub fn increase(self, by: impl Into<Value<'k, T>>) {
        self.kernel.emit(format_args!("add.{} {self}, {self}, {}", T::SUFFIX, by.into()));
    }
}

impl<'k> Reg<'k, u32> {
    /// The quotient rounded up; `by` is at least 1.
    pub fn div_ceil(self, by: u32) -> Self {
        (self + (by - 1)) / by
    }

    /// Zero-extended.
    pub fn wide(self) -> Reg<'k, u64> {
        self.kernel.unary("cvt.u64.u32", self)
    }

    /// `mad.wide`: `self · factor + addend`, without overflow.
    pub fn mul_wide(self, factor: impl Into<Value<'k, u32>>) -> Reg<'k, u64> {
        self.kernel.binary("mul.wide.u32", self, factor)
    }

    /// `popc`: how many bits are set.
    pub fn popc(self) -> Self {
        self.kernel.unary("popc.b32", self)
    }

    /// `bfe`: `len` bits from bit `start` on.
    pub fn bfe(self, start: u32, len: u32) -> Self {
        let d = self.kernel.reg();
        self.kernel.emit(format_args!("bfe.u32 {d}, {self}, {start}, {len}"));
        d
    }

    /// The nearest float.
    pub fn to_f32(self) -> Reg<'k, f32> {
        self.kernel.unary("cvt.rn.f32.u32", self)
    }

    /// A 64-bit register from this low and that high half.
    pub fn with_high(self, high: impl Into<Value<'k, u32>>) -> Reg<'k, u64> {
        let d = self.kernel.reg();
        let high = match high.into() {
            Value::Reg(r) => r,
            literal => self.kernel.var(literal),
        };
        self.kernel.emit(format_args!("mov.b64 {d}, {{{self}, {high}}}"));
        d
    }
}

impl<'k> Reg<'k, i32> {
    /// The nearest float.
    pub fn to_float(self) -> Reg<'k, f32> {
        self.kernel.unary("cvt.rn.f32.s32", self)
    }

    /// 0 where it is negative.
    pub fn or_zero(self) -> Reg<'k, u32> {
        self.max(0).cast()
    }
}

impl<'k> Reg<'k, u64> {
    /// The address of element `index`, of `bytes` bytes each, of those that begin at this address.
    pub fn element(self, index: Reg<'k, u32>, bytes: u32) -> Self {
        let d = self.kernel.reg();
        self.kernel.emit(format_args!("mad.wide.u32 {d}, {index}, {bytes}, {self}"));
        d
    }

    /// The low half.
    pub fn low(self) -> Reg<'k, u32> {
        self.kernel.unary("cvt.u32.u64", self)
    }
}

impl<'k> Reg<'k, f32> {
    /// `fma.rn`: `self · factor + addend`, rounded once.
    pub fn fma(self, factor: impl Into<Value<'k, f32>>, addend: impl Into<Value<'k, f32>>) -> Self {
        let d = self.kernel.reg();
        let (factor, addend) = (factor.into(), addend.into());
        self.kernel.emit(format_args!("fma.rn.f32 {d}, {self}, {factor}, {addend}"));
        d
    }

    /// `abs`
    pub fn abs(self) -> Self {
        self.kernel.unary("abs.f32", self)
    }

    /// `ex2.approx`: 2 to the power of `self`, relative error 2^-22.
    pub fn exp2(self) -> Self {
        self.kernel.unary("ex2.approx.f32", self)
    }

    /// `ex2.approx.ftz`: as [`exp2`](Self::exp2), but 0 where that is subnormal: one instruction.
    pub fn exp2_ftz(self) -> Self {
        self.kernel.unary("ex2.approx.ftz.f32", self)
    }

    /// `tanh.approx`: the hyperbolic tangent, relative error 2^-11.
    pub fn tanh(self) -> Self {
        self.kernel.unary("tanh.approx.f32", self)
    }

    /// Multiplies in place.
    pub fn scale(self, by: impl Into<Value<'k, f32>>) {
        self.kernel.emit(format_args!("mul.f32 {self}, {self}, {}", by.into()));
    }

    /// `lg2.approx`: the logarithm to base 2.
    pub fn log2(self) -> Self {
        self.kernel.unary("lg2.approx.f32", self)
    }

    /// `rcp.approx.ftz`: the reciprocal to one ulp; 0 where that is subnormal.
    pub fn recip(self) -> Self {
        self.kernel.unary("rcp.approx.ftz.f32", self)
    }

    /// `rsqrt.approx`: 1 over the square root, relative error 2^-22.9.
    pub fn rsqrt(self) -> Self {
        self.kernel.unary("rsqrt.approx.f32", self)
    }

    /// `copysign`: the magnitude of `self` with the sign of `of`.
    pub fn copysign(self, of: Reg<'k, f32>) -> Self {
        let d = self.kernel.reg();
        self.kernel.emit(format_args!("copysign.f32 {d}, {of}, {self}"));
        d
    }
}
