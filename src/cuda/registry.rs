//! One [`KaioDevice`] for each GPU, process-wide, made on first use.
//!
//! The methods of [`KaioTensorExt`](crate::KaioTensorExt) find the device of a tensor here by its
//! CUDA ordinal; a caller passes none. Several candle devices on one ordinal share an entry: all of
//! them are views of the GPU's primary context.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::{DeviceLocation, Tensor};
use cudarc::driver::CudaStream;
use kaio::prelude::KaioDevice;
use once_cell::sync::{Lazy, OnceCell};
use parking_lot::Mutex;

use super::driver::raw::untracked_stream;
use crate::check::place;
use crate::error::{Error, Result};

/// A GPU as the engines use it.
pub(super) struct Entry {
    pub kaio: Arc<KaioDevice>,
    /// A stream of a context that does not track events. What is wrapped on it costs no event: the
    /// session orders the streams itself.
    views: OnceCell<Arc<CudaStream>>,
}

impl Entry {
    fn new(kaio: Arc<KaioDevice>) -> Arc<Self> {
        Arc::new(Self { kaio, views: OnceCell::new() })
    }

    pub(super) fn views(&self) -> Result<&Arc<CudaStream>> {
        self.views.get_or_try_init(|| {
            let ordinal = self.kaio.ordinal();
            untracked_stream(ordinal)
                .map_err(|e| Error::NoDevice { ordinal, reason: e.to_string() })
        })
    }
}

/// A slot fills at most once; callers that come while it fills wait for it. A failure leaves it empty.
type Slot = Arc<OnceCell<Arc<Entry>>>;

static REGISTRY: Lazy<Mutex<HashMap<usize, Slot>>> = Lazy::new(Mutex::default);

pub(super) fn entry(ordinal: usize) -> Result<Arc<Entry>> {
    if i32::try_from(ordinal).is_err() {
        return Err(Error::NoDevice { ordinal, reason: "not a CUDA ordinal".into() });
    }
    loop {
        let slot = REGISTRY.lock().entry(ordinal).or_default().clone();
        // Outside the lock: another GPU's callers do not wait for this one's.
        let entry = slot.get_or_try_init(|| {
            let reason =
                |e: kaio::prelude::KaioError| Error::NoDevice { ordinal, reason: e.to_string() };
            KaioDevice::new(ordinal).map(Arc::new).map(Entry::new).map_err(reason)
        })?;
        // Unless the user registered another device meanwhile.
        if REGISTRY.lock().get(&ordinal).is_some_and(|now| Arc::ptr_eq(now, &slot)) {
            return Ok(entry.clone());
        }
    }
}

/// The device at a CUDA ordinal, created on the first call.
///
/// Concurrent first callers get the same `Arc`.
///
/// # Errors
///
/// [`Error::NoDevice`](crate::Error::NoDevice) with the driver's reason. A failure leaves no trace;
/// the next call tries again.
pub fn device(ordinal: usize) -> Result<Arc<KaioDevice>> {
    Ok(entry(ordinal)?.kaio.clone())
}

/// The device of a CUDA tensor.
///
/// # Errors
///
/// [`Error::NotCuda`](crate::Error::NotCuda) for any other tensor, else those of [`device`].
pub fn device_of(t: &Tensor) -> Result<Arc<KaioDevice>> {
    match t.device().location() {
        DeviceLocation::Cuda { gpu_id } => device(gpu_id),
        other => Err(Error::NotCuda { op: "registry::device_of", got: place(other) }),
    }
}

/// Puts the user's own device in, under its own ordinal; returns the one that it replaced.
///
/// Calls that already run keep the device that they have.
pub fn register(device: Arc<KaioDevice>) -> Option<Arc<KaioDevice>> {
    let (ordinal, slot) = (device.ordinal(), Slot::default());
    slot.get_or_init(|| Entry::new(device));
    let replaced = REGISTRY.lock().insert(ordinal, slot)?;
    Some(replaced.get()?.kaio.clone())
}
