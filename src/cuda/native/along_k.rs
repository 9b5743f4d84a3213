//! Matrices of bytes as lines along K, which is how tensor cores take them.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::engines::CudaWeight;
use super::super::fit::{Fitted, Want, fit};
use super::limit::{SPLIT, countable};
use super::operand::{ALIGN, Lines, per_chunk};
use super::plan::Plans;
use super::w4::CodeLines;
use crate::kernel::gemm::Major;
use crate::kernel::transpose;
use crate::quant::planes::{Form, Planes};
use crate::stack::Stack;

static TRANSPOSITIONS: Plans<transpose::Plan> = Plans::new();

/// The form in which the kernels read a weight of bytes: codes along K, `[n, ..]` with each row of a multiple of 16 bytes, and
/// scales in f32, for each column one where there is one for all.
pub(super) fn repack(op: &'static str, planes: &Planes) -> Result<Form> {
    let codes = match along_k(op, planes)? {
        Some(codes) => codes,
        None => planes.codes.t()?,
    };
    let mut scales = planes.scales.to_dtype(DType::F32)?;
    if planes.scheme.spans()[1] {
        scales = scales.broadcast_as((1, planes.dims[1]))?.contiguous()?;
    }
    Ok(Form::Packed(Planes { codes, scales, ..planes.clone() }))
}

/// Where codes are that lie along K.
pub(super) fn code_lines(weight: &CudaWeight) -> Option<CodeLines> {
    let (codes, layout) = weight.codes;
    let along = Stack::new(layout).t();
    let lines = lies_along_k(&along, codes.dtype())?;
    Some(CodeLines { first: along.matrix_offset(0), line: lines.stride })
}

/// Codes of a weight of several columns that lie along K, by rows.
pub(super) fn across(op: &'static str, weight: &CudaWeight) -> Result<(CudaStorage, Layout)> {
    let (codes, layout) = weight.codes;
    let along = Stack::new(layout).t();
    let lines = lies_along_k(&along, codes.dtype()).expect("a prepared weight lies so");
    let [k, n] = weight.facts.dims;
    let (codes, row) = transpose(op, codes, (along.matrix_offset(0), lines.stride), [n, k])?;
    Ok((codes, Layout::new((k, n).into(), vec![row, 1], 0)))
}

/// Codes that lie along K, if they do not.
fn along_k(op: &'static str, planes: &Planes) -> Result<Option<Tensor>> {
    let [k, n] = planes.dims;
    let (storage, layout) = planes.codes.storage_and_layout();
    let Storage::Cuda(codes) = &*storage else { return Ok(None) };
    let stack = Stack::new(layout);
    if k == 0 || n == 0 || lies_along_k(&stack.t(), codes.dtype()).is_some() {
        return Ok(None);
    }
    let (fitted, lines) = weight(op, (codes, &stack))?;
    let Some(along) = fitted.into_copy() else { return Ok(None) };
    let shape = (n, lines.stride);
    let codes = Tensor::from_storage(Storage::Cuda(along), shape, BackpropOp::none(), false);
    drop(storage);
    Ok(Some(codes))
}

/// Activations as one matrix whose rows begin at multiples of 16 bytes: as they are, or a copy.
pub(super) fn activations<'a>(
    op: &'static str,
    (storage, stack): Operand<'a>,
) -> Result<(Fitted<'a>, Lines)> {
    let unit = per_chunk(storage.dtype());
    let lines = |stack: &Stack| lies_along_k(stack, storage.dtype());
    if let Some(folded) = stack.fold_rows()
        && let Some(lines) = lines(&folded)
    {
        return Ok((Fitted::view(storage, folded), lines));
    }
    let cols = stack.cols.next_multiple_of(unit);
    let want = Want { cols, align: ALIGN, folded: true, ..Want::default() };
    let mut copy = fit(op, (storage, stack), want)?;
    let rows = copy.stack.rows;
    copy.stack = copy.stack.narrow(rows, stack.cols);
    let lines = lines(&copy.stack).expect("a padded copy has lines");
    Ok((copy, lines))
}

/// The lines along K of a matrix `[N, K]`, if it has any.
pub(super) fn lies_along_k(stack: &Stack, dtype: DType) -> Option<Lines> {
    Lines::of(stack, per_chunk(dtype)).filter(|lines| lines.major == Major::K)
}

/// A weight `[K, N]` as lines along K.
pub(super) fn weight<'a>(
    op: &'static str,
    (storage, stack): Operand<'a>,
) -> Result<(Fitted<'a>, Lines)> {
    let unit = per_chunk(storage.dtype());
    let (rows, cols) = (stack.rows, stack.cols);
    if let Some(lines) = lies_along_k(&stack.t(), storage.dtype()) {
        return Ok((Fitted::view(storage, stack.t()), lines));
    }
    let across = match Lines::of(&stack.t(), unit) {
        Some(_) if cols.is_multiple_of(unit) => Fitted::view(storage, stack.clone()),
        _ => {
            let cols = cols.next_multiple_of(unit);
            fit(op, (storage, stack), Want { cols, align: ALIGN, ..Want::default() })?
        }
    };
    let place = (across.offset(0), across.stack.row_stride);
    let (along, row) = transpose(op, across.storage(), place, [rows, cols])?;
    let stack = Stack::row_major(cols, row).narrow(cols, rows);
    let lines = Lines::of(&stack, unit).expect("rows are padded");
    Ok((Fitted::copy(along, stack), lines))
}

/// The bytes of a matrix `[rows, cols]`, which begins at an element of a storage and whose rows lie so many bytes
/// apart, as `[cols, rows]`; and the bytes of a row of that.
fn transpose(
    op: &'static str,
    storage: &CudaStorage,
    (first, stride): (usize, usize),
    [rows, cols]: [usize; 2],
) -> Result<(CudaStorage, usize)> {
    let device = storage.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let problem = transpose::Problem { rows: rows as u64, cols: cols as u64 };
    countable(op, ["this crate", "take"], problem.limit(), SPLIT)?;
    let order = Order::new(op, device.cuda_stream(), [storage]);
    let compiled = TRANSPOSITIONS.get(op, &gpu, &problem)?;
    let row = problem.out_row() as usize;
    let mut out = uninit(&device, &Shape::from(cols * row), storage.dtype())?;
    {
        let (input, result) = (Memory::of(storage, &device), Memory::of_mut(&mut out, &device));
        let arguments = transpose::Arguments {
            problem: &problem,
            plan: &compiled.plan,
            input: (input.at(first), stride as u64),
            out: result.address(),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok((out, row))
}
