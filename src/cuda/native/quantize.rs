//! Activations rounded to eight bits.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{Fitted, Want, fit};
use super::limit::{SPLIT, countable};
use super::operand::{element, rows_aligned};
use super::plan::Plans;
use crate::kernel::quantize::{Arguments, Plan, Problem};
use crate::ptx::Factor;
use crate::stack::Stack;

static PLANS: Plans<Plan> = Plans::new();

/// Rounded rows, and the f32 scale of each group of `width` elements of a row.
pub(crate) struct Rounded {
    pub codes: CudaStorage,
    /// Codes from row to row.
    pub row: usize,
    pub scales: CudaStorage,
}

/// Rows rounded to int8 bytes in u8 or to e4m3, in groups of `width` elements: a multiple of 16, or a whole row. The
/// operand is not empty.
pub(crate) fn quantize_rows(
    op: &'static str,
    (storage, stack): Operand,
    dtype: DType,
    width: usize,
) -> Result<Rounded> {
    let device = storage.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let rows = stack.fold_rows().filter(|rows| rows.cols == 1 || rows.col_stride == 1);
    let fitted = match rows {
        Some(rows) => Fitted::view(storage, rows),
        None => fit(op, (storage, stack), Want { folded: true, ..Want::default() })?,
    };
    let Stack { rows, cols, row_stride, .. } = fitted.stack;
    let problem = Problem {
        rows: rows as u64,
        cols: cols as u64,
        width: width.min(cols) as u64,
        element: element(storage.dtype()),
        code: if dtype == DType::U8 { Factor::S8 } else { Factor::E4m3 },
        aligned: rows_aligned(&fitted.stack, storage.dtype()),
    };
    countable(op, ["this crate", "round"], problem.limit(), SPLIT)?;
    let order = Order::new(op, device.cuda_stream(), [storage]);
    let compiled = PLANS.get(op, &gpu, &problem)?;
    let row = problem.out_row() as usize;
    let mut codes = uninit(&device, &Shape::from(rows * row), dtype)?;
    let mut scales = uninit(&device, &Shape::from(rows * cols.div_ceil(width)), DType::F32)?;
    {
        let input = Memory::of(fitted.storage(), &device);
        let results = [Memory::of_mut(&mut codes, &device), Memory::of_mut(&mut scales, &device)];
        let arguments = Arguments {
            problem: &problem,
            input: (input.at(fitted.offset(0)), row_stride as u64),
            results: results.each_ref().map(Memory::address),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(Rounded { codes, row, scales })
}
