//! Loads, stores and conversions of what was loaded.

use std::fmt::Display;

use super::{Address, Half, Kernel, Reg, Scalar, Value};

/// `{a, b}`, or `a` alone.
pub(super) fn list<T: Display>(values: &[T]) -> String {
    let list = values.iter().map(T::to_string).collect::<Vec<_>>().join(", ");
    if values.len() == 1 { list } else { format!("{{{list}}}") }
}

fn vector(n: usize) -> &'static str {
    match n {
        1 => "",
        2 => ".v2",
        4 => ".v4",
        _ => panic!("memory is accessed by 1, 2 or 4 registers"),
    }
}

impl Kernel {
    fn load<'k, T: Scalar, const N: usize>(
        &'k self,
        space: &str,
        from: impl Display,
    ) -> [Reg<'k, T>; N] {
        let d = self.regs();
        self.emit(format_args!("ld.{space}{}.{} {}, {from}", vector(N), T::BITS, list(&d)));
        d
    }

    fn store<'k, T: Scalar, V: Into<Value<'k, T>>, const N: usize>(
        &'k self,
        space: &str,
        to: impl Display,
        values: [V; N],
    ) {
        let values = values.map(Into::into);
        self.emit(format_args!("st.{space}{}.{} {to}, {}", vector(N), T::BITS, list(&values)));
    }

    /// `ld.global`: `N` values side by side.
    pub fn ld_global<'k, T: Scalar, const N: usize>(
        &'k self,
        from: impl Into<Address<'k, u64>>,
    ) -> [Reg<'k, T>; N] {
        self.load("global", from.into())
    }

    /// `ld.global.nc`: through the cache for data that nothing writes while the kernel runs.
    pub fn ld_global_nc<'k, T: Scalar, const N: usize>(
        &'k self,
        from: impl Into<Address<'k, u64>>,
    ) -> [Reg<'k, T>; N] {
        self.load("global.nc", from.into())
    }

    /// `ld.global.nc` to a register that has a value: within [`when`](Self::when) it keeps that value where the predicate
    /// does not hold, and nobody waits for the load before it is used.
    pub fn ld_global_nc_to<'k, T: Scalar>(
        &'k self,
        to: Reg<'k, T>,
        from: impl Into<Address<'k, u64>>,
    ) {
        self.emit(format_args!("ld.global.nc.{} {to}, {}", T::BITS, from.into()));
    }

    /// `ld.global.u8`: one byte, of 0 to 255.
    pub fn ld_global_u8<'k>(&'k self, from: impl Into<Address<'k, u64>>) -> Reg<'k, u32> {
        let (d, from) = (self.reg(), from.into());
        self.emit(format_args!("ld.global.u8 {d}, {from}"));
        d
    }

    /// `ld.global.nc.u8`: one byte, of 0 to 255.
    pub fn ld_global_nc_u8<'k>(&'k self, from: impl Into<Address<'k, u64>>) -> Reg<'k, u32> {
        let (d, from) = (self.reg(), from.into());
        self.emit(format_args!("ld.global.nc.u8 {d}, {from}"));
        d
    }

    /// `ld.shared.u8`: one byte, of 0 to 255.
    pub fn ld_shared_u8<'k>(&'k self, from: impl Into<Address<'k, u32>>) -> Reg<'k, u32> {
        let (d, from) = (self.reg(), from.into());
        self.emit(format_args!("ld.shared.u8 {d}, {from}"));
        d
    }

    /// `ld.shared.u16`: two bytes, of 0 to 65535.
    pub fn ld_shared_u16<'k>(&'k self, from: impl Into<Address<'k, u32>>) -> Reg<'k, u32> {
        let (d, from) = (self.reg(), from.into());
        self.emit(format_args!("ld.shared.u16 {d}, {from}"));
        d
    }

    /// `ld.acquire.gpu`: a number that another block of threads [adds to](Self::red_release_add), and with it what
    /// that block wrote before.
    pub fn ld_acquire<'k>(&'k self, from: impl Into<Address<'k, u64>>) -> Reg<'k, u32> {
        let (d, from) = (self.reg(), from.into());
        self.emit(format_args!("ld.acquire.gpu.global.u32 {d}, {from}"));
        d
    }

    /// `atom.relaxed.gpu.add`: adds 1 to a number, and gives what it was before.
    pub fn atom_add<'k>(&'k self, to: impl Into<Address<'k, u64>>) -> Reg<'k, u32> {
        let (d, to) = (self.reg(), to.into());
        self.emit(format_args!("atom.relaxed.gpu.global.add.u32 {d}, {to}, 1"));
        d
    }

    /// `red.release.gpu.add`: adds 1 to a number, after all that this thread wrote before.
    pub fn red_release_add<'k>(&'k self, to: impl Into<Address<'k, u64>>) {
        self.emit(format_args!("red.release.gpu.global.add.u32 {}, 1", to.into()));
    }

    /// `red.relaxed.gpu.add`: adds to a number.
    pub fn red_add<'k>(&'k self, to: impl Into<Address<'k, u64>>, value: Reg<'k, f32>) {
        self.emit(format_args!("red.relaxed.gpu.global.add.f32 {}, {value}", to.into()));
    }

    /// `red.relaxed.gpu.max`: the larger of a number in memory and this one.
    pub fn red_max<'k>(&'k self, to: impl Into<Address<'k, u64>>, value: Reg<'k, u32>) {
        self.emit(format_args!("red.relaxed.gpu.global.max.u32 {}, {value}", to.into()));
    }

    /// `st.global.u8`: the lowest byte.
    pub fn st_global_u8<'k>(&'k self, to: impl Into<Address<'k, u64>>, value: Reg<'k, u32>) {
        self.emit(format_args!("st.global.u8 {}, {value}", to.into()));
    }

    /// `st.global`
    pub fn st_global<'k, T: Scalar, const N: usize>(
        &'k self,
        to: impl Into<Address<'k, u64>>,
        values: [Reg<'k, T>; N],
    ) {
        self.store("global", to.into(), values);
    }

    /// `ld.shared`
    pub fn ld_shared<'k, T: Scalar, const N: usize>(
        &'k self,
        from: impl Into<Address<'k, u32>>,
    ) -> [Reg<'k, T>; N] {
        self.load("shared", from.into())
    }

    /// `st.shared`
    pub fn st_shared<'k, T: Scalar, const N: usize>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        values: [Reg<'k, T>; N],
    ) {
        self.store("shared", to.into(), values);
    }

    /// `ld.shared::cluster`: from an address of [`mapa`](Self::mapa).
    pub fn ld_cluster<'k, T: Scalar, const N: usize>(
        &'k self,
        from: impl Into<Address<'k, u32>>,
    ) -> [Reg<'k, T>; N] {
        self.needs(7, 8);
        self.load("shared::cluster", from.into())
    }

    /// `st.async`: to an address of [`mapa`](Self::mapa), where the bytes count at `barrier`, which is of the same block.
    pub fn st_async<'k, T: Scalar, const N: usize>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        values: [Reg<'k, T>; N],
        barrier: impl Into<Address<'k, u32>>,
    ) {
        self.needs(8, 1);
        let (to, barrier) = (to.into(), barrier.into());
        self.emit(format_args!(
            "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes{}.{} {to}, {}, {barrier}",
            vector(N),
            T::BITS,
            list(&values)
        ));
    }

    /// `mapa`: the shared memory of block `rank` of the cluster that corresponds to ours.
    pub fn mapa<'k>(
        &'k self,
        shared: Reg<'k, u32>,
        rank: impl Into<Value<'k, u32>>,
    ) -> Reg<'k, u32> {
        self.needs(7, 8);
        self.binary("mapa.shared::cluster.u32", shared, rank)
    }

    /// `cvt.rn.f16x2.f32` or `.bf16x2`: two floats rounded into one register, `low` in its low half.
    pub fn cvt_rn_x2<'k>(
        &'k self,
        half: Half,
        low: Reg<'k, f32>,
        high: Reg<'k, f32>,
    ) -> Reg<'k, u32> {
        self.binary(format_args!("cvt.rn.{}x2.f32", half.name()), high, low)
    }

    /// [`cvt_rn_x2`](Self::cvt_rn_x2) that overwrites a register: for loops that keep what they pack.
    pub fn cvt_rn_x2_to<'k>(
        &'k self,
        to: Reg<'k, u32>,
        half: Half,
        low: Reg<'k, f32>,
        high: Reg<'k, f32>,
    ) {
        self.emit(format_args!("cvt.rn.{}x2.f32 {to}, {high}, {low}", half.name()));
    }

    /// `cvt.rn.f16.f32` or `.bf16`: a float rounded.
    pub fn cvt_rn<'k>(&'k self, half: Half, value: Reg<'k, f32>) -> Reg<'k, u16> {
        self.unary(format_args!("cvt.rn.{}.f32", half.name()), value)
    }

    /// The float that 16 bits stand for.
    pub fn widen<'k>(&'k self, half: Half, value: Reg<'k, u16>) -> Reg<'k, f32> {
        match half {
            Half::F16 => self.unary("cvt.f32.f16", value),
            // A bf16 is the upper half of a float.
            Half::Bf16 => {
                let d = self.reg::<u32>();
                self.emit(format_args!("mov.b32 {d}, {{{}, {value}}}", self.var(0u16)));
                d.cast()
            }
        }
    }

    /// The two floats of a register, the low half's first.
    pub fn unpack<'k>(&'k self, half: Half, pair: Reg<'k, u32>) -> [Reg<'k, f32>; 2] {
        self.halves(pair).map(|x| self.widen(half, x))
    }

    /// The low and the high half of a register.
    pub fn halves<'k>(&'k self, pair: Reg<'k, u32>) -> [Reg<'k, u16>; 2] {
        let halves = self.regs::<u16, 2>();
        self.emit(format_args!("mov.b32 {}, {pair}", list(&halves)));
        halves
    }

    /// The value of lane `lane` for all lanes of the warp (`shfl.sync.idx`): tells the assembler that
    /// a value is the same in the whole warp.
    pub fn shfl_idx<'k>(
        &'k self,
        value: Reg<'k, u32>,
        lane: impl Into<Value<'k, u32>>,
    ) -> Reg<'k, u32> {
        let d = self.reg();
        self.emit(format_args!("shfl.sync.idx.b32 {d}, {value}, {}, 31, -1", lane.into()));
        d
    }

    /// `shfl.sync.up`: the value of the lane `by` before; a lane without one keeps its own.
    pub fn shfl_up<'k>(&'k self, value: Reg<'k, u32>, by: u32) -> Reg<'k, u32> {
        let d = self.reg();
        self.emit(format_args!("shfl.sync.up.b32 {d}, {value}, {by}, 0, -1"));
        d
    }

    /// `vote.sync.ballot`: a bit for each lane of the warp.
    pub fn vote_ballot<'k>(&'k self, holds: Reg<'k, bool>) -> Reg<'k, u32> {
        let d = self.reg();
        self.emit(format_args!("vote.sync.ballot.b32 {d}, {holds}, -1"));
        d
    }

    /// `shfl.sync.bfly`: the value of the lane whose number differs by `xor`.
    pub fn shfl_bfly<'k, T: Scalar>(&'k self, value: Reg<'k, T>, xor: u32) -> Reg<'k, T> {
        let d = self.reg();
        self.emit(format_args!("shfl.sync.bfly.b32 {d}, {value}, {xor}, 31, -1"));
        d
    }
}
