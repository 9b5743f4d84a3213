//! Weights rounded to codes where they are, and their scales.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result, Shape, Storage, Tensor};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::empty;
use super::limit::countable;
use super::operand::element;
use super::plan::Plans;
use super::quantised::tensor;
use crate::kernel::encode::{Arguments, Code, Output, Plan, Problem};
use crate::op::View;
use crate::quant::QuantScheme;
use crate::quant::planes::Planes;
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// A weight `[K, N]`, not empty and of finite floats, in the plain form.
pub(crate) fn encode(op: &'static str, weight: &Tensor, scheme: QuantScheme) -> Result<Planes> {
    let dims = weight.dims2()?.into();
    let [k, n] = dims;
    let words = (k.div_ceil(8), n);
    let (code, codes, dtype) = match scheme {
        QuantScheme::Int4 { zero_points: zeros, .. } => (Code::Int4 { zeros }, words, DType::U32),
        QuantScheme::Nf4 { .. } => (Code::Nf4, words, DType::U32),
        QuantScheme::Int8 { .. } => (Code::Int8, (k, n), DType::U8),
        QuantScheme::Fp8 { .. } => (Code::E4m3, (k, n), DType::F8E4M3),
    };
    let scales = if scheme.is_4bit() { weight.dtype() } else { DType::F32 };
    let (storage, layout) = weight.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("it is on a GPU") };
    let problem = Problem {
        rows: k as u64,
        cols: n as u64,
        group: scheme.group(dims).map(|len| len as u64),
        element: element(weight.dtype()),
        output: Output::Codes(code),
    };
    let groups = problem.groups().map(|count| count as usize);
    let device = storage.device();
    let vector = |len: usize, dtype| uninit(device, &Shape::from(len), dtype);
    let count = groups[0] * groups[1];
    let mut results = [vector(problem.written() as usize, dtype)?, vector(count, scales)?];
    let mut zeros = match scheme.has_zero_points() {
        true => Some(vector(count, DType::U8)?),
        false => None,
    };
    run(op, (storage, &Stack::new(layout)), &problem, Some(&mut results), zeros.as_mut())?;
    let [of_codes, of_scales] = results;
    let groups = (groups[0], groups[1]);
    Ok(Planes {
        scheme,
        dims,
        codes: tensor(of_codes, codes),
        scales: tensor(of_scales, groups),
        zeros: zeros.map(|zeros| tensor(zeros, groups)),
        order: None,
        far: false,
    })
}

/// A matrix of floats, not empty, without gaps and divided by a power of two, and that power, f32: see [`Output::Divided`].
pub(super) fn divided(
    op: &'static str,
    (storage, layout): View<CudaStorage>,
    farthest: u32,
) -> Result<[CudaStorage; 2]> {
    let problem = whole(layout.shape().dims2()?, storage.dtype(), Output::Divided { farthest });
    let device = storage.device();
    let vector = |len: usize, dtype| uninit(device, &Shape::from(len), dtype);
    let mut results =
        [vector(problem.written() as usize, storage.dtype())?, vector(1, DType::F32)?];
    run(op, (storage, &Stack::new(layout)), &problem, Some(&mut results), None)?;
    Ok(results)
}

/// The largest magnitude of a matrix of floats, or infinite or NaN.
pub(crate) fn peak(op: &'static str, matrix: &Tensor) -> Result<f32> {
    if matrix.elem_count() == 0 {
        return Ok(0.0);
    }
    let (storage, layout) = matrix.storage_and_layout();
    let Storage::Cuda(storage) = &*storage else { unreachable!("it is on a GPU") };
    let problem = whole(matrix.dims2()?, matrix.dtype(), Output::Ranges);
    let ranges = run(op, (storage, &Stack::new(layout)), &problem, None, None)?;
    // Bits of magnitudes are in their order, and those of NaN the largest.
    let bits = tensor(ranges, 2).to_vec1::<u32>()?.into_iter().max();
    Ok(f32::from_bits(bits.unwrap_or(0)))
}

/// Of a matrix that is one group.
fn whole((rows, cols): (usize, usize), dtype: DType, output: Output) -> Problem {
    let [rows, cols] = [rows, cols].map(|len| len as u64);
    Problem { rows, cols, group: [rows, cols], element: element(dtype), output }
}

/// Launches the kernels, and gives the ranges of the groups.
fn run(
    op: &'static str,
    (storage, stack): (&CudaStorage, &Stack),
    problem: &Problem,
    results: Option<&mut [CudaStorage; 2]>,
    zeros: Option<&mut CudaStorage>,
) -> Result<CudaStorage> {
    let device = storage.device().clone();
    let gpu = Gpu::of(op, &device)?;
    countable(op, ["this crate", "take"], problem.limit(), "quantise parts of its columns")?;
    let order = Order::new(op, device.cuda_stream(), [storage]);
    let compiled = PLANS.get(op, &gpu, problem)?;
    let [below, right] = problem.groups();
    let mut ranges = empty::zeros(storage, (2 * below * right) as usize, DType::U32)?;
    {
        let input = Memory::of(storage, &device);
        let of_ranges = Memory::of_mut(&mut ranges, &device);
        let results =
            results.map(|results| results.each_mut().map(|one| Memory::of_mut(one, &device)));
        let zeros = zeros.map(|zeros| Memory::of_mut(zeros, &device));
        let arguments = Arguments {
            problem,
            input: (
                input.at(stack.matrix_offset(0)),
                [stack.row_stride, stack.col_stride].map(|stride| stride as u64),
            ),
            ranges: of_ranges.address(),
            results: results.as_ref().map(|results| results.each_ref().map(Memory::address)),
            zeros: zeros.as_ref().map(Memory::address),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(ranges)
}
