//! The tensor memory accelerator (TMA, sm_90) copies boxes of tensors. A descriptor (`CUtensorMap`) says how a tensor lies in
//! global memory; coordinates are in elements, innermost first.

use super::memory::list;
use super::{Address, Kernel, Reg, Value};

/// The L2 policy of data that is read once.
const EVICT_FIRST: u64 = 0x12F0_0000_0000_0000;

/// Where a box goes, and how long L2 keeps it.
#[derive(Clone, Copy, Debug)]
pub enum Delivery<'k> {
    /// To the block that asks.
    Plain,
    /// To the block that asks; L2 drops it before other data.
    Once,
    /// To the same place in each block of the cluster whose bit is set, and to its barrier.
    Multicast(Reg<'k, u16>),
}

impl Kernel {
    /// `prefetch.tensormap`
    pub fn prefetch_tensor_map<'k>(&'k self, map: Reg<'k, u64>) {
        self.needs(8, 0);
        self.emit(format_args!("prefetch.tensormap [{map}]"));
    }

    /// `cp.async.bulk.tensor`: one box into shared memory; its bytes count at `barrier`. What lies
    /// outside the tensor becomes zero.
    pub fn tma_load<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        map: Reg<'k, u64>,
        at: &[Reg<'k, u32>],
        barrier: impl Into<Address<'k, u32>>,
        how: Delivery<'k>,
    ) {
        self.needs(8, 0);
        let (to, barrier, rank) = (to.into(), barrier.into(), at.len());
        let (kind, operand) = match how {
            Delivery::Plain => ("", String::new()),
            Delivery::Once => (".L2::cache_hint", format!(", {EVICT_FIRST:#018X}")),
            Delivery::Multicast(blocks) => (".multicast::cluster", format!(", {blocks}")),
        };
        self.emit(format_args!(
            "cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes\
             {kind} {to}, [{map}, {{{}}}], {barrier}{operand}",
            coordinates(at)
        ));
    }

    /// `cp.async.bulk`: `bytes` that follow each other, a multiple of 16, into shared memory, where they count at
    /// `barrier`. Both addresses are multiples of 16. It is not for [`Delivery::Multicast`].
    pub fn bulk_load<'k>(
        &'k self,
        to: impl Into<Address<'k, u32>>,
        from: impl Into<Address<'k, u64>>,
        bytes: impl Into<Value<'k, u32>>,
        barrier: impl Into<Address<'k, u32>>,
        how: Delivery<'k>,
    ) {
        self.needs(8, 0);
        let (to, from, bytes, barrier) = (to.into(), from.into(), bytes.into(), barrier.into());
        let (kind, operand) = match how {
            Delivery::Plain => ("", String::new()),
            Delivery::Once => (".L2::cache_hint", format!(", {EVICT_FIRST:#018X}")),
            Delivery::Multicast(_) => panic!("bytes that several blocks get"),
        };
        self.emit(format_args!(
            "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes{kind} {to}, {from}, \
             {bytes}, {barrier}{operand}"
        ));
    }

    /// `cp.async.bulk.tensor`: one box from shared memory; what lies outside the tensor is dropped.
    pub fn tma_store<'k>(
        &'k self,
        map: Reg<'k, u64>,
        at: &[Reg<'k, u32>],
        from: impl Into<Address<'k, u32>>,
    ) {
        self.needs(8, 0);
        let (from, rank) = (from.into(), at.len());
        self.emit(format_args!(
            "cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [{map}, {{{}}}], {from}",
            coordinates(at)
        ));
    }

    /// `cp.reduce.async.bulk.tensor`: one box of f32 or 16-bit floats, as the tensor has, added to it element by element;
    /// what lies outside the tensor is dropped.
    pub fn tma_reduce_add<'k>(
        &'k self,
        map: Reg<'k, u64>,
        at: &[Reg<'k, u32>],
        from: impl Into<Address<'k, u32>>,
    ) {
        self.needs(8, 0);
        let (from, rank) = (from.into(), at.len());
        self.emit(format_args!(
            "cp.reduce.async.bulk.tensor.{rank}d.global.shared::cta.add.tile.bulk_group [{map}, {{{}}}], \
             {from}",
            coordinates(at)
        ));
    }

    /// `cp.reduce.async.bulk` of f32: adds `bytes` of shared memory, a multiple of 16, to global memory, element by
    /// element. Both addresses are multiples of 16.
    pub fn bulk_reduce_add<'k>(
        &'k self,
        to: impl Into<Address<'k, u64>>,
        from: impl Into<Address<'k, u32>>,
        bytes: u32,
    ) {
        self.needs(8, 0);
        let (to, from) = (to.into(), from.into());
        self.emit(format_args!(
            "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 {to}, {from}, {bytes}"
        ));
    }

    /// `cp.async.bulk.commit_group`
    pub fn tma_commit(&self) {
        self.needs(8, 0);
        self.emit(format_args!("cp.async.bulk.commit_group"));
    }

    /// `cp.async.bulk.wait_group.read`: until all but `pending` groups of this thread have read their
    /// shared memory.
    pub fn tma_wait_read(&self, pending: u32) {
        self.needs(8, 0);
        self.emit(format_args!("cp.async.bulk.wait_group.read {pending}"));
    }

    /// `cp.async.bulk.wait_group`: until all but `pending` groups of this thread are complete.
    pub fn tma_wait(&self, pending: u32) {
        self.needs(8, 0);
        self.emit(format_args!("cp.async.bulk.wait_group {pending}"));
    }
}

fn coordinates(at: &[Reg<u32>]) -> String {
    list(at).trim_matches(['{', '}']).to_string()
}
