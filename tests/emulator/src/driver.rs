//! The functions of libcuda that candle and this crate call, and of cuBLAS and cuRAND those that make the
//! handles which each candle device has.
//!
//! Everything is done when it is asked for, so that streams and events have nothing to order.

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr::null_mut;

use crate::calls::{Call, add, count};
use crate::candle;
use crate::copies::Map;
use crate::graphs;
use crate::grid::{Launch, Param};
use crate::memory::{Memory, allocate, forget_most, free, used};
use crate::program::Program;

/// `CUresult`, and those of cuBLAS and cuRAND, whose 0 means the same.
pub type Status = c_int;

pub const SUCCESS: Status = 0;
pub const INVALID: Status = 1;
const NO_SUCH_DEVICE: Status = 101;
const NOT_FOUND: Status = 500;
const LAUNCH_FAILED: Status = 719;
pub const NOT_SUPPORTED: Status = 801;
const CUBLAS_NOT_SUPPORTED: Status = 15;

/// Any handle that is never looked into.
const HANDLE: *mut c_void = 16 as *mut c_void;

/// A text, as `cuModuleLoadData` got it.
struct Module {
    text: String,
}

/// What `CUfunction` points to. Never freed: a process has few.
enum Function {
    Ours(Program),
    Candles(String),
}

/// Functions that have nothing to do.
macro_rules! nothing {
    ($($name:ident)*) => {
        $(#[unsafe(no_mangle)] pub extern "C" fn $name() -> Status { SUCCESS })*
    };
}

/// Functions that there are not.
macro_rules! missing {
    ($status:ident: $($name:ident)*) => {
        $(#[unsafe(no_mangle)] pub extern "C" fn $name() -> Status {
            eprintln!("emulator: no {}", stringify!($name));
            $status
        })*
    };
}

/// Functions that make a handle.
macro_rules! handles {
    ($($name:ident)*) => {
        $(
            /// # Safety
            /// The caller's pointer can be written to.
            #[unsafe(no_mangle)]
            pub unsafe extern "C" fn $name(handle: *mut *mut c_void) -> Status {
                // SAFETY: the caller's promise.
                unsafe { handle.write(HANDLE) };
                SUCCESS
            }
        )*
    };
}

nothing! {
    cuInit cuCtxSetCurrent cuCtxSynchronize cuCtxDestroy_v2 cuDevicePrimaryCtxRelease_v2 cuEventDestroy_v2
    cuEventRecord cuFuncSetAttribute cuModuleUnload cuStreamDestroy_v2 cuStreamSynchronize cuStreamWaitEvent
    cublasDestroy_v2 cublasSetStream_v2 curandDestroyGenerator curandSetStream
    curandSetPseudoRandomGeneratorSeed
}
missing! {
    NOT_SUPPORTED:
    cuLinkAddData_v2 cuLinkComplete cuLinkCreate_v2 cuLinkDestroy cuMemcpyPeerAsync cuModuleLoad
    curandGenerateNormal curandGenerateNormalDouble
}
missing! { CUBLAS_NOT_SUPPORTED: cublasDgemmStridedBatched cublasGemmStridedBatchedEx }
handles! {
    cuCtxGetCurrent cuDevicePrimaryCtxRetain cuEventCreate cuStreamCreate cublasCreate_v2
    curandCreateGenerator
}

/// # Safety
/// As for the driver's, of whose pointers this and the following functions make the same use.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGet(device: *mut c_int, ordinal: c_int) -> Status {
    // SAFETY: the caller's promise.
    unsafe { device.write(ordinal) };
    if ordinal == 0 { SUCCESS } else { NO_SUCH_DEVICE }
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetName(name: *mut c_char, len: c_int, _: c_int) -> Status {
    let text = c"emulator";
    assert!(len as usize > text.count_bytes());
    // SAFETY: it fits, zero included.
    unsafe { name.copy_from(text.as_ptr(), text.count_bytes() + 1) };
    SUCCESS
}

