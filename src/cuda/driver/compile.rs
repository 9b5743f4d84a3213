//! From PTX to a loaded function, with an optional cache of compiled kernels on disk.
//!
//! `KAIO_DUMP_PTX=dir` writes each kernel's text there. `KAIO_CACHE_DIR=dir` keeps compiled kernels
//! there, so that a second process starts without compiling; the driver has a cache of its own besides.
//! That one has to do for kernels whose warpgroups move registers: a compiled kernel as bytes is only
//! to be had from the driver's linker, which assembles for linking, and then ignores `setmaxnreg`
//! (ptxas's C7504): sums spill, and wgmma is serialised.

use std::ffi::CString;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::files::{self, hash};
use super::gpu::Gpu;
use super::raw::{self, Attempt, Handle, Module, Refusal};
use crate::error::{Error, Result};
use crate::ptx::{Source, Target};

/// How this process came to its kernels.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Kernels {
    /// Compiled here, by the driver.
    pub compiled: usize,
    /// Found compiled in `KAIO_CACHE_DIR`.
    pub from_disk: usize,
}

static COMPILED: AtomicUsize = AtomicUsize::new(0);
static FROM_DISK: AtomicUsize = AtomicUsize::new(0);

/// How this process came to the kernels that it has so far: whether a cache on disk is of use.
pub fn kernels() -> Kernels {
    let [compiled, from_disk] = [&COMPILED, &FROM_DISK].map(|count| count.load(Ordering::Relaxed));
    Kernels { compiled, from_disk }
}

/// Loads a kernel into the current context, which is the GPU's.
pub fn load(op: &'static str, source: &Source, gpu: &Gpu) -> Result<Handle> {
    fits(op, source, gpu)?;
    let no_zeros = |_| Error::Driver {
        op,
        message: format!("the text of `{}` has a zero byte", source.entry),
    };
    let text = CString::new(source.text.as_str()).map_err(no_zeros)?;
    let name = CString::new(source.entry).map_err(no_zeros)?;
    if let Some(directory) = files::directory("KAIO_DUMP_PTX") {
        let name = format!("{}-{:016x}.ptx", source.entry, hash(&source.text));
        files::write_whole(&directory, &name, source.text.as_bytes());
    }
    let compile = || raw::load_image(text.as_bytes_with_nul());
    let module = match files::directory("KAIO_CACHE_DIR").filter(|_| !source.moves_registers) {
        None => compiled(compile()),
        Some(directory) => {
            let key = (&source.text, gpu.capability, raw::driver_version());
            // Twice 64 bits: a wrong kernel would be worse than a slow start.
            let name = format!("{:016x}{:016x}.cubin", hash(&key), hash(&(1, key)));
            let kept = files::read_sealed(&directory, &name);
            match kept.and_then(|image| raw::load_image(&image).ok()) {
                Some(module) => {
                    FROM_DISK.fetch_add(1, Ordering::Relaxed);
                    Ok(module)
                }
                // Not there, or not what it should be. What cannot be kept can still be run.
                None => compiled(raw::assemble(&text).and_then(|image| {
                    let module = raw::load_image(&image)?;
                    files::write_sealed(&directory, &name, &image);
                    Ok(module)
                }))
                .or_else(|_| compiled(compile())),
            }
        }
    };
    let function = module.and_then(|module| raw::function(source, &name, module));
    function.map_err(|Refusal { result, log }| Error::Driver {
        op,
        message: format!("{result:?} for the kernel `{}`{log}", source.entry),
    })
}

/// Whether the GPU can run the kernel at all: the driver's words for these are hard to understand.
fn fits(op: &'static str, source: &Source, gpu: &Gpu) -> Result<()> {
    let refuse = |limit: String, fix: &str| {
        let what = format!("the kernel `{}`", source.entry);
        Err(Error::Unsupported { op, what, limit, fix: fix.into() })
    };
    if source.target == Target::Sm90a && gpu.capability != (9, 0) {
        let (major, minor) = gpu.capability;
        let limit =
            format!("for sm_90a cannot run on a GPU of compute capability {major}.{minor} (9.0)");
        return refuse(limit, "write it for `Target::Sm80`");
    }
    if source.shared > gpu.device.shared_per_block {
        let (got, most) = (source.shared, gpu.device.shared_per_block);
        let limit = format!(
            "cannot have {got} bytes of shared memory a block on this GPU (at most {most})"
        );
        return refuse(limit, "let a block do less at a time");
    }
    Ok(())
}

fn compiled(result: Attempt<Module>) -> Attempt<Module> {
    COMPILED.fetch_add(result.is_ok().into(), Ordering::Relaxed);
    result
}
