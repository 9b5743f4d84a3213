//! A GPU kernel of your own on candle tensors: each row of x divided by its root mean square, for
//! which candle's ops take a tensor for each step. `kaio_candle::launch` walks through it.
//!
//! ```text
//! cargo run --release --features cuda --example custom_kernel # on a GPU, compared with candle's ops
//! cargo run --release --example custom_kernel                 # anywhere: prints the kernel as PTX
//! ```
#![allow(unsafe_code)] // Launching: only the author of a kernel knows what it reads and writes.

use candle_core::{CpuStorage, CustomOp1, DType, Device, Layout, Result, Shape, Tensor, bail};
use kaio_candle::ptx::{Half, Kernel, Source, Target};

const THREADS: u32 = 256;
const WARPS: u32 = THREADS / 32;

/// Each block computes `y = x / √(mean(x²) + eps)` for a row of `cols` elements.
fn kernel(half: Half) -> Source {
    let k = &Kernel::new("rms_norm", Target::Sm80, THREADS);
    let (x, y) = (k.pointer("x"), k.pointer("y"));
    let (cols, eps) = (k.param::<u32>("cols"), k.param::<f32>("eps"));
    let sums = k.shared(WARPS * 4);
    let (thread, row) = (k.thread(), k.block_x().mul_wide(cols) * 2u64);
    let load = |i| k.widen(half, k.ld_global_nc::<u16, 1>((x + row).element(i, 2))[0]);

    // Each thread adds up the squares of every 256th element, ...
    let sum = k.var(0f32);
    k.for_(thread, cols, THREADS, |i| {
        let value = load(i);
        sum.set(value.fma(value, sum));
    });
    // ... the lanes of a warp exchange theirs until each has the warp's, ...
    for lanes in [16, 8, 4, 2, 1] {
        sum.increase(k.shfl_bfly(sum, lanes));
    }
    // ... and the warps do so in shared memory.
    k.st_shared(sums + thread / 32 * 4, [sum]);
    k.sync_block();
    let total = k.var(0f32);
    for warp in 0..WARPS {
        let [of_warp] = k.ld_shared(sums.at(i64::from(warp * 4)));
        total.increase(of_warp);
    }

    let scale = (total / cols.to_f32() + eps).rsqrt();
    k.for_(thread, cols, THREADS, |i| {
        k.st_global((y + row).element(i, 2), [k.cvt_rn(half, load(i) * scale)]);
    });
    k.finish()
}

struct RmsNorm {
    kernel: Source,
    eps: f32,
}

impl CustomOp1 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms_norm"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("rms_norm: this kernel runs on a GPU; move the tensor there with `.to_device(..)?`")
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        x: &candle_core::CudaStorage,
        layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::{BackendDevice, BackendStorage};
        use kaio_candle::launch::{Args, Function, Memory};

        // What the kernel takes, and nothing else. A view may begin anywhere in its storage.
        let (DType::F16, Some((start, _))) = (x.dtype(), layout.contiguous_offsets()) else {
            bail!("rms_norm: wanted contiguous f16, got {:?} {layout:?}", x.dtype())
        };
        let (rows, cols) = layout.shape().dims2()?;
        let (rows, cols) = (u32::try_from(rows)?, u32::try_from(cols)?);

        let device = x.device();
        let function = Function::compile(device, &self.kernel)?;
        // SAFETY: the kernel writes all of it before anyone reads it.
        let mut result = unsafe { device.alloc_uninit(layout.shape(), x.dtype())? };
        let (x, y) = (Memory::of(x, device), Memory::of_mut(&mut result, device));
        let mut args = Args::new();
        args.pointer(x.at(start)).pointer(y.address()).value(cols).value(self.eps);
        // SAFETY: these are the parameters; block `i` stays in row `i` of what `x` and `y` hold, and
        // its loops within `cols`; both live until the launch has returned.
        unsafe { function.launch(device, [rows, 1, 1], &args)? };
        drop(y);
        Ok((result, layout.shape().clone()))
    }
}

/// The kernel beside candle's ops.
pub fn main() -> Result<()> {
    let op = RmsNorm { kernel: kernel(Half::F16), eps: 1e-5 };
    if cfg!(not(feature = "cuda")) {
        println!("{}\n// On a GPU it runs with: --features cuda", op.kernel.text);
        return Ok(());
    }
    let device = Device::new_cuda(0)?;
    for (rows, cols) in [(1, 1), (3, 31), (70, 256), (512, 4097)] {
        let all = Tensor::randn(0f32, 2., (rows + 1, cols), &device)?.to_dtype(DType::F16)?;
        let x = all.narrow(0, 1, rows)?; // a view that begins in the second row
        let got = x.apply_op1_no_bwd(&op)?.to_dtype(DType::F32)?;
        let x = x.to_dtype(DType::F32)?;
        let mean = (x.sqr()?.mean_keepdim(1)? + f64::from(op.eps))?;
        let want = x.broadcast_div(&mean.sqrt()?)?;
        let error = (got - &want)?.abs()?.max_all()?.to_scalar::<f32>()?;
        let ulp = want.abs()?.max_all()?.to_scalar::<f32>()? / 1024.0;
        println!("{rows:>4} x {cols:<5} largest error {error:.1e}, f16 resolves {ulp:.1e}");
        if error.is_nan() || error > ulp {
            bail!("the kernel and candle differ")
        }
    }
    Ok(())
}
