//! The GPU's memory, as launches use it.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::{CudaDType, CudaStorage, CudaStorageSlice};
use candle_core::{CudaDevice, DType, Result, Shape};
use cudarc::driver::{CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DeviceRepr, SyncOnDrop};

/// Storage that the caller writes whole before anyone reads it.
pub fn uninit(device: &CudaDevice, shape: &Shape, dtype: DType) -> Result<CudaStorage> {
    // SAFETY: see above; the element types have no invalid bit patterns.
    unsafe { device.alloc_uninit(shape, dtype) }
}

/// The same for `len` elements of a type.
pub fn uninit_slice<T: CudaDType + DeviceRepr>(
    device: &CudaDevice,
    len: usize,
) -> Result<CudaSlice<T>> {
    // SAFETY: as above.
    unsafe { device.alloc::<T>(len) }
}

/// Memory that a kernel launched on a device may use while this value lives.
///
/// Where candle tracks uses by events, as it does for a
/// [device with a stream of its own](candle_core::Device::new_cuda_with_stream), making one waits, on
/// the GPU, for what was submitted elsewhere, and dropping it tells others of the use.
#[must_use]
pub struct Memory<'a> {
    /// Borrows the stream below, and is dropped before it.
    _use: SyncOnDrop<'a>,
    _stream: Arc<CudaStream>,
    address: u64,
    bytes: usize,
    element: usize,
}

/// `body` for the slice of a storage, of whatever element type.
macro_rules! with_slice {
    ($storage:expr, $slice:ident => $body:expr) => {{
        use CudaStorageSlice as S;
        match $storage {
            S::U8($slice) | S::F6E2M3($slice) | S::F6E3M2($slice) => $body,
            S::F4($slice) | S::F8E8M0($slice) => $body,
            S::U32($slice) => $body,
            S::I16($slice) => $body,
            S::I32($slice) => $body,
            S::I64($slice) => $body,
            S::BF16($slice) => $body,
            S::F16($slice) => $body,
            S::F32($slice) => $body,
            S::F64($slice) => $body,
            S::F8E4M3($slice) => $body,
        }
    }};
}

/// How many elements a storage has.
pub fn elements(storage: &CudaStorage) -> usize {
    with_slice!(&storage.slice, slice => slice.len())
}

impl<'a> Memory<'a> {
    /// A storage, to be read. A tensor's elements begin at `start_offset()` of its layout: see
    /// [`at`](Self::at).
    pub fn of(storage: &'a CudaStorage, device: &CudaDevice) -> Self {
        with_slice!(&storage.slice, slice => Self::of_slice(slice, device))
    }

    /// A storage, to be written.
    pub fn of_mut(storage: &'a mut CudaStorage, device: &CudaDevice) -> Self {
        with_slice!(&mut storage.slice, slice => Self::of_slice_mut(slice, device))
    }

    /// A slice, to be read.
    pub fn of_slice<T>(slice: &'a CudaSlice<T>, device: &CudaDevice) -> Self {
        let bytes = slice.num_bytes();
        Self::new::<T>(device, bytes, |stream| slice.device_ptr(stream))
    }

    /// A slice, to be written.
    pub fn of_slice_mut<T>(slice: &'a mut CudaSlice<T>, device: &CudaDevice) -> Self {
        let bytes = slice.num_bytes();
        Self::new::<T>(device, bytes, |stream| slice.device_ptr_mut(stream))
    }

    fn new<T>(
        device: &CudaDevice,
        bytes: usize,
        begin: impl FnOnce(&'a CudaStream) -> (u64, SyncOnDrop<'a>),
    ) -> Self {
        let stream = device.cuda_stream();
        // SAFETY: the stream stays where it is while the `Arc` lives, which is kept beside what
        // borrows it and dropped after it.
        let (address, _use) = begin(unsafe { &*Arc::as_ptr(&stream) });
        Self { _use, _stream: stream, address, bytes, element: size_of::<T>() }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Where element `index` is, for the element type of the storage or slice.
    ///
    /// # Panics
    ///
    /// If it is past the end. The end itself is not: an empty view may begin there.
    pub fn at(&self, index: usize) -> u64 {
        let offset = index.checked_mul(self.element).filter(|&offset| offset <= self.bytes);
        let Some(offset) = offset else {
            panic!("element {index} of a storage of {} elements", self.bytes / self.element)
        };
        self.address + offset as u64
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
