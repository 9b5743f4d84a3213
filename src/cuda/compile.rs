//! From PTX to a loaded function, with an optional cache of compiled kernels on disk.
//!
//! `KAIO_DUMP_PTX=dir` writes each kernel's text there. `KAIO_CACHE_DIR=dir` keeps compiled kernels
//! there, so that a second process starts without compiling; the driver has a cache of its own besides.
//! That one has to do for kernels whose warpgroups move registers: a compiled kernel as bytes is only
//! to be had from the driver's linker, which assembles for linking, and then ignores `setmaxnreg`
//! (ptxas's C7504): sums spill, and wgmma is serialised.
#![allow(unsafe_code)]

use std::ffi::{CString, c_void};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{env, fs, process, ptr, slice};

use cudarc::driver::sys::{
    self, CUfunction_attribute as Attribute, CUjit_option as Option_, CUresult,
};

use super::gpu::Gpu;
use super::launch::Function;
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
pub(super) fn load(op: &'static str, source: &Source, gpu: &Gpu) -> Result<Function> {
    fits(op, source, gpu)?;
    let no_zeros = |_| Error::Driver {
        op,
        message: format!("the text of `{}` has a zero byte", source.entry),
    };
    let text = CString::new(source.text.as_str()).map_err(no_zeros)?;
    let name = CString::new(source.entry).map_err(no_zeros)?;
    if let Some(directory) = directory("KAIO_DUMP_PTX") {
        let name = format!("{}-{:016x}.ptx", source.entry, hash(&source.text));
        write_whole(&directory, &name, source.text.as_bytes());
    }
    let compile = || load_image(text.as_bytes_with_nul());
    let module = match directory("KAIO_CACHE_DIR").filter(|_| !source.moves_registers) {
        None => compiled(compile()),
        Some(directory) => {
            let key = (&source.text, gpu.capability, driver_version());
            // Twice 64 bits: a wrong kernel would be worse than a slow start.
            let name = format!("{:016x}{:016x}.cubin", hash(&key), hash(&(1, key)));
            match fs::read(directory.join(&name)).ok().and_then(|file| load_sealed(&file)) {
                Some(module) => {
                    FROM_DISK.fetch_add(1, Ordering::Relaxed);
                    Ok(module)
                }
                // Not there, or not what it should be. What cannot be kept can still be run.
                None => compiled(assemble(&text).and_then(|image| {
                    let module = load_image(&image)?;
                    write_whole(&directory, &name, &sealed(&image));
                    Ok(module)
                }))
                .or_else(|_| compiled(compile())),
            }
        }
    };
    let function = module.and_then(|module| function(source, &name, module));
    let raw = function.map_err(|Refusal { result, log }| Error::Driver {
        op,
        message: format!("{result:?} for the kernel `{}`{log}", source.entry),
    })?;
    Ok(Function::new(source, gpu.ordinal, raw))
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

fn compiled<T>(result: Compiled<T>) -> Compiled<T> {
    COMPILED.fetch_add(result.is_ok().into(), Ordering::Relaxed);
    result
}

fn directory(variable: &str) -> Option<PathBuf> {
    env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// A compiled kernel as a file: with a hash at its end.
fn sealed(image: &[u8]) -> Vec<u8> {
    [image, &hash(&image).to_le_bytes()].concat()
}

/// The driver believes the sizes inside an image: what was cut or overwritten must not reach it.
fn unsealed(file: &[u8]) -> Option<&[u8]> {
    let (image, seal) = file.split_last_chunk()?;
    (u64::from_le_bytes(*seal) == hash(&image)).then_some(image)
}

fn load_sealed(file: &[u8]) -> Option<sys::CUmodule> {
    load_image(unsealed(file)?).ok()
}

/// A file that is there whole or not at all, whoever else writes it. That it could not be written
/// costs only time.
fn write_whole(directory: &Path, name: &str, bytes: &[u8]) {
    static WRITTEN: AtomicUsize = AtomicUsize::new(0);
    let unique = WRITTEN.fetch_add(1, Ordering::Relaxed);
    let partial = directory.join(format!("{name}.{}-{unique}", process::id()));
    let written = fs::create_dir_all(directory)
        .and_then(|()| fs::write(&partial, bytes))
        .and_then(|()| fs::rename(&partial, directory.join(name)));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
}

fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) };
    version
}

/// The driver's answer, and what its assembler says: `: ` and lines, or nothing.
struct Refusal {
    result: CUresult,
    log: String,
}

type Compiled<T> = std::result::Result<T, Refusal>;

fn accepted(result: CUresult, log: Option<&Log>) -> Compiled<()> {
    match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        result => Err(Refusal { result, log: log.map_or(String::new(), Log::said) }),
    }
}

/// Where the driver's assembler writes what is wrong.
struct Log(Vec<u8>);

impl Log {
    fn new() -> Self {
        Self(vec![0; 8192])
    }

