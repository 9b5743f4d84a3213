//! f16 and bf16 products.

use candle_core::backend::BackendStorage;
use candle_core::cuda_backend::CudaDType;
use candle_core::op::{Add, CmpOp, Gelu, GeluErf, Silu};
use candle_core::{CudaStorage, DType, Layout, Result, backend::BackendDevice};
use half::{bf16, f16};
use kaio::prelude::{GpuBuffer, KaioDevice};

use super::fit::{Want, copyable, fit};
use super::session::{KaioResult, Session};
use super::{product_indexable, slabs, zeros};
use crate::Activation;
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
    let (len, out_dtype) = (problem.out.elem_count(), epilogue.out_dtype);
    let plain = bias.is_none() && epilogue.activation.is_none();
    if len == 0 || (plain && problem.lhs.cols == 0) {
        return zeros(a, len, out_dtype);
    }
    let mut out = match a.dtype() {
        _ if problem.lhs.cols == 0 => zeros(a, len, DType::F32),
        DType::F16 => run::<f16>(op, problem, kaio_ops::matmul_tc_async, a, b),
        DType::BF16 => run::<bf16>(op, problem, kaio_ops::matmul_tc_bf16_async, a, b),
        other => candle_core::bail!("{op}: no kernel multiplies {}", other.as_str()),
    }?;
    // The kernels have neither; candle's have.
    if !plain {
        copyable(op, len)?;
    }
    if let Some(bias) = bias {
        out = add_row(&out, (len, problem.rhs.cols), bias)?;
    }
    if let Some(activation) = epilogue.activation {
        out = activate(&out, len, activation)?;
    }
    super::cast(op, out, len, out_dtype)
}

/// The packed f32 rows of `n` elements with a vector added to each.
fn add_row(
    rows: &CudaStorage,
    (len, n): (usize, usize),
    (bias, layout): View<CudaStorage>,
) -> Result<CudaStorage> {
    let shape = (len / n, n);
    let repeated = |stride, offset| Layout::new(shape.into(), vec![0, stride], offset);
    let packed = Layout::contiguous(shape);
    match bias.dtype() {
        DType::F32 => {
            let bias_layout = repeated(layout.stride()[0], layout.start_offset());
            rows.binary_impl::<Add>(bias, &packed, &bias_layout)
        }
        _ => {
            let bias = bias.to_dtype(layout, DType::F32)?;
            rows.binary_impl::<Add>(&bias, &packed, &repeated(1, 0))
        }
    }
}

/// A function of each of `len` packed f32.
fn activate(xs: &CudaStorage, len: usize, activation: Activation) -> Result<CudaStorage> {
    let packed = Layout::contiguous(len);
    match activation {
        Activation::Relu => {
            // candle's `relu` turns NaN into 0.
            let zero = xs.device.zeros_impl(&().into(), DType::F32)?;
            let zeros = Layout::new(len.into(), vec![0], 0);
            let hidden = xs.cmp(CmpOp::Le, &zero, &packed, &zeros)?;
            hidden.where_cond(&packed, &zero, &zeros, xs, &packed)
        }
        Activation::GeluTanh => xs.unary_impl::<Gelu>(&packed),
        Activation::GeluErf => xs.unary_impl::<GeluErf>(&packed),
        Activation::Silu => xs.unary_impl::<Silu>(&packed),
    }
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
