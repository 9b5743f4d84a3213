//! How much of a GPU's memory training takes.

use candle_core::{Device, Result};

use crate::cuda;

/// The most bytes that tensors (and everything else from candle's allocator) had in use at one time on a GPU, of all of
/// the process's candle devices there, since the process began or [`reset_peak_memory`]; `None` on a CPU.
///
/// # Errors
///
/// [`Error::Driver`](crate::Error::Driver) if the driver does not say.
pub fn peak_memory(device: &Device) -> Result<Option<u64>> {
    match device {
        Device::Cuda(device) => cuda::peak_memory("peak_memory", device).map(Some),
        _ => Ok(None),
    }
}

/// Lets [`peak_memory`] begin anew at what is in use now. What was freed before is still in use until the device has
/// come to it, so this waits for the device.
///
/// # Errors
///
/// [`Error::Driver`](crate::Error::Driver) if the driver refuses.
pub fn reset_peak_memory(device: &Device) -> Result<()> {
    device.synchronize()?;
    match device {
        Device::Cuda(device) => cuda::reset_peak_memory("reset_peak_memory", device),
        _ => Ok(()),
    }
}
