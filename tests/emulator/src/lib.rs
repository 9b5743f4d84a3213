//! A CUDA driver that runs this crate's kernels on the CPU, one instruction after the other, so that they
//! can be seen to compute the right thing where there is no GPU. `scripts/emulated-gpu.sh` runs tests of
//! the GPU suite on it: the same tests, through the same host code, which find one H200.
//!
//! It knows the instructions that this crate's writer of PTX emits. What is undefined on a GPU is made to
//! be seen:
//!
//! - Fresh memory, registers and shared memory hold NaN.
//! - Asynchronous work happens as late as it may. A box that TMA loads is NaN until its barrier has been
//!   waited for, what `cp.async` copies until its group has; `wgmma` reads its operands, and TMA what it
//!   stores, when they are waited for.
//! - Warps run in random order (`EMULATOR_SEED=7`: in another one), for random stretches, and are left
//!   behind now and then.
//! - Accesses outside an allocation, misaligned ones, too many arrivals at a barrier, divergence where all
//!   lanes are needed, deadlocks, and copies that nobody waited for are errors with the instruction's text.
//!
//! Its GPU has the 132 multiprocessors of an H200. `EMULATOR_MULTIPROCESSORS=6` makes blocks stay for
//! several tiles, as they do there for larger problems.
//!
//! What it does not see: fences that are missing (memory is the same for everybody at once), banks, the
//! precision of `ex2` and its like (they are those of the host), time.
//!
//! candle's own kernels are not interpreted: the few that our host code calls are in `candle`, in Rust; any
//! other one is an error. There is no cuBLAS. A thread that captures a stream captures all that it submits.
//!
//! | module | |
//! |---|---|
//! | `driver` | the functions of libcuda that candle and this crate call |
//! | `memory` | the GPU's memory: where something is, and where nothing is |
//! | `program` | PTX read into instructions |
//! | `alu` | what an instruction makes of the values of one lane |
//! | `graphs` | kernels that are captured, and launched as a graph |
//! | `grid` | blocks, clusters, and whose turn it is |
//! | `warp` | one instruction of a warp |
//! | `copies` | TMA, `cp.async`, and the barriers that count their bytes |
//! | `tensor_cores` | `mma`, `wgmma`, and the loads and stores of their fragments |
//! | `candle` | the kernels of candle that are called besides |

mod alu;
mod calls;
mod candle;
mod copies;
mod driver;
mod graphs;
mod grid;
mod memory;
mod program;
mod tensor_cores;
mod warp;
