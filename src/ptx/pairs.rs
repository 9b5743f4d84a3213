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
}
