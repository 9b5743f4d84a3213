//! Kernels that are launched one after another, submitted as one CUDA graph.
//!
//! On an H200 (driver 580) the launch of a kernel takes the host 3.6 µs and that of a graph of three kernels 3.3, new
//! arguments included; the GPU begins with a graph 1 µs later. So three kernels are worth one, and two where they are short.
//! The first call builds a graph of its kernels; later ones, whatever their arguments and grids, change these and launch it.
//! A graph's kernels start as early after each other as they do without one.
//!
//! Kernels are launched one by one where a stream is captured (they become part of that graph), where another thread is
//! about to launch the same ones, if the driver does not do what is asked for here, and with `KAIO_GRAPHS=0`.
#![allow(unsafe_code)]

use std::convert::Infallible;
use std::sync::{Arc, OnceLock};
use std::thread::{self, ThreadId};

use candle_core::CudaDevice;
use cudarc::driver::{CudaContext, CudaStream, DriverError, sys};
use parking_lot::Mutex;

use super::cache::PerGpu;
use super::launches::Launch;
use super::raw::{self, Handle};
use crate::error::{Error, Result};

/// The most kernels of a chain.
const MOST: usize = 4;

/// For how many streams each chain keeps a graph: launches of one graph wait for each other, whatever their streams.
const STREAMS: usize = 16;

/// Of so many launches on further streams one replaces a graph: streams come and go, but to make one takes longer than many
/// launches.
const PATIENCE: usize = 64;

/// Kernels in their order; the last one is repeated for those that are not there.
type Kernels = [Handle; MOST];

/// The graphs of a chain.
#[derive(Default)]
struct Chain(Mutex<Graphs>);

#[derive(Default)]
struct Graphs {
    /// With the streams that they are launched on, the oldest first; `None` where the driver made none.
    all: Vec<(Lane, Option<Graph>)>,
    /// Launches on other streams while there was no room.
    others: usize,
}

impl Graphs {
    /// Room for one more, if there is to be one.
    fn make_room(&mut self) -> bool {
        if self.all.len() < STREAMS {
            return true;
        }
        self.others += 1;
        let replaces = self.others.is_multiple_of(PATIENCE);
        if replaces {
            self.all.remove(0);
        }
        replaces
    }
}

/// A stream. The default one of threads is another one in each.
#[derive(Clone, Copy, PartialEq, Eq)]
struct Lane(usize, ThreadId);

static CHAINS: PerGpu<(usize, Kernels), Chain> = PerGpu::new();

/// Submits kernels, which take the GPU less time than the host if they are `short`, to the device's stream in their order, if a
/// graph of them is worth it and to be had; else gives `false`. What the launch of one of them would refuse is an error here as
/// well.
///
/// # Safety
///
/// That of [`Function::launch`](super::function::Function::launch), for each.
pub unsafe fn submit(
    op: &'static str,
    device: &CudaDevice,
    launches: &[Launch],
    short: bool,
) -> Result<bool> {
    let fewest = if short { 2 } else { 3 };
    let [first, .., last] = launches else { return Ok(false) };
    let nothing = launches.iter().any(|launch| launch.grid.contains(&0));
    if !(fewest..=MOST).contains(&launches.len()) || nothing || !allowed() {
        return Ok(false);
    }
    let driver = |e: DriverError| Error::Driver { op, message: e.to_string() };
    let stream = device.cuda_stream();
    let ordinal = stream.context().ordinal();
    for Launch { function, grid, args } in launches {
        function.check(op, ordinal, *grid, args)?;
    }
    stream.context().bind_to_thread().map_err(driver)?;
    // What cannot be asked is a stream that another capture forbids.
    const FREE: sys::CUstreamCaptureStatus =
        sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE;
    if stream.capture_status().ok() != Some(FREE) {
        return Ok(false);
    }
    let mut kernels = [last.function.handle(); MOST];
    let handles = launches.iter().map(|launch| launch.function.handle());
    kernels.iter_mut().zip(handles).for_each(|(kernel, handle)| *kernel = handle);
    let make = || Ok::<_, Infallible>(Chain::default());
    let Ok(chain) = CHAINS.get(ordinal, &(launches.len(), kernels), make);
    let Some(mut graphs) = chain.0.try_lock() else { return Ok(false) };
    let lane = Lane(stream.cu_stream() as usize, thread::current().id());
    let at = match graphs.all.iter().position(|(of, _)| *of == lane) {
        Some(at) => at,
        None if !graphs.make_room() => return Ok(false),
        None => {
            // SAFETY: the arguments were compared with the parameters.
            let graph = unsafe { Graph::new(first.function.context(), launches) };
            graphs.all.push((lane, graph.ok().flatten()));
            graphs.all.len() - 1
        }
    };
    let Some(graph) = &graphs.all[at].1 else { return Ok(false) };
    // SAFETY: the caller's promise.
    let launched = unsafe { graph.launch(&stream, launches) };
    if launched.is_err() {
        // Each launch by itself says what is wrong.
        graphs.all[at].1 = None;
    }
    Ok(launched.is_ok())
}

