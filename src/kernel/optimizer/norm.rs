//! The norm of all gradients together, without the host: a sum of squares for each chunk, and then one block that
//! adds them, always in the same order.

use super::rows::{Chunk, walk};
use super::{Name, THREADS};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Units of a thread in flight, each with sums of its own.
const TOGETHER: usize = 4;
/// Lanes of a warp.
const WARP: u32 = 32;
/// Threads of the block that adds the chunks.
const LAST_THREADS: u32 = 1024;
/// What is added to a norm before it divides: PyTorch's `clip_grad_norm_`.
pub const BESIDE_NORM: f64 = 1e-6;

/// Σ g² of each chunk.
pub(super) fn emit_squares() -> Source {
    let k = &Kernel::new("grad_squares", Target::Sm80, THREADS);
    let partials = k.pointer(Name::Partials);
    let shared = k.shared(THREADS / WARP * 4);
    let chunk = Chunk::of_block(k);
    let sums: [Reg<f32>; 4 * TOGETHER] = std::array::from_fn(|_| k.var(0f32));
    walk(&chunk, THREADS, TOGETHER as u32, |at, unit| {
        for (sum, grad) in sums.iter().zip(chunk.load(at, unit)) {
            sum.set(grad.fma(grad, *sum));
        }
    });
    let total = block_sum(k, shared, pairwise(&sums), THREADS / WARP);
    k.when(k.thread().eq(0), || k.st_global(partials.element(k.block_x(), 4), [total]));
    k.finish()
}

/// The norm times the scale, and what gradients are multiplied with so that theirs is at most `max_norm`: at the norm's
/// address, and behind it. Each thread keeps what its sum loses by rounding (Neumaier, 1974).
pub(super) fn emit_norm() -> Source {
    let k = &Kernel::new("grad_norm", Target::Sm80, LAST_THREADS);
    let (partials, chunks) = (k.pointer(Name::Partials), k.param::<u32>(Name::Chunks));
    let clip = k.pointer(Name::Clip);
    let (scale, max_norm) = (k.param::<f32>(Name::Scale), k.param::<f32>(Name::MaxNorm));
    let shared = k.shared(LAST_THREADS / WARP * 4);
    let (sum, lost) = (k.var(0f32), k.var(0f32));
    k.for_(k.thread(), chunks, LAST_THREADS, |i| {
        let [x] = k.ld_global_nc::<f32, 1>(partials.element(i, 4));
        let next = sum + x;
        // Both are at least 0.
        let (large, small) = (sum.max(x), sum.min(x));
        lost.increase((large - next) + small);
        sum.set(next);
    });
    // Where the sum is infinite or NaN, so is it without what it lost.
    let exact = sum + lost;
    let sum = k.select(sum.lt(f32::INFINITY), exact, sum);
    let total = block_sum(k, shared, sum, LAST_THREADS / WARP);
    let norm = total.sqrt().mul_rn(scale);
    let ratio = max_norm / (norm + BESIDE_NORM as f32);
    // A norm that is NaN gives NaN, as it would there.
    let clipped = k.select(ratio.ge(1.0), k.var(1f32), ratio);
    k.when(k.thread().eq(0), || k.st_global(clip, [norm, clipped.mul_rn(scale)]));
    k.finish()
}

fn pairwise<'k>(values: &[Reg<'k, f32>]) -> Reg<'k, f32> {
    match values {
        [one] => *one,
        _ => {
            let (a, b) = values.split_at(values.len() / 2);
            pairwise(a) + pairwise(b)
        }
    }
}

/// The sum over all threads of a block of `warps` warps, a power of two, in those of the first one.
fn block_sum<'k>(
    k: &'k Kernel,
    shared: Reg<'k, u32>,
    mine: Reg<'k, f32>,
    warps: u32,
) -> Reg<'k, f32> {
    let sum = |mut x: Reg<'k, f32>, lanes: u32| {
        let mut apart = lanes / 2;
        while apart > 0 {
            x = x + k.shfl_bfly(x, apart);
            apart /= 2;
        }
        x
    };
    let (thread, of_warp) = (k.thread(), sum(mine, WARP));
    k.when((thread % WARP).eq(0), || k.st_shared(shared + thread / WARP * 4, [of_warp]));
    k.sync_block();
    let [of_warp] = k.ld_shared::<f32, 1>(shared + thread % warps * 4);
    sum(of_warp, warps)
}
