//! The driver's functions that cudarc has no safe form of, as safe ones where they can be.
#![allow(unsafe_code)]

use std::ffi::{CStr, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;
use std::{ptr, slice};

use cudarc::driver::sys::{
    self, CUfunction_attribute as Attribute, CUjit_option as Option_, CUresult,
    CUtensorMapDataType, CUtensorMapFloatOOBfill, CUtensorMapInterleave, CUtensorMapL2promotion,
    CUtensorMapSwizzle,
};
use cudarc::driver::{CudaContext, CudaStream, DriverError};

use crate::ptx::Source;

/// Blocks of a cluster that every GPU with clusters runs.
const PORTABLE_CLUSTER: u32 = 8;

pub fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: writes one integer.
    unsafe { sys::cuDriverGetVersion(&mut version) };
    version
}

/// A loaded module. It is never unloaded.
pub struct Module(sys::CUmodule);

/// A kernel of a loaded module. It means something while the module's context lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Handle(sys::CUfunction);

// SAFETY: it belongs to a context, not to a thread, and its module is never unloaded.
unsafe impl Send for Handle {}
// SAFETY: as above; launching from several threads at once is what the driver is made for.
unsafe impl Sync for Handle {}

/// The driver's answer, and what its assembler says: `: ` and lines, or nothing.
pub struct Refusal {
    pub result: CUresult,
    pub log: String,
}

pub type Attempt<T> = std::result::Result<T, Refusal>;