    /// For as long as the log stays where it is.
    fn options(&mut self) -> ([Option_; 2], [*mut c_void; 2]) {
        (
            [Option_::CU_JIT_ERROR_LOG_BUFFER, Option_::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES],
            [self.0.as_mut_ptr().cast(), ptr::without_provenance_mut(self.0.len())],
        )
    }

    fn said(&self) -> String {
        let end = self.0.iter().position(|&b| b == 0).unwrap_or(self.0.len());
        match String::from_utf8_lossy(&self.0[..end]).trim() {
            "" => String::new(),
            said => format!(": {said}"),
        }
    }
}

/// Loads PTX (with its final zero byte) or a whole cubin.
fn load_image(image: &[u8]) -> Compiled<sys::CUmodule> {
    let (mut module, mut log) = (ptr::null_mut(), Log::new());
    let (mut options, mut values) = log.options();
    // SAFETY: a context is current; the image is complete; options and values are as many as said and
    // live through the call, the log among them.
    let result = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            2,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    accepted(result, Some(&log)).map(|()| module)
}

/// PTX to a cubin for the current context's GPU.
fn assemble(text: &CString) -> Compiled<Vec<u8>> {
    let mut log = Log::new();
    let (mut options, mut values) = log.options();
    let mut state = ptr::null_mut();
    // SAFETY: a context is current; options and values are as many as said, and they and the log
    // outlive the linker.
    let result =
        unsafe { sys::cuLinkCreate_v2(2, options.as_mut_ptr(), values.as_mut_ptr(), &mut state) };
    accepted(result, Some(&log))?;
    // SAFETY: the linker was just made.
    let image = unsafe { link(state, text) };
    // SAFETY: it is not used again; its image was copied.
    unsafe { sys::cuLinkDestroy(state) };
    image.map_err(|result| Refusal { result, log: log.said() })
}

/// # Safety
///
/// `state` is a linker without input.
unsafe fn link(state: sys::CUlinkState, text: &CString) -> std::result::Result<Vec<u8>, CUresult> {
    let checked = |result| match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(other),
    };
    let bytes = text.as_bytes_with_nul();
    // SAFETY: the text has the size given and ends with its zero byte; there are no options.
    checked(unsafe {
        sys::cuLinkAddData_v2(
            state,
            sys::CUjitInputType::CU_JIT_INPUT_PTX,
            bytes.as_ptr().cast_mut().cast(),
            bytes.len(),
            c"kernel".as_ptr(),
            0,
            ptr::null_mut(),
            ptr::null_mut(),
        )
    })?;
    let (mut image, mut size) = (ptr::null_mut(), 0);
    // SAFETY: writes one pointer and one size.
    checked(unsafe { sys::cuLinkComplete(state, &mut image, &mut size) })?;
    // SAFETY: the linker owns this many bytes until it is destroyed.
    Ok(unsafe { slice::from_raw_parts(image.cast::<u8>(), size) }.to_vec())
}

/// The kernel in its module, with its shared memory and clusters allowed.
fn function(source: &Source, name: &CString, module: sys::CUmodule) -> Compiled<sys::CUfunction> {
    let mut raw = ptr::null_mut();
    // SAFETY: the module was loaded into the current context and is never unloaded.
    accepted(unsafe { sys::cuModuleGetFunction(&mut raw, module, name.as_ptr()) }, None)?;
    let allow = |attribute, value| {
        // SAFETY: the function was just looked up.
        accepted(unsafe { sys::cuFuncSetAttribute(raw, attribute, value) }, None)
    };
    // At most what a block can have: far inside i32.
    allow(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, source.shared as i32)?;
    if source.cluster > PORTABLE_CLUSTER {
        allow(Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)?;
    }
    Ok(raw)
}

/// Blocks of a cluster that every GPU with clusters runs.
const PORTABLE_CLUSTER: u32 = 8;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_damaged_file_is_not_unsealed() {
        let image = b"\x7fELF and so on".as_slice();
        let file = sealed(image);
        assert_eq!(unsealed(&file), Some(image));
        assert!((0..file.len()).all(|len| unsealed(&file[..len]).is_none()));
        for i in 0..file.len() {
            let mut file = file.clone();
            file[i] ^= 1;
            assert_eq!(unsealed(&file), None);
        }
    }

    #[test]
    fn files_are_written_whole_or_not_at_all() {
        let directory = env::temp_dir().join(format!("kaio-candle-{}", process::id()));
        let bytes = vec![7; 1 << 16];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| write_whole(&directory, "kernel", &bytes));
            }
        });
        assert_eq!(fs::read(directory.join("kernel")).unwrap(), bytes);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "nothing else is left");
        // Not a directory: silent.
        write_whole(&directory.join("kernel"), "kernel", &bytes);
        fs::remove_dir_all(directory).unwrap();
    }
}
