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
//! | `KAIO_LOG=1` | the name of each of this crate's kernels is printed when it is first launched for an op |
//! | `KAIO_ARCH=sm_80` | takes this crate's portable kernels on a GPU that has better ones |
//! | `KAIO_GRAPHS=0` | launches kernels that follow each other one by one, and not as a CUDA graph: for profilers that show a graph as one |
//!
//! They are read when a kernel is compiled or a GPU is first used.
//!
//! **Who may write to these directories may decide what runs on the GPU** with this process's data: name
//! directories that belong to the user of the process, and to which nobody else writes (one that is not
//! there is made so). A compiled kernel is believed if its file is no link, belongs to that user or to
//! root, is not writable by others (both as far as the system is Linux), and has an intact check sum, which
//! is no signature. Files are put together under names that cannot be predicted, and then renamed: a link
//! that somebody left in their place is replaced, not followed.

pub use super::driver::args::Args;
pub use super::driver::compile::{Kernels, kernels};
pub use super::driver::function::Function;
pub use super::driver::memory::Memory;
pub use super::driver::tensor_map::TensorMap;
