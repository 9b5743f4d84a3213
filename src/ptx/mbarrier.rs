//! Barriers in shared memory that count arrivals and bytes (sm_90 forms).

use super::{Address, Kernel, Reg, Value};

impl Kernel {
    /// `mbarrier.init`: a barrier whose phases complete after `arrivals`.
    pub fn mbarrier_init<'k>(&'k self, barrier: impl Into<Address<'k, u32>>, arrivals: u32) {
        self.emit(format_args!("mbarrier.init.shared.b64 {}, {arrivals}", barrier.into()));
    }

    /// `fence.mbarrier_init`: shows initialised barriers to the cluster and to TMA.
    pub fn fence_mbarrier_init(&self) {
        self.needs(8, 0);
        self.emit(format_args!("fence.mbarrier_init.release.cluster"));
    }

    /// `mbarrier.arrive.expect_tx`: arrives, and makes the phase wait for `bytes` more of copies.
    pub fn mbarrier_arrive_expect_tx<'k>(
        &'k self,
        barrier: impl Into<Address<'k, u32>>,
        bytes: impl Into<Value<'k, u32>>,
    ) {
        self.needs(8, 0);
        let (barrier, bytes) = (barrier.into(), bytes.into());
        self.emit(format_args!("mbarrier.arrive.expect_tx.shared::cta.b64 _, {barrier}, {bytes}"));
    }

    /// `mbarrier.arrive`
    pub fn mbarrier_arrive<'k>(&'k self, barrier: impl Into<Address<'k, u32>>) {
        self.needs(7, 8);
        self.emit(format_args!("mbarrier.arrive.shared::cta.b64 _, {}", barrier.into()));
    }

    /// `mbarrier.arrive` on a barrier of any block of the cluster, at an address of
    /// [`mapa`](Self::mapa). It orders no ordinary stores: it says that a copy may overwrite what was
    /// read. (With `.release.cluster` it would flush, which costs ten times as much.)
    pub fn mbarrier_arrive_cluster<'k>(&'k self, barrier: impl Into<Address<'k, u32>>) {
        self.needs(8, 0);
        self.emit(format_args!("mbarrier.arrive.shared::cluster.b64 _, {}", barrier.into()));
    }

    /// `mbarrier.try_wait.parity` until the phase of this parity is complete.
    pub fn mbarrier_wait<'k>(&'k self, barrier: impl Into<Address<'k, u32>>, parity: Reg<'k, u32>) {
        self.needs(7, 8);
        let (barrier, done) = (barrier.into(), self.reg::<bool>());
        self.spin(|| {
            self.emit(format_args!(
                "mbarrier.try_wait.parity.shared::cta.b64 {done}, {barrier}, {parity}"
            ));
            done
        });
    }
}