/// Those of an H200, with `EMULATOR_MULTIPROCESSORS` multiprocessors if that is set: with a few, blocks stay
/// for several tiles also of small problems.
///
/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetAttribute(value: *mut c_int, what: c_int, _: c_int) -> Status {
    const MULTIPROCESSORS: c_int = 16;
    const MAJOR: c_int = 75;
    const MINOR: c_int = 76;
    const SHARED_PER_BLOCK: c_int = 97;
    let found = match what {
        MULTIPROCESSORS => {
            let asked = std::env::var("EMULATOR_MULTIPROCESSORS").ok();
            asked.and_then(|n| n.parse().ok()).unwrap_or(132)
        }
        MAJOR => 9,
        MINOR => 0,
        SHARED_PER_BLOCK => 232_448,
        _ => 1,
    };
    // SAFETY: the caller's promise.
    unsafe { value.write(found) };
    SUCCESS
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceTotalMem_v2(bytes: *mut usize, _: c_int) -> Status {
    // SAFETY: the caller's promise.
    unsafe { bytes.write(1 << 33) };
    SUCCESS
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDriverGetVersion(version: *mut c_int) -> Status {
    // SAFETY: the caller's promise.
    unsafe { version.write(13_000) };
    SUCCESS
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGetErrorString(status: Status, text: *mut *const c_char) -> Status {
    let said = match status {
        SUCCESS => c"no error",
        INVALID => c"invalid argument",
        NO_SUCH_DEVICE => c"invalid device ordinal: the emulator is one GPU",
        NOT_FOUND => c"named symbol not found",
        LAUNCH_FAILED => c"unspecified launch failure: stderr has the emulator's words",
        NOT_SUPPORTED => c"not supported by the emulator",
        _ => c"unrecognized error",
    };
    // SAFETY: the caller's promise.
    unsafe { text.write(said.as_ptr()) };
    SUCCESS
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAlloc_v2(at: *mut u64, bytes: usize) -> Status {
    if bytes == 0 {
        return INVALID;
    }
    // SAFETY: the caller's promise.
    unsafe { cuMemAllocAsync(at, bytes, null_mut()) }
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemAllocAsync(at: *mut u64, bytes: usize, _: *mut c_void) -> Status {
    count(Call::Allocation);
    // SAFETY: the caller's promise.
    unsafe { at.write(allocate(bytes)) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFree_v2(at: u64) -> Status {
    free(at);
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemFreeAsync(at: u64, _: *mut c_void) -> Status {
    cuMemFree_v2(at)
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut *mut c_void, _: c_int) -> Status {
    // SAFETY: the caller's promise.
    unsafe { pool.write(HANDLE) };
    SUCCESS
}

const USED_MEM_CURRENT: c_int = 7;
const USED_MEM_HIGH: c_int = 8;

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuMemPoolGetAttribute(
    _: *mut c_void,
    what: c_int,
    value: *mut u64,
) -> Status {
    let [now, most] = used();
    let bytes = match what {
        USED_MEM_CURRENT => now,
        USED_MEM_HIGH => most,
        _ => return NOT_SUPPORTED,
    };
    // SAFETY: the caller's promise.
    unsafe { value.write(bytes as u64) };
    SUCCESS
}

/// The one attribute that can be set here begins anew, whatever the value.
#[unsafe(no_mangle)]
pub extern "C" fn cuMemPoolSetAttribute(_: *mut c_void, what: c_int, _: *const u64) -> Status {
    match what {
        USED_MEM_HIGH => forget_most(),
        _ => return NOT_SUPPORTED,
    }
    SUCCESS
}

/// Copies between addresses of which those of the GPU were checked.
fn copy(from: u64, to: u64, bytes: usize) -> Status {
    count(Call::Copy);
    // SAFETY: memory of the GPU is the host's; it was checked, and the caller promises his own.
    unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyHtoDAsync_v2(to: u64, from: u64, bytes: usize, _: *mut c_void) -> Status {
    Memory::now().check(to, bytes);
    copy(from, to, bytes)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoHAsync_v2(to: u64, from: u64, bytes: usize, _: *mut c_void) -> Status {
    add(Call::ByteToHost, bytes);
    Memory::now().check(from, bytes);
    copy(from, to, bytes)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, _: *mut c_void) -> Status {
    let memory = Memory::now();
    memory.check(from, bytes);
    memory.check(to, bytes);
    copy(from, to, bytes)
}

#[unsafe(no_mangle)]
pub extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, _: *mut c_void) -> Status {
    count(Call::Copy);
    Memory::now().check(to, bytes);
    // SAFETY: just checked.
    unsafe { (to as *mut u8).write_bytes(value, bytes) };
    SUCCESS
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadData(
    module: *mut *mut c_void,
    image: *const c_char,
) -> Status {
    // SAFETY: PTX ends with a zero byte, and nobody here has cubins.
    let text = unsafe { CStr::from_ptr(image) }.to_string_lossy().into_owned();
    // SAFETY: the caller's promise.
    unsafe { module.write(Box::into_raw(Box::new(Module { text })).cast()) };
    SUCCESS
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleLoadDataEx(
    module: *mut *mut c_void,
    image: *const c_char,
    _: c_uint,
    _: *mut c_void,
    _: *mut *mut c_void,
) -> Status {
    // SAFETY: the caller's promise.
    unsafe { cuModuleLoadData(module, image) }
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuModuleGetFunction(
    function: *mut *mut c_void,
    module: *const c_void,
    name: *const c_char,
) -> Status {
    // SAFETY: modules are never freed, and a name ends with a zero byte.
    let (module, name) = unsafe { (&*module.cast::<Module>(), CStr::from_ptr(name)) };
    let name = name.to_string_lossy();
    let found = match module.text.contains("NVIDIA NVVM") {
        true => Function::Candles(name.into_owned()),
        false => {
            let program = Program::read(&module.text);
            if program.entry != name {
                return NOT_FOUND;
            }
            Function::Ours(program)
        }
    };
    // SAFETY: the caller's promise.
    unsafe { function.write(Box::into_raw(Box::new(found)).cast()) };
    SUCCESS
}

/// As `CUlaunchConfig` begins.
#[derive(Clone, Copy)]
#[repr(C)]
pub struct Config {
    grid: [c_uint; 3],
    threads: [c_uint; 3],
    shared: c_uint,
}

/// A launch of one of our kernels, with its arguments.
#[derive(Clone)]
pub struct Prepared {
    pub function: *const c_void,
    program: &'static Program,
    params: Vec<Param>,
    config: Config,
}

impl Prepared {
    /// `None` for one of candle's.
    ///
    /// # Safety
    /// The function was loaded here, and the parameters are as many as it has, each of its size.
    pub unsafe fn new(
        function: *const c_void,
        config: &Config,
        params: *const *const c_void,
    ) -> Option<Self> {
        // SAFETY: functions are never freed.
        let Function::Ours(program) = (unsafe { &*function.cast::<Function>() }) else {
            return None;
        };
        let param = |(i, &bytes): (usize, &usize)| {
            let mut param = Param([0; 128]);
            // SAFETY: the caller's promise.
            unsafe { (*params.add(i)).cast::<u8>().copy_to(param.0.as_mut_ptr(), bytes) };
            param
        };
        let params = program.params.iter().enumerate().map(param).collect();
        Some(Self { function, program, params, config: *config })
    }

    pub fn run(&self) -> Status {
        let Self { program, ref params, config, .. } = *self;
        let launch = Launch {
            program,
            params: params.clone(),
            memory: Memory::now(),
            grid: config.grid,
            threads: config.threads[0],
            shared: config.shared,
        };
        match launch.run() {
            Ok(()) => SUCCESS,
            Err(what) => {
                eprintln!("emulator: {}: {what}", program.entry);
                LAUNCH_FAILED
            }
        }
    }
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernelEx(
    config: *const Config,
    function: *const c_void,
    params: *const *const c_void,
    _: *mut *mut c_void,
) -> Status {
    // SAFETY: the configuration, the function and its parameters are the caller's promise.
    let prepare = || unsafe { Prepared::new(function, &*config, params) };
    if let Some(status) = graphs::captured(prepare) {
        return status;
    }
    count(Call::Launch);
    if let Some(prepared) = prepare() {
        return prepared.run();
    }
    // SAFETY: functions are never freed.
    let Function::Candles(name) = (unsafe { &*function.cast::<Function>() }) else {
        unreachable!("the others were prepared")
    };
    if (candle::Call { name, params, memory: Memory::now() }).run() {
        return SUCCESS;
    }
    eprintln!("emulator: candle's kernel {name} is not in tests/emulator/src/candle.rs");
    NOT_SUPPORTED
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuLaunchKernel(
    function: *const c_void,
    grid_x: c_uint,
    grid_y: c_uint,
    grid_z: c_uint,
    threads_x: c_uint,
    threads_y: c_uint,
    threads_z: c_uint,
    shared: c_uint,
    _: *mut c_void,
    params: *const *const c_void,
    _: *mut *mut c_void,
) -> Status {
    let grid = [grid_x, grid_y, grid_z];
    let config = Config { grid, threads: [threads_x, threads_y, threads_z], shared };
    // SAFETY: the caller's promise.
    unsafe { cuLaunchKernelEx(&config, function, params, null_mut()) }
}

/// # Safety
/// See [`cuDeviceGet`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuTensorMapEncodeTiled(
    map: *mut Map,
    element: c_uint,
    rank: c_uint,
    address: u64,
    dims: *const u64,
    strides: *const u64,
    boxed: *const u32,
    _: *const u32,
    _: c_uint,
    swizzle: c_uint,
    _: c_uint,
    _: c_uint,
) -> Status {
    const SWIZZLE_64: c_uint = 2;
    const SWIZZLE_128: c_uint = 3;
    const U8: c_uint = 0;
    const F16: c_uint = 6;
    const F32: c_uint = 7;
    const BF16: c_uint = 9;
    let size = match element {
        U8 => 1,
        F16 | BF16 => 2,
        F32 => 4,
        _ => return INVALID,
    };
    let line = match swizzle {
        SWIZZLE_64 => 64,
        SWIZZLE_128 => 128,
        _ => return INVALID,
    };
    let rank = rank as usize;
    let mut encoded = Map {
        mark: Map::MARK,
        base: address,
        dims: [1; 5],
        strides: [0; 4],
        boxed: [1; 5],
        rank: rank as u8,
        size,
        line,
    };
    // SAFETY: the arrays have as many entries as the rank says.
    unsafe {
        encoded.dims[..rank].copy_from_slice(std::slice::from_raw_parts(dims, rank));
        encoded.strides[..rank - 1].copy_from_slice(std::slice::from_raw_parts(strides, rank - 1));
        encoded.boxed[..rank].copy_from_slice(std::slice::from_raw_parts(boxed, rank));
    }
    // What the driver refuses.
    let aligned =
        address.is_multiple_of(16) && encoded.strides.iter().all(|s| s.is_multiple_of(16));
    let sizes = encoded.dims.iter().all(|&len| (1..=1 << 32).contains(&len));
    let boxes = encoded.boxed.iter().all(|len| (1..=256).contains(len));
    if !(aligned && sizes && boxes) {
        return INVALID;
    }
    // SAFETY: the caller's promise; it is no longer than a `CUtensorMap`.
    unsafe { map.write(encoded) };
    SUCCESS
}

const _: () = assert!(size_of::<Map>() <= 128);