fn accepted(result: CUresult, log: Option<&Log>) -> Attempt<()> {
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

/// Loads PTX (with its final zero byte) or a whole cubin into the current context.
pub fn load_image(image: &[u8]) -> Attempt<Module> {
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
    accepted(result, Some(&log)).map(|()| Module(module))
}

/// PTX to a cubin for the current context's GPU.
pub fn assemble(text: &CStr) -> Attempt<Vec<u8>> {
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
unsafe fn link(state: sys::CUlinkState, text: &CStr) -> std::result::Result<Vec<u8>, CUresult> {
    let checked = |result| match result {
        CUresult::CUDA_SUCCESS => Ok(()),
        other => Err(other),
    };
    let bytes = text.to_bytes_with_nul();
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
pub fn function(source: &Source, name: &CStr, module: Module) -> Attempt<Handle> {
    let mut raw = ptr::null_mut();
    // SAFETY: the module was loaded into the current context and is never unloaded.
    accepted(unsafe { sys::cuModuleGetFunction(&mut raw, module.0, name.as_ptr()) }, None)?;
    let allow = |attribute, value| {
        // SAFETY: the function was just looked up.
        accepted(unsafe { sys::cuFuncSetAttribute(raw, attribute, value) }, None)
    };
    // At most what a block can have: far inside i32.
    allow(Attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, source.shared as i32)?;
    if source.cluster > PORTABLE_CLUSTER {
        allow(Attribute::CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1)?;
    }
    Ok(Handle(raw))
}

/// Submits a kernel, whose parameters are `pointers`.
///
/// # Safety
///
/// The kernel's context lives, and is current; the pointers are as many as its parameters, each to an
/// argument of its size; and the kernel, with these, touches only memory that it may.
pub unsafe fn launch(
    kernel: Handle,
    config: &sys::CUlaunchConfig,
    pointers: &mut [*mut c_void],
) -> Result<(), DriverError> {
    // SAFETY: the caller's promise. The driver copies the arguments before it returns.
    let result =
        unsafe { sys::cuLaunchKernelEx(config, kernel.0, pointers.as_mut_ptr(), ptr::null_mut()) };
    result.result()
}

/// Changes a node's blocks `grid`, its threads and shared bytes `block`, and its parameters, for later launches.
///
/// # Safety
///
/// The node is one of the kernel in the graph; and for these launches that of [`launch`].
pub unsafe fn renew(
    graph: sys::CUgraphExec,
    node: sys::CUgraphNode,
    kernel: Handle,
    grid: [u32; 3],
    [threads, shared]: [u32; 2],
    pointers: &mut [*mut c_void],
) -> Result<(), DriverError> {
    let params = sys::CUDA_KERNEL_NODE_PARAMS {
        func: kernel.0,
        gridDimX: grid[0],
        gridDimY: grid[1],
        gridDimZ: grid[2],
        blockDimX: threads,
        blockDimY: 1,
        blockDimZ: 1,
        sharedMemBytes: shared,
        kernelParams: pointers.as_mut_ptr(),
        extra: ptr::null_mut(),
        kern: ptr::null_mut(),
        ctx: ptr::null_mut(),
    };
    // SAFETY: the caller's promise. The driver copies the arguments before it returns.
    unsafe { sys::cuGraphExecKernelNodeSetParams_v2(graph, node, &params) }.result()
}

/// This thread's captures forbid nothing to others, nor theirs to it, while this lives.
pub struct Relaxed(sys::CUstreamCaptureMode);

impl Relaxed {
    pub fn begin() -> Result<Self, DriverError> {
        let mut mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED;
        // SAFETY: exchanges one number.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut mode) }.result()?;
        Ok(Self(mode))
    }
}

impl Drop for Relaxed {
    fn drop(&mut self) {
        // SAFETY: as above.
        unsafe { sys::cuThreadExchangeStreamCaptureMode(&mut self.0) };
    }
}

/// The graph of what is submitted to a stream, which is not done. Whoever asks destroys it.
pub fn capture(
    submit: impl FnOnce(sys::CUstream) -> Result<(), DriverError>,
) -> Result<sys::CUgraph, DriverError> {
    let (mut stream, mut graph) = (ptr::null_mut(), ptr::null_mut());
    let (mode, flags) = (
        sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_RELAXED,
        sys::CUstream_flags::CU_STREAM_NON_BLOCKING,
    );
    // SAFETY: writes one handle.
    unsafe { sys::cuStreamCreate(&mut stream, flags as u32) }.result()?;
    // SAFETY: the stream was just made, and is captured by nobody else.
    let mut captured = unsafe { sys::cuStreamBeginCapture_v2(stream, mode) }.result();
    if captured.is_ok() {
        let submitted = submit(stream);
        // SAFETY: writes one handle, of nothing after a failure.
        captured = submitted.and(unsafe { sys::cuStreamEndCapture(stream, &mut graph) }.result());
    }
    // SAFETY: it is not used again.
    unsafe { sys::cuStreamDestroy_v2(stream) };
    if captured.is_err() && !graph.is_null() {
        // SAFETY: nobody else has it.
        unsafe { sys::cuGraphDestroy(graph) };
    }
    captured.map(|()| graph)
}

/// The nodes of a graph of kernels, with the kernels.
///
/// # Safety
///
/// The graph was not destroyed.
pub unsafe fn kernel_nodes(
    graph: sys::CUgraph,
) -> Result<Vec<(sys::CUgraphNode, Handle)>, DriverError> {
    let mut count = 0;
    // SAFETY: the caller's promise; asks how many there are.
    unsafe { sys::cuGraphGetNodes(graph, ptr::null_mut(), &mut count) }.result()?;
    let mut nodes = vec![ptr::null_mut(); count];
    // SAFETY: there is room for as many.
    unsafe { sys::cuGraphGetNodes(graph, nodes.as_mut_ptr(), &mut count) }.result()?;
    let kernel = |node| {
        let mut params = MaybeUninit::uninit();
        // SAFETY: the node is the graph's; all of the parameters are written if the driver reports success.
        let params = unsafe {
            sys::cuGraphKernelNodeGetParams_v2(node, params.as_mut_ptr()).result()?;
            params.assume_init()
        };
        Ok((node, Handle(params.func)))
    };
    nodes.into_iter().map(kernel).collect()
}

/// A descriptor; see [`TensorMap::new`](super::tensor_map::TensorMap::new). `strides` are one less than
/// `dims`, `boxed` as many, at most 5.
pub fn tensor_map(
    element: CUtensorMapDataType,
    swizzle: CUtensorMapSwizzle,
    address: u64,
    dims: &[u64],
    strides: &[u64],
    boxed: &[u32],
) -> Result<sys::CUtensorMap, DriverError> {
    let ones = [1u32; 5];
    let rank = dims.len();
    assert!((1..=ones.len()).contains(&rank) && strides.len() + 1 == rank && boxed.len() == rank);
    let mut map = MaybeUninit::uninit();
    // SAFETY: the arrays have as many entries as the rank says; the driver only reads them, and writes
    // the map if it reports success.
    let result = unsafe {
        sys::cuTensorMapEncodeTiled(
            map.as_mut_ptr(),
            element,
            rank as u32, // at most 5
            address as *mut c_void,
            dims.as_ptr(),
            strides.as_ptr(),
            boxed.as_ptr(),
            ones.as_ptr(),
            CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
            swizzle,
            // H200, 2026-11-23, weights from memory: 256 B is 4 % slower (248 against 239 µs for
            // 128256×4096 at M = 1), none and 64 B are the same.
            CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
            CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    };
    result.result()?;
    // SAFETY: the driver reported success.
    Ok(unsafe { map.assume_init() })
}

/// The default stream of a context of its own, which tracks no events, on a GPU's primary context.
pub fn untracked_stream(ordinal: usize) -> Result<Arc<CudaStream>, DriverError> {
    let context = CudaContext::new(ordinal)?;
    // SAFETY: this context allocates nothing. Only views are made on its stream, and each session
    // orders their uses by its own fences.
    unsafe { context.disable_event_tracking() };
    Ok(context.default_stream())
}
