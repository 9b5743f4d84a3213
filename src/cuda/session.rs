//! One call's dealings with the driver for kaio: pointers and views.
#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ops::{Deref, DerefMut};
use std::sync::Arc;

use candle_core::cuda_backend::{CudaDType, CudaStorageSlice};
use candle_core::{CudaDevice, CudaStorage, DeviceLocation, Result, backend::BackendDevice};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use kaio::prelude::{GpuBuffer, KaioDevice};

use super::driver::memory::uninit_slice;
use super::driver::order::Order;
use super::registry::{self, Entry};
use crate::error::Error;

/// What the functions of `kaio-ops` return.
pub(super) type KaioResult = kaio::prelude::Result<()>;

/// The devices and streams of one call.
///
/// candle works on its device's stream, kaio on the GPU's legacy default stream. Everything that
/// candle does for the call (packing, casting, allocating) is submitted before [`Session::run`],
/// which lets kaio's stream wait for candle's, submits the kernels, and lets candle's stream wait
/// for them: on the device, never on the host. (kaio-ops itself unloads its module after each
/// launch, which may hold the host until the kernel ends.)
pub(super) struct Session {
    op: &'static str,
    entry: Arc<Entry>,
    pub device: CudaDevice,
    stream: Arc<CudaStream>,
    order: Order,
}

impl Session {
    /// A session for inputs on one ordinal, which may belong to several candle devices.
    pub fn new(op: &'static str, inputs: &[&CudaStorage]) -> Result<Self> {
        let device = inputs[0].device.clone();
        let DeviceLocation::Cuda { gpu_id } = device.location() else {
            unreachable!("a CUDA storage is on a CUDA device")
        };
        let entry = registry::entry(gpu_id)?;
        let order = Order::new(op, entry.kaio.stream().clone(), inputs.iter().copied());
        Ok(Self { op, entry, stream: device.cuda_stream(), device, order })
    }

    /// Storage for `len` elements, not initialised: the kernels write all of it.
    pub fn alloc<T: CudaDType + cudarc::driver::DeviceRepr>(
        &self,
        len: usize,
    ) -> Result<CudaSlice<T>> {
        uninit_slice(&self.device, len)
    }

    /// A storage that kernels read.
    pub fn input<'a>(&'a self, storage: &'a CudaStorage) -> Result<Pointer<'a>> {
        use CudaStorageSlice as S;
        let stream = &self.stream;
        let ((address, guard), len) = match &storage.slice {
            S::U8(s) => (s.device_ptr(stream), s.num_bytes()),
            S::U32(s) => (s.device_ptr(stream), s.num_bytes()),
            S::F16(s) => (s.device_ptr(stream), s.num_bytes()),
            S::BF16(s) => (s.device_ptr(stream), s.num_bytes()),
            S::F32(s) => (s.device_ptr(stream), s.num_bytes()),
            _ => candle_core::bail!("{}: no kernel reads this dtype", self.op),
        };
        Ok(Pointer { views: self.entry.views()?, address, bytes: len, _guard: guard })
    }

    /// A slice that kernels write.
    pub fn output<'a, T>(&'a self, slice: &'a mut CudaSlice<T>) -> Result<Pointer<'a>> {
        let bytes = slice.num_bytes();
        let (address, guard) = slice.device_ptr_mut(&self.stream);
        Ok(Pointer { views: self.entry.views()?, address, bytes, _guard: guard })
    }

    /// Runs kernels in order with candle's work before and after. The pointers that they use are
    /// made before and dropped after.
    pub fn run(&self, kernels: impl FnOnce(&KaioDevice) -> KaioResult) -> Result<()> {
        let kaio = &self.entry.kaio;
        self.order.run(|| Ok(kernels(kaio).map_err(|e| self.error(format!("kaio-ops: {e}")))?))
    }

    fn error(&self, message: String) -> Error {
        Error::Driver { op: self.op, message }
    }
}

/// Device memory of one storage while kernels use it.
pub(super) struct Pointer<'a> {
    views: &'a Arc<CudaStream>,
    address: u64,
    bytes: usize,
    /// Tells candle's event tracking, when dropped, that the use was submitted.
    _guard: SyncOnDrop<'a>,
}

impl Pointer<'_> {
    /// `len` elements from `offset` on, as kaio sees them.
    pub fn view<T>(&self, offset: usize, len: usize) -> View<'_, T> {
        let size = std::mem::size_of::<T>();
        assert!((offset + len) * size <= self.bytes, "a view leaves its storage");
        let address = self.address + (offset * size) as u64;
        // SAFETY: the memory is there as long as `self` borrows its owner, and holds `len` elements
        // (asserted above) of a type without invalid bit patterns. `View` never frees it.
        let slice = unsafe { self.views.upgrade_device_ptr::<T>(address, len) };
        View {
            buffer: ManuallyDrop::new(GpuBuffer::from_cuda_slice(slice)),
            owner: Default::default(),
        }
    }
}

/// A kaio buffer over memory that candle owns.
pub(super) struct View<'a, T> {
    buffer: ManuallyDrop<GpuBuffer<T>>,
    owner: std::marker::PhantomData<&'a ()>,
}

impl<T> Deref for View<'_, T> {
    type Target = GpuBuffer<T>;

    fn deref(&self) -> &GpuBuffer<T> {
        &self.buffer
    }
}

impl<T> DerefMut for View<'_, T> {
    fn deref_mut(&mut self) -> &mut GpuBuffer<T> {
        &mut self.buffer
    }
}

impl<T> Drop for View<'_, T> {
    fn drop(&mut self) {
        // SAFETY: taken once, here, and not used again. `leak` gives up the address without freeing.
        let buffer = unsafe { ManuallyDrop::take(&mut self.buffer) };
        buffer.into_cuda_slice().leak();
    }
}
