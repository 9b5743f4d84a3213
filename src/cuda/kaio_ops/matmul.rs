//! f16 and bf16 products.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::{CudaStorage, DType, Result};
use half::{bf16, f16};
use kaio::prelude::{GpuBuffer, KaioDevice};

use super::epilogue;
use super::fit::{Want, fit};
use super::session::{KaioResult, Session};
use super::{product_indexable, slabs};
use crate::op::{Epilogue, MatmulProblem, View};

/// The depth of one `mma.sync`: the kernels do not pad K.
const K_TILE: usize = 16;

/// `c [m, n] = a [m, k] · b [k, n]`, all row-major.
type Kernel<T> =
    fn(&KaioDevice, &GpuBuffer<T>, &GpuBuffer<T>, &mut GpuBuffer<f32>, u32, u32, u32) -> KaioResult;

pub(crate) fn matmul(
    op: &'static str,
    problem: &MatmulProblem,
    epilogue: Epilogue,
    a: &CudaStorage,
    b: &CudaStorage,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    let sums = match a.dtype() {
        DType::F16 => run::<f16>(op, problem, kaio_ops::matmul_tc_async, a, b),
        DType::BF16 => run::<bf16>(op, problem, kaio_ops::matmul_tc_bf16_async, a, b),
        other => candle_core::bail!("{op}: no kernel multiplies {}", other.as_str()),
    }?;
    // The kernels have neither bias nor activation; candle's have.
    epilogue::apply(op, sums, (problem.out.elem_count(), problem.rhs.cols), bias, epilogue)
}

fn run<T: CudaDType>(
    op: &'static str,
    problem: &MatmulProblem,
    kernel: Kernel<T>,
    a: &CudaStorage,
    b: &CudaStorage,
) -> Result<CudaStorage> {
    // Matrices that share their right-hand side are one taller matrix, if need be after a copy: each
    // launch costs more than that.
    let folded = problem.rhs.without_repeats().count() == 1;
    let (count, m) = match folded {
        true => (1, problem.lhs.count() * problem.lhs.rows),
        false => (problem.lhs.count(), problem.lhs.rows),
    };
    let n = problem.rhs.cols;
    let k = problem.lhs.cols.next_multiple_of(K_TILE);
    product_indexable(op, ("lhs", m), k, ("rhs", n))?;
    // `cp.async` moves 16 bytes of the left-hand side; the right-hand side goes element by element.
    let want = Want { cols: k, align: 16, folded, ..Want::default() };
    let a = fit(op, (a, &problem.lhs), want)?;
    let b = fit(op, (b, &problem.rhs), Want { rows: k, ..Want::default() })?;

    let session = Session::new(op, &[a.storage(), b.storage()])?;
    let mut out = session.alloc::<f32>(count * m * n)?;
    {
        let (pa, pb) = (session.input(a.storage())?, session.input(b.storage())?);
        let pc = session.output(&mut out)?;
        session.run(|device| {
            for i in 0..count {
                let rhs = pb.view::<T>(b.offset(i), k * n);
                for (start, rows) in slabs(m, k.max(n)) {
                    let lhs = pa.view::<T>(a.offset(i) + start * k, rows * k);
                    let mut c = pc.view(i * m * n + start * n, rows * n);
                    kernel(device, &lhs, &rhs, &mut c, rows as u32, n as u32, k as u32)?;
                }
            }
            Ok(())
        })?;
    }
    Ok(CudaDType::wrap_cuda_slice(out, session.device.clone()))
}
