//! Typed registers, immediates and addresses.

use std::fmt::{self, Display};
use std::marker::PhantomData;

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
    pub(super) fn shift(self) -> Option<u32> {
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