/// Whether `KAIO_GRAPHS` leaves it to this crate.
fn allowed() -> bool {
    static ALLOWED: OnceLock<bool> = OnceLock::new();
    *ALLOWED.get_or_init(|| std::env::var_os("KAIO_GRAPHS").is_none_or(|value| value != "0"))
}

/// A graph of kernels that follow each other, ready to be launched.
struct Graph {
    executable: sys::CUgraphExec,
    graph: sys::CUgraph,
    /// In the order of the launches.
    nodes: Vec<sys::CUgraphNode>,
    /// Keeps what it belongs to.
    context: Arc<CudaContext>,
}

// SAFETY: it belongs to a context, not to a thread, and whoever uses it has the lock around it.
unsafe impl Send for Graph {}

impl Graph {
    /// From a capture of the launches, on a stream that does nothing else; `None` if its kernels cannot be told apart. The
    /// context is current.
    ///
    /// # Safety
    ///
    /// Each launch's arguments are those of its kernel's parameters.
    unsafe fn new(
        context: &Arc<CudaContext>,
        launches: &[Launch],
    ) -> std::result::Result<Option<Self>, DriverError> {
        // Captures of other threads forbid some calls to all threads that do not say that they know what they do.
        let _mode = raw::Relaxed::begin()?;
        let graph = raw::capture(|stream| {
            launches.iter().try_for_each(|Launch { function, grid, args }| {
                // SAFETY: the caller's promise; nothing runs.
                unsafe { function.enqueue(stream, *grid, args) }
            })
        })?;
        let mut made = Self {
            executable: std::ptr::null_mut(),
            graph,
            nodes: vec![],
            context: context.clone(),
        };
        // SAFETY: the graph was just made.
        let nodes = unsafe { raw::kernel_nodes(graph)? };
        for Launch { function, .. } in launches {
            let mut own = nodes.iter().filter(|(_, kernel)| *kernel == function.handle());
            let (Some(&(node, _)), None) = (own.next(), own.next()) else { return Ok(None) };
            made.nodes.push(node);
        }
        if nodes.len() != launches.len() {
            return Ok(None);
        }
        // SAFETY: as above.
        unsafe { sys::cuGraphInstantiateWithFlags(&mut made.executable, graph, 0) }.result()?;
        Ok(Some(made))
    }

    /// With these launches' arguments and grids.
    ///
    /// # Safety
    ///
    /// That of [`submit`].
    unsafe fn launch(
        &self,
        stream: &CudaStream,
        launches: &[Launch],
    ) -> std::result::Result<(), DriverError> {
        for (&node, Launch { function, grid, args }) in self.nodes.iter().zip(launches) {
            // SAFETY: the node is the graph's, and of this kernel, whose parameters these are.
            unsafe { function.renew(self.executable, node, *grid, args)? };
        }
        // SAFETY: the stream is of the context that the graph was made in, which is current.
        unsafe { sys::cuGraphLaunch(self.executable, stream.cu_stream()) }.result()
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        let _mode = raw::Relaxed::begin();
        // A failure leaves something behind, which is all that could be said of it.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: nobody uses them any more; the driver waits with what still runs.
            unsafe {
                if !self.executable.is_null() {
                    let _ = sys::cuGraphExecDestroy(self.executable);
                }
                let _ = sys::cuGraphDestroy(self.graph);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_streams_do_not_make_graphs_all_the_time() {
        let mut graphs = Graphs::default();
        let lane = |stream| Lane(stream, thread::current().id());
        let mut made = 0;
        for stream in 0..STREAMS + 3 * PATIENCE {
            if graphs.make_room() {
                graphs.all.push((lane(stream), None));
                made += 1;
            }
        }
        assert_eq!((made, graphs.all.len()), (STREAMS + 3, STREAMS));
        // The oldest went.
        assert!(graphs.all[0].0 == lane(3));
    }
}
