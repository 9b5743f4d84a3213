//! Registers that hold several small things: pairs of 16-bit floats, bytes, bits.

use super::{Kernel, Reg, Value};

impl Kernel {
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

    /// Two halves of a register.
    pub fn pack<'k>(&'k self, low: Reg<'k, u16>, high: Reg<'k, u16>) -> Reg<'k, u32> {
        let d = self.reg();
        self.emit(format_args!("mov.b32 {d}, {{{low}, {high}}}"));
        d
    }
}
