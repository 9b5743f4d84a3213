//! Kernels of your own on candle's tensors.
//!
//! A kernel is written with [`ptx`](crate::ptx), compiled once for each GPU by
//! [`Function::compile`], and submitted by [`Function::launch`] to the stream on which candle itself
//! works for a device: in order with candle's ops before and after it, without waiting for the GPU,
//! and capturable in a CUDA graph. This crate's own kernels take the same way. What follows builds a
//! small one; `examples/custom_kernel.rs` is a larger one, with a reduction.
//!
//! # 1. The kernel
//!
//! `y = silu(x) · gate` for f32, where candle takes two ops and a tensor between them. Rust code runs
//! and leaves instructions behind: a Rust `for` unrolls, [`Kernel::for_`](crate::ptx::Kernel::for_)
//! loops on the GPU. Threads past the end must do nothing.
//!
//! ```
//! use kaio_candle::ptx::{Kernel, Source, Target};
//!
//! const THREADS: u32 = 256;
//!
//! fn silu_gate() -> Source {
//!     let k = &Kernel::new("silu_gate", Target::Sm80, THREADS);
//!     // The parameters, in the order in which a launch passes them.
//!     let (x, gate, y) = (k.pointer("x"), k.pointer("gate"), k.pointer("y"));
//!     let len = k.param::<u32>("len");
//!     let i = k.block_x() * THREADS + k.thread();
//!     k.if_(i.lt(len), || {
//!         let [x] = k.ld_global_nc::<f32, 1>(x.element(i, 4));
//!         let [gate] = k.ld_global_nc::<f32, 1>(gate.element(i, 4));
//!         let sigmoid = ((x * -std::f32::consts::LOG2_E).exp2() + 1.0).recip();
//!         k.st_global(y.element(i, 4), [x * sigmoid * gate]);
//!     });
//!     k.finish()
//! }
//! let params = silu_gate().params;
//! assert!(params.iter().map(|param| param.name.as_str()).eq(["x", "gate", "y", "len"]));
//! ```
//!
//! [`Target::Sm80`](crate::ptx::Target::Sm80) runs on every GPU that this crate supports.
//! `KAIO_DUMP_PTX=dir` writes the text of each kernel that is compiled to `dir`; `ptxas -v` says what
//! registers it takes.
//!
//! # 2. The op
//!
//! candle gives a `CustomOp1`, `CustomOp2` or `CustomOp3` the storages and layouts of its inputs. The
//! op checks that they are what the kernel takes, allocates the result, and launches.
//!
//! ```no_run
//! # use kaio_candle::ptx::{Kernel, Source, Target};
//! # const THREADS: u32 = 256;
//! # fn silu_gate() -> Source { Kernel::new("silu_gate", Target::Sm80, THREADS).finish() }
//! use candle_core::backend::{BackendDevice, BackendStorage};
//! use candle_core::{CpuStorage, CudaStorage, CustomOp2, DType, Layout, Result, Shape, bail};
//! use kaio_candle::launch::{Args, Function, Memory};
//!
//! struct SiluGate;
//!
//! impl CustomOp2 for SiluGate {
//!     fn name(&self) -> &'static str {
//!         "silu_gate"
//!     }
//!
//! #   #[rustfmt::skip]
//!     fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
//!         bail!("silu_gate runs on a GPU")
//!     }
//!
//!     fn cuda_fwd(
//!         &self,
//!         x: &CudaStorage,
//!         x_layout: &Layout,
//!         gate: &CudaStorage,
//!         gate_layout: &Layout,
//!     ) -> Result<(CudaStorage, Shape)> {
//!         // What the kernel takes, and nothing else. A view may begin anywhere in its storage.
//!         let (Some((x_start, _)), Some((gate_start, _))) =
//!             (x_layout.contiguous_offsets(), gate_layout.contiguous_offsets())
//!         else {
//!             bail!("silu_gate: wanted contiguous tensors")
//!         };
//!         let shape = x_layout.shape();
//!         if [x.dtype(), gate.dtype()] != [DType::F32; 2] || gate_layout.shape() != shape {
//!             bail!("silu_gate: wanted f32 of one shape")
//!         }
//!         let len = u32::try_from(shape.elem_count())?;
//!
//!         let device = x.device();
//!         let function = Function::compile(device, &silu_gate())?;
//!         // SAFETY: the kernel writes all of it before anyone reads it.
//!         let mut result = unsafe { device.alloc_uninit(shape, DType::F32)? };
//!         let y = Memory::of_mut(&mut result, device);
//!         let (x, gate) = (Memory::of(x, device), Memory::of(gate, device));
//!         let mut args = Args::new();
//!         args.pointer(x.at(x_start)).pointer(gate.at(gate_start)).pointer(y.address()).value(len);
//!         // SAFETY: these are the parameters; thread `i` touches element `i < len` of each, and
//!         // each has `len` from its address on; all live until the launch has returned.
//!         unsafe { function.launch(device, [len.div_ceil(THREADS), 1, 1], &args)? };
//!         drop(y);
//!         Ok((result, shape.clone()))
//!     }
//! }
//!
//! # fn main() -> Result<()> {
//! use candle_core::{Device, Tensor};
//!
//! let device = Device::new_cuda(0)?;
//! let x = Tensor::randn(0f32, 1., (128, 1000), &device)?;
//! let y = x.apply_op2_no_bwd(&x, &SiluGate)?;
//! # Ok(()) }
//! ```
//!
//! - **Offsets**: [`Memory::at`] applies the view's offset, in elements. What is not contiguous needs
//!   strides as parameters, or `.contiguous()?` before.
//! - **Gradients**: `apply_op2_no_bwd` cuts the graph without a word. An op that may be trained has a
//!   `bwd`, and is applied by `apply_op2`.
//! - **Numbers** that decide about the text (an element type, a tile) are arguments of the function
//!   that writes the kernel; numbers that change from call to call are parameters.
//!
//! # 3. What to promise
//!
//! A launch is `unsafe`: see [`Function::launch`] for the promises. The usual mistakes are a grid that
//! covers more than the result without a bound in the kernel; a result smaller than what a vector
//! store writes; and arguments in the wrong order, of which only the sizes are compared.
//! `compute-sanitizer --tool memcheck` finds the first two.
//!
//! All tensors of an op should be made with one candle `Device`. Two devices on one GPU have streams
//! of their own, and nothing here orders one input's stream with the other's.
//!
//! # Environment
//!
//! | variable | |
//! |---|---|
//! | `KAIO_DUMP_PTX=dir` | the text of each kernel is written to `dir` when it is compiled |
//! | `KAIO_CACHE_DIR=dir` | compiled kernels are kept in `dir`, so that later processes with the same driver start without compiling (those that use `setmaxnreg`, the large ones for Hopper, are left to the driver's own cache, `CUDA_CACHE_PATH`); what is damaged is compiled anew and replaced; a directory that cannot be written costs only time. [`kernels`] says how many were found |
//! | `KAIO_ARCH=sm_80` | takes this crate's portable kernels on a GPU that has better ones |
//!
//! They are read when a kernel is compiled or a GPU is first used.
#![allow(unsafe_code)]

