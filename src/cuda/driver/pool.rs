//! The pool from which candle allocates on a GPU: all of the process's memory there.
#![allow(unsafe_code)]

use candle_core::CudaDevice;
use cudarc::driver::sys::{self, CUmemPool_attribute as Attribute, CUresult};

use crate::error::{Error, Result};

/// The default pool of one GPU.
pub struct Pool {
    op: &'static str,
    pool: sys::CUmemoryPool,
}

impl Pool {
    pub fn of(op: &'static str, device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let mut pool = std::ptr::null_mut();
        // SAFETY: it writes to the local that it is given.
        let got =
            unsafe { sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device()) };
        accepted(op, "no memory pool", got).map(|()| Self { op, pool })
    }

    /// Bytes in use at one time, at most, since [`forget`](Self::forget).
    pub fn peak(&self) -> Result<u64> {
        let mut bytes = 0u64;
        let high = Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is of 64 bits, written to the local.
        let got = unsafe { sys::cuMemPoolGetAttribute(self.pool, high, (&raw mut bytes).cast()) };
        accepted(self.op, "the pool's peak", got).map(|()| bytes)
    }

    /// The count of the peak begins anew at what is in use.
    pub fn forget(&self) -> Result<()> {
        let mut zero = 0u64;
        let high = Attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
        // SAFETY: the attribute is of 64 bits, read from the local.
        let got = unsafe { sys::cuMemPoolSetAttribute(self.pool, high, (&raw mut zero).cast()) };
        accepted(self.op, "the pool's peak", got)
    }
}

fn accepted(op: &'static str, what: &str, result: CUresult) -> Result<()> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        error => Err(Error::Driver { op, message: format!("{what}: {error:?}") }),
    }
}
