//! A compiled kernel, and its launch.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::CudaDevice;
use cudarc::driver::{CudaContext, DriverError, sys};

use super::args::{Args, list};
use super::cache::PerGpu;
use super::gpu::Gpu;
use super::raw::Handle;
use super::{compile, raw};
use crate::error::{Error, Result};
use crate::ptx::{Param, Source};

/// A kernel compiled for one GPU. It is never unloaded.
#[derive(Debug)]
pub struct Function {
    kernel: Handle,
    /// Keeps the GPU's context, without which the kernel is gone.
    context: Arc<CudaContext>,
    entry: &'static str,
    ordinal: usize,
    threads: u32,
    shared: u32,
    cluster: u32,
    starts_early: bool,
    params: Vec<Param>,
}

/// Blocks of a grid in x, y and z, on every GPU.
const MOST_BLOCKS: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];

/// The users' own kernels.
static FUNCTIONS: PerGpu<Source, Function> = PerGpu::new();

impl Function {
    /// Compiles a kernel for a GPU, whose context is current.
    pub(in crate::cuda) fn load(op: &'static str, source: &Source, gpu: &Gpu) -> Result<Self> {
        let &Source { entry, threads, shared, cluster, starts_early, .. } = source;
        Ok(Self {
            kernel: compile::load(op, source, gpu)?,
            context: gpu.context.clone(),
            entry,
            ordinal: gpu.ordinal,
            threads,
            shared,
            cluster,
            starts_early,
            params: source.params.clone(),
        })
    }

    /// The kernel's parameters, in their order.
    pub(in crate::cuda) fn params(&self) -> &[Param] {
        &self.params
    }

    /// The kernel of this text on the device's GPU: compiled by the first call in the process, found
    /// by its text in later ones. Whoever asks for a kernel that is being compiled waits for it; a
    /// failure leaves no trace.
    ///
    /// Finding it takes some microseconds for each 10 kB of text: keep the [`Function`] where that
    /// counts.
    ///
    /// # Errors
    ///
    /// [`Error::Driver`] with the assembler's words; [`Error::Unsupported`] for a GPU under compute
    /// capability 8.0, for a [`Target`](crate::ptx::Target) that the GPU is not, and for more shared
    /// memory than a block can have on it.
    pub fn compile(device: &CudaDevice, source: &Source) -> Result<Arc<Self>> {
        const OP: &str = "Function::compile";
        let gpu = Gpu::of(OP, device)?;
        FUNCTIONS.get(gpu.ordinal, source, || Self::load(OP, source, &gpu))
    }

    /// Submits a grid of `[x, y, z]` blocks to the device's stream, and returns at once. A grid of no
    /// blocks is nothing to do.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] if the arguments are not as many as the kernel's parameters and of their
    /// sizes, if the grid is too large or does not consist of whole clusters, or if the device is on
    /// another GPU; [`Error::Driver`] if the driver refuses.
    ///
    /// # Safety
    ///
    /// The caller promises what the compiler cannot see:
    ///
    /// - Every address that the kernel reads or writes, with these arguments and this grid, lies in
    ///   memory that the arguments were made from ([`Memory`]), inside its [`bytes`](super::memory::Memory::bytes).
    /// - Memory that is written came from [`Memory::of_mut`] or [`Memory::of_slice_mut`].
    /// - Each [`Memory`] lives until this call has returned. (The memory itself may be freed then:
    ///   candle frees in the order of its stream.)
    /// - The parameters' types are those of the arguments: only their sizes are compared.
    /// - Results are fully written before anyone reads them, and hold valid values of their type.
    ///
    /// [`Memory`]: super::memory::Memory
    /// [`Memory::of_mut`]: super::memory::Memory::of_mut
    /// [`Memory::of_slice_mut`]: super::memory::Memory::of_slice_mut
    pub unsafe fn launch(&self, device: &CudaDevice, grid: [u32; 3], args: &Args) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.submit("Function::launch", device, grid, args) }
    }

    /// [`launch`](Self::launch) for a method of the user's.
    ///
    /// # Safety
    ///
    /// That of [`launch`](Self::launch).
    pub(in crate::cuda) unsafe fn submit(
        &self,
        op: &'static str,
        device: &CudaDevice,
        grid: [u32; 3],
        args: &Args,
    ) -> Result<()> {
        let driver = |e: DriverError| Error::Driver {
            op,
            message: format!("{e} at the launch of `{}`", self.entry),
        };
        let stream = device.cuda_stream();
        self.check(op, stream.context().ordinal(), grid, args)?;
        if grid.contains(&0) {
            return Ok(());
        }
        stream.context().bind_to_thread().map_err(driver)?;
        // SAFETY: the arguments were compared with the parameters. What the kernel does is the caller's promise.
        unsafe { self.enqueue(stream.cu_stream(), grid, args) }.map_err(driver)
    }

    /// Submits it to a stream of its context, which is current.
    ///
    /// # Safety
    ///
    /// That of [`launch`](Self::launch); and what [`check`](Self::check) finds was looked for.
    pub(super) unsafe fn enqueue(
        &self,
        stream: sys::CUstream,
        grid: [u32; 3],
        args: &Args,
    ) -> std::result::Result<(), DriverError> {
        let mut early = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: self.threads,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: self.shared,
            hStream: stream,
            attrs: &mut early,
            numAttrs: self.starts_early.into(),
        };
        // SAFETY: the context is kept; the rest is the caller's promise.
        unsafe { raw::launch(self.kernel, &config, &mut args.pointers()) }
    }

    /// Changes the node of a graph that is this kernel.
    ///
    /// # Safety
    ///
    /// That of [`enqueue`](Self::enqueue), for launches of the graph from now on, of which the node is one of this kernel.
    pub(super) unsafe fn renew(
        &self,
        graph: sys::CUgraphExec,
        node: sys::CUgraphNode,
        grid: [u32; 3],
        args: &Args,
    ) -> std::result::Result<(), DriverError> {
        let block = [self.threads, self.shared];
        // SAFETY: the caller's promise.
        unsafe { raw::renew(graph, node, self.kernel, grid, block, &mut args.pointers()) }
    }

    pub(super) fn handle(&self) -> Handle {
        self.kernel
    }

    pub(super) fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    /// What the driver would refuse without saying why, and what it would not notice.
    pub(super) fn check(
        &self,
        op: &'static str,
        ordinal: usize,
        grid: [u32; 3],
        args: &Args,
    ) -> Result<()> {
        let refuse = |name, got, want, fix| Err(Error::Value { op, name, got, want, fix });
        if !args.fit(&self.params) {
            let sizes = list(self.params.iter().map(|param| param.kind.size()));
            let want = format!("{sizes} bytes, the parameters of `{}`", self.entry);
            return refuse(
                "args",
                args.show(),
                want,
                "pass the parameters in their order and types",
            );
        }
        if grid.iter().zip(MOST_BLOCKS).any(|(&blocks, most)| blocks > most) {
            let [x, y, z] = MOST_BLOCKS;
            let want = format!("at most {x} x {y} x {z} blocks");
            return refuse("grid", format!("{grid:?}"), want, "let each block do more");
        }
        if !grid[0].is_multiple_of(self.cluster) {
            let want = format!("a multiple of the {} blocks of a cluster in x", self.cluster);
            return refuse("grid", format!("{grid:?}"), want, "round it up");
        }
        if ordinal != self.ordinal {
            let want = format!("that at ordinal {}, for which it was compiled", self.ordinal);
            let got = format!("the GPU at ordinal {ordinal}");
            return refuse("device", got, want, "compile it for each GPU");
        }
        Ok(())
    }
}
