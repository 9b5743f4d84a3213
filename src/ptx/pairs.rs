//! Registers that hold several small things: pairs of 16-bit floats, bytes, bits.

use super::{Half, Kernel, Reg, Value};

/// A function of a bit of each of three operands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Logic3(u8);

impl Logic3 {
    // Truth tables: what the function makes of these is its own table.
    const A: u8 = 0xf0;
    const B: u8 = 0xcc;
    const C: u8 = 0xaa;

    /// `(a & b) | c`
    pub const AND_OR: Self = Self((Self::A & Self::B) | Self::C);
    /// `a` where `c` is set, else `b`.
    pub const SELECT: Self = Self((Self::A & Self::C) | (Self::B & !Self::C));
}

impl Kernel {
    /// `lop3`: a function of the bits of three operands.
    pub fn lop3<'k>(
        &'k self,
        logic: Logic3,
        a: Reg<'k, u32>,
        b: impl Into<Value<'k, u32>>,
        c: impl Into<Value<'k, u32>>,
    ) -> Reg<'k, u32> {
        let (d, b, c) = (self.reg(), b.into(), c.into());
        self.emit(format_args!("lop3.b32 {d}, {a}, {b}, {c}, {}", logic.0));
        d
    }

    /// `prmt`: four of the eight bytes of `b` and `a`, as the nibbles of `which` say, lowest first; 0 to 3 are
    /// those of `a`.
    pub fn prmt<'k>(
        &'k self,
        a: Reg<'k, u32>,
        b: impl Into<Value<'k, u32>>,
        which: impl Into<Value<'k, u32>>,
    ) -> Reg<'k, u32> {
        let (d, b, which) = (self.reg(), b.into(), which.into());
        self.emit(format_args!("prmt.b32 {d}, {a}, {b}, {which}"));
        d
    }

    /// `cvt.pack.sat.s8.s32`: two numbers as bytes, those outside −128 to 127 as the nearest of these, and the low
    /// half of `upper` above them.
    pub fn cvt_pack_s8<'k>(
        &'k self,
        low: Reg<'k, i32>,
        high: Reg<'k, i32>,
        upper: impl Into<Value<'k, u32>>,
    ) -> Reg<'k, u32> {
        let (d, upper) = (self.reg(), upper.into());
        self.emit(format_args!("cvt.pack.sat.s8.s32.b32 {d}, {high}, {low}, {upper}"));
        d
    }

    /// `cvt.rn.satfinite.e4m3x2.f32` (sm_89): two floats rounded to 8-bit floats of 4 bits of exponent, `low` in the
    /// low byte; what is too large becomes 448.
    pub fn cvt_e4m3x2<'k>(&'k self, low: Reg<'k, f32>, high: Reg<'k, f32>) -> Reg<'k, u16> {
        self.needs(8, 1);
        self.binary("cvt.rn.satfinite.e4m3x2.f32", high, low)
    }

    /// `cvt.rn.f16x2.e4m3x2` (sm_89): the numbers that two 8-bit floats are.
    pub fn cvt_f16x2_e4m3x2<'k>(&'k self, codes: Reg<'k, u16>) -> Reg<'k, u32> {
        self.needs(8, 1);
        self.unary("cvt.rn.f16x2.e4m3x2", codes)
    }

    /// Two 16-bit values as one register.
    pub fn pack<'k>(&'k self, low: Reg<'k, u16>, high: Reg<'k, u16>) -> Reg<'k, u32> {
        let d = self.reg();
        self.emit(format_args!("mov.b32 {d}, {{{low}, {high}}}"));
        d
    }

    /// `fma.rn.f16x2` or `.bf16x2`: `a·b + c` of both floats, each rounded once.
    pub fn fma_x2<'k>(
        &'k self,
        half: Half,
        a: Reg<'k, u32>,
        b: Reg<'k, u32>,
        c: Reg<'k, u32>,
    ) -> Reg<'k, u32> {
        let d = self.reg();
        self.emit(format_args!("fma.rn.{}x2 {d}, {a}, {b}, {c}", half.name()));
        d
    }
}
