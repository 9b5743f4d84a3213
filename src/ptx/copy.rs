//! Asynchronous copies of sm_80 and the matrix moves between shared memory and registers.

use super::memory::list;
use super::{Address, Kernel, Reg, Value};

impl Kernel {
    /// `cp.async.cg`: 16 bytes from global to shared memory, of which `bytes` are read and the rest
    /// are zeros.
    pub fn cp_async<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        from: impl Into<Address<'k, u64>>,
        bytes: impl Into<Value<'k, u32>>,
    ) {
        self.copy("cg.shared.global", 16, to.into(), from.into(), bytes.into());
    }

    /// `cp.async.cg` with `.L2::128B`: the same, of a line whose other bytes are asked for soon. L2 fetches all 128 at once.
    pub fn cp_async_line<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        from: impl Into<Address<'k, u64>>,
        bytes: impl Into<Value<'k, u32>>,
    ) {
        self.needs(7, 4);
        self.copy("cg.shared.global.L2::128B", 16, to.into(), from.into(), bytes.into());
    }

    /// `cp.async.ca`: 4 bytes, of which all or none are read.
    pub fn cp_async_4<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        from: impl Into<Address<'k, u64>>,
        bytes: impl Into<Value<'k, u32>>,
    ) {
        self.copy("ca.shared.global", 4, to.into(), from.into(), bytes.into());
    }

    fn copy<'k>(
        &'k self,
        how: &str,
        size: u32,
        to: Address<'k, u32>,
        from: Address<'k, u64>,
        bytes: Value<'k, u32>,
    ) {
        self.emit(format_args!("cp.async.{how} {to}, {from}, {size}, {bytes}"));
    }

    /// `cp.async.commit_group`
    pub fn cp_async_commit(&self) {
        self.emit(format_args!("cp.async.commit_group"));
    }

    /// `cp.async.wait_group`: until at most `pending` groups of this thread are under way.
    pub fn cp_async_wait(&self, pending: u32) {
        self.emit(format_args!("cp.async.wait_group {pending}"));
    }

    /// `ldmatrix.x4`: four 8×8 matrices of 16-bit elements. Lanes `8i..8i+8` give the row addresses of
    /// matrix `i`; `transposed` gives each lane what it would hold of the transposed matrix.
    pub fn ldmatrix<'k>(
        &'k self,
        from: impl Into<Address<'k, u32>>,
        transposed: bool,
    ) -> [Reg<'k, u32>; 4] {
        let d = self.regs();
        self.ldmatrix_to(d, from, transposed);
        d
    }

    /// [`ldmatrix`](Self::ldmatrix) that overwrites registers: for loops that keep what they load.
    pub fn ldmatrix_to<'k>(
        &'k self,
        d: [Reg<'k, u32>; 4],
        from: impl Into<Address<'k, u32>>,
        transposed: bool,
    ) {
        let (trans, from) = (if transposed { ".trans" } else { "" }, from.into());
        self.emit(format_args!(
            "ldmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {}, {from}",
            list(&d)
        ));
    }

    /// `stmatrix.x4`: the reverse of [`ldmatrix`](Self::ldmatrix), sm_90.
    pub fn stmatrix<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        values: [Reg<'k, u32>; 4],
        transposed: bool,
    ) {
        self.needs(7, 8);
        let (trans, to) = (if transposed { ".trans" } else { "" }, to.into());
        self.emit(format_args!(
            "stmatrix.sync.aligned.m8n8.x4{trans}.shared.b16 {to}, {}",
            list(&values)
        ));
    }
}
