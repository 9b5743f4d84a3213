//! Graphs of kernels: what a thread launches while it captures, to be done when the graph is launched.

use std::cell::RefCell;
use std::ffi::{c_int, c_uint, c_void};

use crate::calls::{Call, count};
use crate::driver::{Config, INVALID, NOT_SUPPORTED, Prepared, SUCCESS, Status};

/// What `CUgraph` and `CUgraphExec` point to. The kernels of the latter are those of the graph, with arguments of their own.
#[derive(Default)]
struct Graph {
    /// Handles of nodes point to those of a graph, to which none are added once it was captured.
    kernels: Vec<Prepared>,
    /// The handles by which a graph that can be launched knows its own.
    names: Vec<*const Prepared>,
}

thread_local! {
    static CAPTURE: RefCell<Option<Graph>> = const { RefCell::new(None) };
}

/// Whether a launch becomes part of a graph instead of being done.
pub fn captured(prepared: impl FnOnce() -> Option<Prepared>) -> Option<Status> {
    CAPTURE.with_borrow_mut(|capture| {
        let graph = capture.as_mut()?;
        // Those of candle are not looked into.
        let Some(prepared) = prepared() else { return Some(NOT_SUPPORTED) };
        graph.kernels.push(prepared);
        Some(SUCCESS)
    })
}

/// # Safety
/// The caller's pointers are what the driver's function takes, here and below.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamIsCapturing(_: *mut c_void, status: *mut c_int) -> Status {
    let capturing = CAPTURE.with_borrow(Option::is_some);
    // SAFETY: the caller's promise.
    unsafe { status.write(capturing.into()) };
    SUCCESS
}

#[unsafe(no_mangle)]
pub extern "C" fn cuStreamBeginCapture_v2(_: *mut c_void, _: c_uint) -> Status {
    CAPTURE.set(Some(Graph::default()));
    SUCCESS
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuStreamEndCapture(_: *mut c_void, graph: *mut *mut c_void) -> Status {
    let Some(captured) = CAPTURE.take() else { return INVALID };
    // SAFETY: the caller's promise.
    unsafe { graph.write(Box::into_raw(Box::new(captured)).cast()) };
    SUCCESS
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphGetNodes(
    graph: *const c_void,
    nodes: *mut *const c_void,
    count: *mut usize,
) -> Status {
    // SAFETY: the graph is one of ours; there is room for as many nodes as the caller says.
    unsafe {
        let graph = &*graph.cast::<Graph>();
        if !nodes.is_null() {
            let room = std::slice::from_raw_parts_mut(nodes, *count);
            let all = graph.kernels.iter().map(|kernel| (&raw const *kernel).cast::<c_void>());
            room.iter_mut().zip(all).for_each(|(place, node)| *place = node);
        }
        *count = graph.kernels.len();
    }
    SUCCESS
}

/// As `CUDA_KERNEL_NODE_PARAMS_v2` begins.
#[repr(C)]
pub struct Params {
    function: *const c_void,
    config: Config,
    params: *const *const c_void,
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphKernelNodeGetParams_v2(
    node: *const c_void,
    params: *mut Params,
) -> Status {
    // SAFETY: nodes live as long as their graph.
    unsafe { (*params).function = (*node.cast::<Prepared>()).function };
    SUCCESS
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut *mut c_void,
    graph: *const c_void,
    _: u64,
) -> Status {
    // SAFETY: as above.
    let graph = unsafe { &*graph.cast::<Graph>() };
    let made = Graph {
        kernels: graph.kernels.clone(),
        names: graph.kernels.iter().map(|kernel| &raw const *kernel).collect(),
    };
    // SAFETY: the caller's promise.
    unsafe { executable.write(Box::into_raw(Box::new(made)).cast()) };
    SUCCESS
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecKernelNodeSetParams_v2(
    executable: *mut c_void,
    node: *const c_void,
    params: *const Params,
) -> Status {
    // SAFETY: the caller's promise.
    let (graph, params) = unsafe { (&mut *executable.cast::<Graph>(), &*params) };
    let Some(at) = graph.names.iter().position(|name| name.cast() == node) else { return INVALID };
    // SAFETY: the parameters are those of the function.
    match unsafe { Prepared::new(params.function, &params.config, params.params) } {
        Some(prepared) => graph.kernels[at] = prepared,
        None => return NOT_SUPPORTED,
    }
    SUCCESS
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphLaunch(executable: *const c_void, _: *mut c_void) -> Status {
    count(Call::Launch);
    // SAFETY: it is one of ours.
    let graph = unsafe { &*executable.cast::<Graph>() };
    let failed = graph.kernels.iter().map(Prepared::run).find(|&status| status != SUCCESS);
    failed.unwrap_or(SUCCESS)
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphDestroy(graph: *mut c_void) -> Status {
    // SAFETY: it was made by a box, and the caller does not use it again.
    drop(unsafe { Box::from_raw(graph.cast::<Graph>()) });
    SUCCESS
}

/// # Safety
/// See [`cuStreamIsCapturing`].
#[unsafe(no_mangle)]
pub unsafe extern "C" fn cuGraphExecDestroy(executable: *mut c_void) -> Status {
    // SAFETY: as above.
    unsafe { cuGraphDestroy(executable) }
}

/// All modes are alike here.
#[unsafe(no_mangle)]
pub extern "C" fn cuThreadExchangeStreamCaptureMode(_: *mut c_int) -> Status {
    SUCCESS
}
