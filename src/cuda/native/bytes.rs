//! Products of 8-bit operands, which tensor cores take along K alone.

use candle_core::backend::BackendStorage;
use candle_core::scalar::Scalar;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};

use super::super::Operand;
use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::fit::{Fitted, Want, fit};
use super::matmul::{Call, CallScales};
use super::operand::{ALIGN, Lines, element, per_chunk, row};
use super::plan::Plans;
use crate::error::Error;
use crate::kernel::Element;
use crate::kernel::gemm::{Epilogue, Major, Scale};
use crate::kernel::transpose;
use crate::op::{self, View};
use crate::ptx::{Factor, Target};
use crate::stack::Stack;

static TRANSPOSITIONS: Plans<transpose::Plan> = Plans::new();

/// f32 `scale · x·w` of int8 bytes, exact before the scale. The operands are not empty.
pub(crate) fn matmul_int8(
    op: &'static str,
    x: Operand,
    w: Operand,
    scale: f32,
) -> Result<CudaStorage> {
    let (m, n) = (x.1.count() * x.1.rows, w.1.cols);
    let call = Call::of(
        op,
        [(activations(op, x)?, Factor::S8), (weight(op, w)?, Factor::S8)],
        Epilogue { scale: Scale::One, ..Epilogue::round(Element::F32) },
        CallScales::One(scale),
        None,
        (DType::F32, m * n),
    )?;
    call.run_chosen()
}

/// What products of codes are multiplied with, in f32.
#[derive(Clone, Copy)]
pub(crate) enum CodeScales<'a> {
    /// A number for all, one or one for each row, and one for each column; and the zero point of x, with the i32
    /// sums of the weight's columns.
    Lines {
        one: f32,
        rows: View<'a, CudaStorage>,
        cols: View<'a, CudaStorage>,
        zero: Option<(i32, View<'a, CudaStorage>)>,
    },
    /// `[rows, ⌈K/128⌉]` of x and `[⌈K/128⌉, ⌈N/128⌉]` of the weight, both without gaps.
    Blocks { rows: View<'a, CudaStorage>, cols: View<'a, CudaStorage> },
}

impl<'a> CodeScales<'a> {
    /// As a launch takes them, and what the epilogue does with them.
    fn fit(self, op: &'static str) -> Result<(Scale, CallScales<'a>)> {
        Ok(match self {
            Self::Blocks { rows, cols } => {
                let flat = |(storage, layout): View<'a, CudaStorage>| {
                    let len = layout.shape().elem_count();
                    let layout = Layout::contiguous_with_offset(len, layout.start_offset());
                    row(op, (storage, &layout))
                };
                (Scale::Blocks, CallScales::Blocks { rows: flat(rows)?, cols: flat(cols)? })
            }
            Self::Lines { one, rows, cols, zero } => {
                let scale = if zero.is_some() { Scale::ZeroPoint } else { Scale::Lines };
                let zero = match zero {
                    None => None,
                    Some((zero, sums)) => Some((zero, row(op, sums)?)),
                };
                let (rows, cols) = (row(op, rows)?, row(op, cols)?);
                (scale, CallScales::Lines { one, rows, cols, zero })
            }
        })
    }
}

/// Whether the kernels multiply e4m3 on a GPU.
pub(crate) fn takes_e4m3(op: &'static str, device: &CudaDevice) -> Result<bool> {
    Ok(Gpu::of(op, device)?.device.target == Target::Sm90a)
}

/// `act(scales · (x - zero)·w + bias)` of bytes, int8 or e4m3; `[.., M, K]` and `[K, N]`, which are not empty.
pub(crate) fn matmul_codes(
    op: &'static str,
    factor: Factor,
    x: Operand,
    w: Operand,
    scales: CodeScales,
    bias: Option<View<CudaStorage>>,
    epilogue: op::Epilogue,
) -> Result<CudaStorage> {
    codes_call(op, factor, x, w, scales, bias, epilogue)?.run_chosen()
}

pub(super) fn codes_call<'a>(
    op: &'static str,
    factor: Factor,
    x: Operand<'a>,
    w: Operand<'a>,
    scales: CodeScales<'a>,
    bias: Option<View<'a, CudaStorage>>,
    op::Epilogue { out_dtype, activation }: op::Epilogue,
) -> Result<Call<'a>> {
    if factor == Factor::E4m3 && !takes_e4m3(op, x.0.device())? {
        let (what, fix) = ("this crate".into(), "take one of compute capability 9.0".into());
        let limit = "has no kernels for e4m3 on this GPU".into();
        return Err(Error::Unsupported { op, what, limit, fix }.into());
    }
    let (m, n) = (x.1.count() * x.1.rows, w.1.cols);
    let (scale, scales) = scales.fit(op)?;
    let epilogue = Epilogue {
        scale,
        bias: bias.map(|(storage, _)| element(storage.dtype())),
        activation,
        ..Epilogue::round(element(out_dtype))
    };
    let operands = [(activations(op, x)?, factor), (weight(op, w)?, factor)];
    Call::of(op, operands, epilogue, scales, bias, (out_dtype, m * n))
}

/// i32: the sums of the columns of an int8 weight `[K, N]`, which is not empty: a product with ones.
pub(crate) fn column_sums(op: &'static str, w: Operand) -> Result<CudaStorage> {
    let (k, n) = (w.1.rows, w.1.cols);
    let mut ones = uninit(w.0.device(), &Shape::from(k), DType::U8)?;
    ones.const_set(Scalar::U8(1), &Layout::contiguous(k))?;
    let row = Stack::row_major(1, k);
    let call = Call::of(
        op,
        [(activations(op, (&ones, &row))?, Factor::S8), (weight(op, w)?, Factor::S8)],
        Epilogue { scale: Scale::Exact, ..Epilogue::round(Element::F32) },
        CallScales::None,
        None,
        (DType::I32, n),
    )?;
    call.run_chosen()
}

/// Activations as one matrix whose rows begin at multiples of 16 bytes: as they are, or a copy.
pub(super) fn activations<'a>(
    op: &'static str,
    (storage, stack): Operand<'a>,
) -> Result<(Fitted<'a>, Lines)> {
    let unit = per_chunk(storage.dtype());
    let lines = |stack: &Stack| Lines::of(stack, unit).filter(|lines| lines.major == Major::K);
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

/// A weight `[K, N]` as lines along K.
fn weight<'a>(op: &'static str, (storage, stack): Operand<'a>) -> Result<(Fitted<'a>, Lines)> {
    let unit = per_chunk(storage.dtype());
    let (rows, cols) = (stack.rows, stack.cols);
    let across = match Lines::of(&stack.t(), unit) {
        Some(lines) if lines.major == Major::K => {
            return Ok((Fitted::view(storage, stack.t()), lines));
        }
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
    if let Some((got, most)) = problem.limit() {
        let (what, limit) = ("this crate".into(), format!("cannot take {got} (at most {most})"));
        let fix = "split it and join the results with `Tensor::cat`".into();
        return Err(Error::Unsupported { op, what, limit, fix }.into());
    }
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
