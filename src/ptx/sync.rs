//! Barriers, fences, roles: who waits for whom within a block, a cluster and a stream.

use super::{Kernel, Reg, Value};

impl Kernel {
    /// `bar.sync`: `threads` threads of the block meet at barrier `id` (0 to 15).
    pub fn bar_sync<'k>(&'k self, id: impl Into<Value<'k, u32>>, threads: u32) {
        self.emit(format_args!("bar.sync {}, {threads}", id.into()));
    }

    /// `bar.arrive`: counts at a barrier where `threads` threads arrive or meet, and does not wait.
    pub fn bar_arrive<'k>(&'k self, id: impl Into<Value<'k, u32>>, threads: u32) {
        self.emit(format_args!("bar.arrive {}, {threads}", id.into()));
    }

    /// `bar.sync 0`: all threads of the block meet.
    pub fn sync_block(&self) {
        self.emit(format_args!("bar.sync 0"));
    }

    /// `bar.warp.sync`: all lanes of the warp meet.
    pub fn bar_warp_sync(&self) {
        self.emit(format_args!("bar.warp.sync -1"));
    }

    /// `barrier.cluster`: all threads of the cluster meet, and see each other's stores.
    pub fn sync_cluster(&self) {
        self.needs(7, 8);
        self.emit(format_args!("barrier.cluster.arrive.release.aligned"));
        self.emit(format_args!("barrier.cluster.wait.acquire.aligned"));
    }

    /// `barrier.cluster.arrive.relaxed`: the thread is here, and goes on. Of its stores others see no more than what
    /// [`fence_mbarrier_init`](Self::fence_mbarrier_init) shows.
    pub fn arrive_cluster(&self) {
        self.needs(8, 0);
        self.emit(format_args!("barrier.cluster.arrive.relaxed.aligned"));
    }

    /// `barrier.cluster.wait`: until all threads of the cluster have arrived.
    pub fn wait_cluster(&self) {
        self.needs(7, 8);
        self.emit(format_args!("barrier.cluster.wait.acquire.aligned"));
    }

    /// `fence.proxy.async`: TMA and wgmma see this thread's earlier stores to shared memory.
    pub fn fence_proxy_async(&self) {
        self.needs(8, 0);
        self.emit(format_args!("fence.proxy.async.shared::cta"));
    }

    /// `elect.sync`: true in one lane of the warp.
    pub fn elect_sync(&self) -> Reg<'_, bool> {
        self.needs(8, 0);
        let elected = self.reg();
        self.emit(format_args!("elect.sync _|{elected}, -1"));
        elected
    }

    /// `setmaxnreg.dec`: the warpgroup gives registers back.
    pub fn setmaxnreg_dec(&self, keep: u32) {
        self.needs(8, 0);
        self.emit(format_args!("setmaxnreg.dec.sync.aligned.u32 {keep}"));
    }

    /// `setmaxnreg.inc`: the warpgroup takes registers that others gave back.
    pub fn setmaxnreg_inc(&self, have: u32) {
        self.needs(8, 0);
        self.state.borrow_mut().moves_registers = true;
        self.emit(format_args!("setmaxnreg.inc.sync.aligned.u32 {have}"));
    }

    /// `griddepcontrol.wait`: until the kernels before this one in the stream are complete. Does
    /// nothing unless the kernel was launched to start early.
    pub fn griddepcontrol_wait(&self) {
        self.needs(7, 8);
        self.state.borrow_mut().starts_early = true;
        self.emit(format_args!("griddepcontrol.wait"));
    }

    /// `griddepcontrol.launch_dependents`: the next kernel in the stream may start, up to its wait.
    pub fn griddepcontrol_launch_dependents(&self) {
        self.needs(7, 8);
        self.emit(format_args!("griddepcontrol.launch_dependents"));
    }

    /// `%cluster_ctarank`
    pub fn cluster_rank(&self) -> Reg<'_, u32> {
        self.needs(7, 8);
        self.special("cluster_ctarank")
    }

    /// `%clusterid.x`
    pub fn cluster_x(&self) -> Reg<'_, u32> {
        self.needs(7, 8);
        self.special("clusterid.x")
    }

    /// `%nclusterid.x`
    pub fn clusters_x(&self) -> Reg<'_, u32> {
        self.needs(7, 8);
        self.special("nclusterid.x")
    }
}