use std::sync::Arc;

use candle_core::CudaDevice;
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use cudarc::driver::{
    CudaSlice, CudaStream, DevicePtr, DevicePtrMut, DriverError, SyncOnDrop, sys,
};

pub use super::args::Args;
use super::args::list;
pub use super::compile::{Kernels, kernels};
use super::gpu::Gpu;
pub use super::tensor_map::TensorMap;
use crate::error::{Error, Result};
use crate::ptx::{Param, Source};

/// A kernel compiled for one GPU. It is never unloaded.
#[derive(Debug)]
pub struct Function {
    raw: sys::CUfunction,
    entry: &'static str,
    ordinal: usize,
    threads: u32,
    shared: u32,
    cluster: u32,
    starts_early: bool,
    params: Vec<Param>,
}

// SAFETY: a function handle belongs to a context, not to a thread, and its module is never unloaded.
unsafe impl Send for Function {}
// SAFETY: as above; launching from several threads at once is what the driver is made for.
unsafe impl Sync for Function {}

/// Blocks of a grid in x, y and z, on every GPU.
const MOST_BLOCKS: [u32; 3] = [i32::MAX as u32, 65_535, 65_535];

impl Function {
    pub(super) fn new(source: &Source, ordinal: usize, raw: sys::CUfunction) -> Self {
        let &Source { entry, threads, shared, cluster, starts_early, .. } = source;
        let params = source.params.clone();
        Self { raw, entry, ordinal, threads, shared, cluster, starts_early, params }
    }

