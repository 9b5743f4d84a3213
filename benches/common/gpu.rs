//! Device times that are the device's own.
//!
//! Events around one short kernel measure how fast the host enqueues it. So the GPU is kept busy in
//! front of the first event until the host has enqueued everything; a sample for which that came too
//! late is taken again, after a longer head start.
#![allow(unsafe_code)]

use std::sync::Arc;
use std::time::Duration;

use candle_core::cuda_backend::WrapErr;
use candle_core::{CudaDevice, Device, Result};
use cudarc::driver::sys::{self, CUevent_flags, CUmemPool_attribute};
use cudarc::driver::{
    CudaEvent, CudaFunction, CudaSlice, CudaStream, DevicePtr, LaunchConfig, PushKernelArg,
};

/// Four times the largest L2 cache so far.
const FLUSH_BYTES: usize = 256 << 20;
/// Enqueueing one call takes 5 to 20 µs.
const HEAD_START_US: u64 = 50;
/// What blocks the host does not get quicker from more.
const LONGEST_HEAD_START_US: u64 = 1600;
const LONGEST_REST_US: f64 = 10_000.0;
/// Reads of an H200, as measured.
pub const PEAK_TB_PER_S: f64 = 4.55;

pub struct Gpu {
    pub device: Device,
    pub name: String,
    stream: Arc<CudaStream>,
    spin: CudaFunction,
    read: CudaFunction,
    flush: CudaSlice<u8>,
    start: CudaEvent,
    end: CudaEvent,
    head_start_us: u64,
}

impl Gpu {
    pub fn new(ordinal: usize) -> Result<Self> {
        let device = Device::new_cuda(ordinal)?;
        let cuda = device.as_cuda_device()?;
        keep_freed_memory(cuda)?;
        let stream = cuda.cuda_stream();
        let function = |name| {
            let ptx = include_str!("instruments.ptx");
            cuda.get_or_load_custom_func(name, "bench_instruments", ptx)
                .map(|f| f.into_cuda_function())
        };
        let event = || stream.context().new_event(Some(CUevent_flags::CU_EVENT_DEFAULT)).w();
        Ok(Self {
            name: stream.context().name().w()?,
            spin: function("spin")?,
            read: function("read")?,
            flush: stream.alloc_zeros(FLUSH_BYTES).w()?,
            start: event()?,
            end: event()?,
            head_start_us: HEAD_START_US,
            stream,
            device,
        })
    }

    /// Forgets how long the contestants of the last contest needed to enqueue.
    pub fn new_contest(&mut self) {
        self.head_start_us = HEAD_START_US;
    }

    /// The device's µs for one call, with nothing of the operands in L2 if `cold`.
    pub fn time(&mut self, cold: bool, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        loop {
            if cold {
                self.flush_l2()?;
            }
            self.spin()?;
            self.start.record(&self.stream).w()?;
            run()?;
            self.end.record(&self.stream).w()?;
            let late = self.start.try_is_complete().w()?;
            let us = self.elapsed_us()?;
            // A third of the time at work keeps a GPU under its power cap, so that the kernel
            // decides and not who came before it.
            let rest = (2.0 * us).min(LONGEST_REST_US);
            std::thread::sleep(Duration::from_secs_f64(rest * 1e-6));
            if !late || self.head_start_us >= LONGEST_HEAD_START_US {
                return Ok(us);
            }
            self.head_start_us *= 2;
        }
    }

    /// The device's µs per call over `calls` calls back to back.
    pub fn block(&mut self, calls: usize, run: &mut dyn FnMut() -> Result<()>) -> Result<f64> {
        self.spin()?;
        self.start.record(&self.stream).w()?;
        for _ in 0..calls {
            run()?;
        }
        self.end.record(&self.stream).w()?;
        Ok(self.elapsed_us()? / calls as f64)
    }

    fn elapsed_us(&self) -> Result<f64> {
        self.end.synchronize().w()?;
        Ok(f64::from(self.start.elapsed_ms(&self.end).w()?) * 1e3)
    }

    fn spin(&self) -> Result<()> {
        let ns = self.head_start_us * 1000;
        let mut launch = self.stream.launch_builder(&self.spin);
        launch.arg(&ns);
        // SAFETY: `spin` takes one u64 and touches no memory.
        unsafe { launch.launch(shape(1, 1)) }.w()?;
        Ok(())
    }

    /// Replaces what L2 holds. The read after the write leaves no dirty line, whose way to memory the
    /// timed call would pay for.
    fn flush_l2(&mut self) -> Result<()> {
        self.stream.memset_zeros(&mut self.flush).w()?;
        let (buffer, _guard) = self.flush.device_ptr(&self.stream);
        let count = FLUSH_BYTES as u64 / 16;
        let mut launch = self.stream.launch_builder(&self.read);
        launch.arg(&buffer).arg(&count);
        // SAFETY: `read` takes an address and how many pieces of 16 bytes lie there.
        unsafe { launch.launch(shape(1056, 256)) }.w()?;
        Ok(())
    }
}

fn shape(blocks: u32, threads: u32) -> LaunchConfig {
    LaunchConfig { grid_dim: (blocks, 1, 1), block_dim: (threads, 1, 1), shared_mem_bytes: 0 }
}

/// By default each synchronisation gives freed memory back to the driver, and the next call pays for
/// mapping it again. A program that does not wait for each call does not see that.
fn keep_freed_memory(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let (mut pool, mut threshold) = (std::ptr::null_mut(), u64::MAX);
    // SAFETY: both calls write to or read from the locals they are given, of the types they expect.
    unsafe {
        sys::cuDeviceGetDefaultMemPool(&mut pool, stream.context().cu_device()).result().w()?;
        let attribute = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
        sys::cuMemPoolSetAttribute(pool, attribute, (&raw mut threshold).cast()).result().w()?;
    }
    Ok(())
}
