//! What is known of each GPU.

use std::collections::HashMap;
use std::ffi::OsString;
use std::sync::Arc;

use candle_core::CudaDevice;
use cudarc::driver::{CudaContext, DriverError, sys::CUdevice_attribute as Attribute};
use once_cell::sync::Lazy;
use parking_lot::RwLock;

use crate::error::{Error, Result};
use crate::kernel::Device;
use crate::ptx::Target;

/// One GPU of this process. All candle devices on its ordinal use its primary context, so that one
/// compiled kernel serves them all.
pub struct Gpu {
    /// Keeps the primary context: what belongs to it, as compiled kernels do, outlives candle's devices.
    pub context: Arc<CudaContext>,
    pub ordinal: usize,
    pub capability: Capability,
    pub device: Device,
}

/// Major and minor compute capability.
pub type Capability = (i32, i32);

static GPUS: Lazy<RwLock<HashMap<usize, Arc<Gpu>>>> = Lazy::new(RwLock::default);

impl Gpu {
    /// The GPU of a candle device. Its context becomes current.
    pub fn of(op: &'static str, device: &CudaDevice) -> Result<Arc<Self>> {
        let stream = device.cuda_stream();
        let context = stream.context();
        context.bind_to_thread().map_err(|e| Error::Driver { op, message: e.to_string() })?;
        let ordinal = context.ordinal();
        if let Some(gpu) = GPUS.read().get(&ordinal) {
            return Ok(gpu.clone());
        }
        let gpu = Arc::new(Self::ask(op, context)?);
        Ok(GPUS.write().entry(ordinal).or_insert(gpu).clone())
    }

    fn ask(op: &'static str, context: &Arc<CudaContext>) -> Result<Self> {
        let ordinal = context.ordinal();
        let failed = |e: DriverError| Error::NoDevice { ordinal, reason: e.to_string() };
        let ask = |attribute| context.attribute(attribute).map(|x| x as u32).map_err(failed);
        let capability = context.compute_capability().map_err(failed)?;
        let device = Device {
            target: target(op, capability, std::env::var_os("KAIO_ARCH"))?,
            multiprocessors: ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_per_block: ask(
                Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN,
            )?,
        };
        Ok(Self { context: context.clone(), ordinal, capability, device })
    }
}

/// Whether there are kernels for the GPU of a candle device.
pub fn has_kernels(op: &'static str, device: &CudaDevice) -> Result<bool> {
    match Gpu::of(op, device) {
        Ok(_) => Ok(true),
        Err(Error::Unsupported { .. }) => Ok(false),
        Err(other) => Err(other),
    }
}

/// What kernels are assembled for. `forced` is the value of `KAIO_ARCH`: `sm_80` takes the portable
/// kernels on any GPU.
fn target(op: &'static str, capability: Capability, forced: Option<OsString>) -> Result<Target> {
    let (major, minor) = capability;
    if capability < (8, 0) {
        return Err(Error::Unsupported {
            op,
            what: "this crate".into(),
            limit: format!(
                "has no kernels for a GPU of compute capability {major}.{minor} (at least 8.0)"
            ),
            fix: "move the tensors to the CPU, whose path has no such limit".into(),
        });
    }
    let best = match capability {
        (9, 0) => Target::Sm90a,
        (8, ..9) => Target::Sm80,
        _ => Target::Sm89,
    };
    let Some(name) = forced.filter(|name| !name.is_empty()) else { return Ok(best) };
    let all = [Target::Sm90a, Target::Sm89, Target::Sm80];
    let possible = all.into_iter().skip_while(|&target| target != best);
    let found = possible.clone().find(|target| name == target.name());
    found.ok_or_else(|| Error::Value {
        op,
        name: "KAIO_ARCH",
        got: name.to_string_lossy().into_owned(),
        want: format!(
            "{} on this GPU",
            possible.map(Target::name).collect::<Vec<_>>().join(" or ")
        ),
        fix: "unset the environment variable, and the first is taken",
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(capability: Capability, forced: Option<&str>) -> std::result::Result<Target, String> {
        target("kaio_matmul_with", capability, forced.map(OsString::from))
            .map_err(|e| e.to_string())
    }

    #[test]
    fn each_gpu_has_its_target() {
        for (capability, target) in [
            ((8, 0), Target::Sm80),
            ((8, 6), Target::Sm80),
            ((8, 9), Target::Sm89),
            ((9, 0), Target::Sm90a),
            ((10, 0), Target::Sm89),
            ((12, 0), Target::Sm89),
        ] {
            assert_eq!(ask(capability, None), Ok(target));
            assert_eq!(ask(capability, Some("")), Ok(target));
            assert_eq!(ask(capability, Some(target.name())), Ok(target));
            assert_eq!(ask(capability, Some("sm_80")), Ok(Target::Sm80));
        }
    }

    #[test]
    fn an_old_gpu_is_refused() {
        let refusal = "kaio_matmul_with: this crate has no kernels for a GPU of compute capability \
                       7.5 (at least 8.0); move the tensors to the CPU, whose path has no such limit";
        assert_eq!(ask((7, 5), None), Err(refusal.into()));
        assert_eq!(ask((7, 5), Some("sm_80")), Err(refusal.into()));
    }

    #[test]
    fn what_the_gpu_cannot_run_is_refused() {
        assert_eq!(
            ask((9, 0), Some("sm_70")).unwrap_err(),
            "kaio_matmul_with: `KAIO_ARCH` is sm_70, wanted sm_90a or sm_89 or sm_80 on this GPU; unset the \
             environment variable, and the first is taken"
        );
        assert_eq!(
            ask((8, 6), Some("sm_90a")).unwrap_err(),
            "kaio_matmul_with: `KAIO_ARCH` is sm_90a, wanted sm_80 on this GPU; unset the \
             environment variable, and the first is taken"
        );
    }
}