    /// The kernel's parameters, in their order.
    pub(super) fn params(&self) -> &[Param] {
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
        Gpu::of(OP, device)?.custom(OP, source)
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
    ///   memory that the arguments were made from ([`Memory`]), inside its [`bytes`](Memory::bytes).
    /// - Memory that is written came from [`Memory::of_mut`] or [`Memory::of_slice_mut`].
    /// - Each [`Memory`] lives until this call has returned. (The memory itself may be freed then:
    ///   candle frees in the order of its stream.)
    /// - The parameters' types are those of the arguments: only their sizes are compared.
    /// - Results are fully written before anyone reads them, and hold valid values of their type.
    pub unsafe fn launch(&self, device: &CudaDevice, grid: [u32; 3], args: &Args) -> Result<()> {
        // SAFETY: the caller's promise.
        unsafe { self.submit("Function::launch", device, grid, args) }
    }

    /// [`launch`](Self::launch) for a method of the user's.
    ///
    /// # Safety
    ///
    /// That of [`launch`](Self::launch).
    pub(super) unsafe fn submit(
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
            hStream: stream.cu_stream(),
            attrs: &mut early,
            numAttrs: self.starts_early.into(),
        };
        let mut pointers = args.pointers();
        // SAFETY: the function lives for ever, the arguments were compared with its parameters, and
        // the driver copies them before it returns. What the kernel does is the caller's promise.
        let result = unsafe {
            sys::cuLaunchKernelEx(&config, self.raw, pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        result.result().map_err(driver)
    }

    /// What the driver would refuse without saying why, and what it would not notice.
    fn check(&self, op: &'static str, ordinal: usize, grid: [u32; 3], args: &Args) -> Result<()> {
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

/// Memory that a kernel launched on a device may use while this value lives.
///
/// Where candle tracks uses by events, as it does for a
/// [device with a stream of its own](candle_core::Device::new_cuda_with_stream), making one waits, on
/// the GPU, for what was submitted elsewhere, and dropping it tells others of the use.
#[must_use]
pub struct Memory<'a> {
    /// Borrows the stream below, and is dropped before it.
    _use: SyncOnDrop<'a>,
    _stream: Arc<CudaStream>,
    address: u64,
    bytes: usize,
    element: usize,
}

/// `body` for the slice of a storage, of whatever element type.
macro_rules! with_slice {
    ($storage:expr, $slice:ident => $body:expr) => {{
        use CudaStorageSlice as S;
        match $storage {
            S::U8($slice) | S::F6E2M3($slice) | S::F6E3M2($slice) => $body,
            S::F4($slice) | S::F8E8M0($slice) => $body,
            S::U32($slice) => $body,
            S::I16($slice) => $body,
            S::I32($slice) => $body,
            S::I64($slice) => $body,
            S::BF16($slice) => $body,
            S::F16($slice) => $body,
            S::F32($slice) => $body,
            S::F64($slice) => $body,
            S::F8E4M3($slice) => $body,
        }
    }};
}

impl<'a> Memory<'a> {
    /// A storage, to be read. A tensor's elements begin at `start_offset()` of its layout: see
    /// [`at`](Self::at).
    pub fn of(storage: &'a CudaStorage, device: &CudaDevice) -> Self {
        with_slice!(&storage.slice, slice => Self::of_slice(slice, device))
    }

    /// A storage, to be written.
    pub fn of_mut(storage: &'a mut CudaStorage, device: &CudaDevice) -> Self {
        with_slice!(&mut storage.slice, slice => Self::of_slice_mut(slice, device))
    }

    /// A slice, to be read.
    pub fn of_slice<T>(slice: &'a CudaSlice<T>, device: &CudaDevice) -> Self {
        let bytes = slice.num_bytes();
        Self::new::<T>(device, bytes, |stream| slice.device_ptr(stream))
    }

    /// A slice, to be written.
    pub fn of_slice_mut<T>(slice: &'a mut CudaSlice<T>, device: &CudaDevice) -> Self {
        let bytes = slice.num_bytes();
        Self::new::<T>(device, bytes, |stream| slice.device_ptr_mut(stream))
    }

    fn new<T>(
        device: &CudaDevice,
        bytes: usize,
        begin: impl FnOnce(&'a CudaStream) -> (u64, SyncOnDrop<'a>),
    ) -> Self {
        let stream = device.cuda_stream();
        // SAFETY: the stream stays where it is while the `Arc` lives, which is kept beside what
        // borrows it and dropped after it.
        let (address, _use) = begin(unsafe { &*Arc::as_ptr(&stream) });
        Self { _use, _stream: stream, address, bytes, element: size_of::<T>() }
    }

    /// Where it begins.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Where element `index` is, for the element type of the storage or slice.
    pub fn at(&self, index: usize) -> u64 {
        self.address + (index * self.element) as u64
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}
