//! Activations rounded to eight bits.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{Fitted, Want, fit};
use super::limit::{SPLIT, countable};
use super::operand::{element, rows_aligned};
use super::plan::{Launches, Plans};
use crate::kernel::quantize::{Arguments, Plan, Problem};
use crate::op::Rounding;
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

/// Rows that are to be rounded, in memory that fits.
pub(super) struct Rows<'a> {
    op: &'static str,
    device: CudaDevice,
    gpu: Arc<Gpu>,
    order: Order,
    operand: Fitted<'a>,
    facts: Problem,
}

impl<'a> Rows<'a> {
    /// To int8 bytes in u8 or to e4m3, in groups of `width` elements: a multiple of 16, or a whole row. The operand is not
    /// empty.
    pub fn new(
        op: &'static str,
        (storage, stack): Operand<'a>,
        Rounding { dtype, width }: Rounding,
    ) -> Result<Self> {
        let device = storage.device().clone();
        let gpu = Gpu::of(op, &device)?;
        let rows = stack.fold_rows().filter(|rows| rows.cols == 1 || rows.col_stride == 1);
        let operand = match rows {
            Some(rows) => Fitted::view(storage, rows),
            None => fit(op, (storage, stack), Want { folded: true, ..Want::default() })?,
        };
        let Stack { rows, cols, .. } = operand.stack;
        let facts = Problem {
            rows: rows as u64,
            cols: cols as u64,
            width: width.min(cols) as u64,
            element: element(storage.dtype()),
            code: if dtype == DType::U8 { Factor::S8 } else { Factor::E4m3 },
            aligned: rows_aligned(&operand.stack, storage.dtype()),
        };
        countable(op, ["this crate", "round"], facts.limit(), SPLIT)?;
        let order = Order::new(op, device.cuda_stream(), [storage]);
        Ok(Self { op, device, gpu, order, operand, facts })
    }

    /// Codes from row to row, a byte each.
    pub fn row(&self) -> usize {
        self.facts.out_row() as usize
    }

    /// Codes in all: a multiple of 16.
    pub fn codes(&self) -> usize {
        self.operand.stack.rows * self.row()
    }

    /// Scales in all.
    pub fn scales(&self) -> usize {
        let Problem { rows, cols, width, .. } = self.facts;
        (rows * cols.div_ceil(width)) as usize
    }

    /// Writes codes and f32 scales to addresses of as many, multiples of 16.
    pub fn round(&self, results: [u64; 2]) -> Result<()> {
        self.round_and(results, |launches| Ok(launches.submit(self.op, &self.device)?))
    }

    /// The same by launches that `then` is to submit, with what may follow.
    pub fn round_and(
        &self,
        results: [u64; 2],
        then: impl FnOnce(Launches) -> Result<()>,
    ) -> Result<()> {
        let Self { op, device, gpu, order, operand, facts } = self;
        let compiled = PLANS.get(op, gpu, facts)?;
        let input = Memory::of(operand.storage(), device);
        let arguments = Arguments {
            problem: facts,
            input: (input.at(operand.offset(0)), operand.stack.row_stride as u64),
            results,
        };
        let mut launches = Launches::default();
        compiled.add_to(&mut launches, op, &arguments)?;
        order.run(|| then(launches))
    }
}

/// Rows rounded, in memory of their own.
pub(crate) fn quantize_rows(
    op: &'static str,
    operand: Operand,
    rounding: Rounding,
) -> Result<Rounded> {
    let rows = Rows::new(op, operand, rounding)?;
    let alloc = |len: usize, dtype| uninit(&rows.device, &Shape::from(len), dtype);
    let mut codes = alloc(rows.codes(), rounding.dtype)?;
    let mut scales = alloc(rows.scales(), DType::F32)?;
    {
        let results = [&mut codes, &mut scales].map(|one| Memory::of_mut(one, &rows.device));
        rows.round(results.each_ref().map(Memory::address))?;
    }
    Ok(Rounded { codes, row: rows.row(), scales })
}
