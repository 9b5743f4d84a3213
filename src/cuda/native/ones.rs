//! Ones, which products read where there are no scales: made once for each GPU, and kept.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};
use cudarc::driver::DriverError;
use cudarc::driver::sys::CUstreamCaptureStatus;

use super::super::driver::cache::PerGpu;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use crate::error::Error;

/// A vector of ones.
pub(super) struct Ones {
    _held: CudaStorage,
    address: u64,
}

impl Ones {
    /// `len` of a dtype, on the device's stream.
    fn new(device: &CudaDevice, dtype: DType, len: usize) -> Result<Self> {
        let one = if dtype == DType::U8 { Scalar::U8(1) } else { Scalar::F32(1.0) };
        let mut held = uninit(device, &Shape::from(len), dtype)?;
        held.const_set(one, &Layout::contiguous(len))?;
        let address = Memory::of(&held, device).address();
        Ok(Self { _held: held, address })
    }

    /// Where they are.
    pub fn address(&self) -> u64 {
        self.address
    }
}

/// By dtype and length, which are few: powers of two.
static KEPT: PerGpu<(DType, usize), Ones> = PerGpu::new();

/// Lengths below are one.
const SHORTEST: usize = 1 << 12;

/// At least `len` ones of u8 or f32, at a multiple of 16 bytes, for the device's stream. Those that are kept are there for every
/// stream; while one is captured nothing can be, and they are the graph's.
pub(super) fn ones(
    op: &'static str,
    device: &CudaDevice,
    dtype: DType,
    len: usize,
) -> Result<Arc<Ones>> {
    let len = len.next_power_of_two().max(SHORTEST);
    let gpu = Gpu::of(op, device)?;
    let kept = KEPT.get(gpu.ordinal, &(dtype, len), || {
        if is_captured(op, device).map_err(Some)? {
            return Err(None);
        }
        let ones = Ones::new(device, dtype, len).map_err(Some)?;
        let wait = device.cuda_stream().synchronize();
        wait.map_err(|e| Some(failed(op, e)))?;
        Ok(ones)
    });
    match kept {
        Ok(ones) => Ok(ones),
        Err(Some(error)) => Err(error),
        Err(None) => Ok(Arc::new(Ones::new(device, dtype, len)?)),
    }
}

/// Whether the device's stream is captured in a CUDA graph: nothing is computed then, and memory is the graph's.
pub(super) fn is_captured(op: &'static str, device: &CudaDevice) -> Result<bool> {
    let status = device.cuda_stream().capture_status().map_err(|e| failed(op, e))?;
    Ok(status != CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// What the driver refused.
pub(super) fn failed(op: &'static str, error: DriverError) -> candle_core::Error {
    Error::Driver { op, message: error.to_string() }.into()
}
