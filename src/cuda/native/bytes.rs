//! Products of 8-bit operands, which tensor cores take along K alone.

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::scalar::Scalar;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::super::engines::CudaWeight;
use super::super::fit::{Fitted, Want, fit, pack};
use super::super::{Operand, empty};
use super::limit::{SPLIT, countable};
use super::matmul::{Call, CallScales};
use super::operand::{ALIGN, Lines, element, per_chunk, row};
use super::plan::Plans;
use super::w4::CodeLines;
use crate::error::Error;
use crate::kernel::Element;
use crate::kernel::gemm::{BLOCK, Epilogue, Major, Scale};
use crate::kernel::transpose;
use crate::op::{self, View};
use crate::ptx::{Factor, Target};
use crate::quant::planes::{Form, Planes};
use crate::quant::{Per, QuantScheme};
use crate::stack::Stack;

static TRANSPOSITIONS: Plans<transpose::Plan> = Plans::new();

/// The form in which the kernels read a weight of bytes, if it is another one: codes along K, `[n, ..]` with each row of a
/// multiple of 16 bytes, and scales in f32.
pub(super) fn repack(op: &'static str, planes: &Planes) -> Result<Option<Form>> {
    let own = Planes { scales: planes.scales.to_dtype(DType::F32)?, ..planes.clone() };
    Ok(match along_k(op, planes)? {
        Some(codes) => Some(Form::Packed(Planes { codes, ..own })),
        None => (planes.scales.dtype() != DType::F32).then_some(Form::Plain(own)),
    })
}

/// Where codes are that lie along K.
pub(super) fn code_lines(weight: &CudaWeight) -> Option<CodeLines> {
    let (codes, layout) = weight.codes;
    let along = Stack::new(layout).t();
    let lines = lies_along_k(&along, codes.dtype())?;
    Some(CodeLines { first: along.matrix_offset(0), line: lines.stride })
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

/// `act(scale · rows · columns · Σ (x − zero_point)·w + bias)` of int8 bytes; neither the result nor the depth is
/// empty.
pub(crate) fn matmul_int8(
    op: &'static str,
    (x, layout): View<CudaStorage>,
    rows: Option<View<CudaStorage>>,
    (one, zero_point): (f32, i32),
    w: &CudaWeight,
    epilogue: op::Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    let (stack, rhs) = (Stack::new(layout), Stack::new(w.codes.1));
    let weight = (w.codes.0, &rhs);
    let sums = match zero_point {
        0 => None,
        _ => Some(column_sums(op, weight)?),
    };
    let columns = Layout::contiguous(rhs.cols);
    let zero = sums.as_ref().map(|sums| (zero_point, (sums, &columns)));
    let lines = LineScales::new(x, rows, w)?;
    let scales = lines.scales(one, zero);
    matmul_codes(op, Factor::S8, (x, &stack), weight, scales, bias, epilogue)
}

/// `act(Σ x·w + bias)` of e4m3, each with its scales, those of x of groups of `width` elements of a row; `None` if
/// there is no kernel for it. Neither the result nor the depth is empty.
pub(crate) fn matmul_fp8(
    op: &'static str,
    (x, layout): View<CudaStorage>,
    rows: Option<View<CudaStorage>>,
    width: usize,
    w: &CudaWeight,
    epilogue: op::Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<Option<CudaStorage>> {
    let (stack, rhs) = (Stack::new(layout), Stack::new(w.codes.1));
    let (x, weight, k) = ((x, &stack), (w.codes.0, &rhs), stack.cols);
    let per = match w.facts.scheme {
        QuantScheme::Fp8 { per } => per,
        _ => return Ok(None),
    };
    let lines = width >= k && per != Per::Block;
    if !takes_e4m3(op, x.0.device(), lines)? {
        return Ok(None);
    }
    let product = |scales| matmul_codes(op, Factor::E4m3, x, weight, scales, bias, epilogue);
    let blocks = [k, rhs.cols].map(|len| len.div_ceil(BLOCK as usize));
    if lines {
        let lines = LineScales::new(x.0, rows, w)?;
        return Ok(Some(product(lines.scales(1.0, None))?));
    }
    // Of blocks along the depth; scales of more than one are repeated.
    let grouped = width >= k || width == BLOCK as usize;
    let (Some(rows), true, Per::Block | Per::Tensor) = (rows, grouped, per) else {
        return Ok(None);
    };
    let rows = repeated(rows, [stack.count() * stack.rows, blocks[0]])?;
    let cols = repeated(w.scales, blocks)?;
    Ok(Some(product(CodeScales::Blocks { rows: rows.view(), cols: cols.view() })?))
}

/// A matrix of f32 without gaps, of `dims`: sides of one are repeated.
fn repeated<'a>((storage, layout): View<'a, CudaStorage>, dims: [usize; 2]) -> Result<Held<'a>> {
    let [rows, cols] = dims;
    let stride = |side: usize| match layout.dims()[side] {
        1 => 0,
        _ => layout.stride()[side],
    };
    let at = Layout::new((rows, cols).into(), vec![stride(0), stride(1)], layout.start_offset());
    Ok(match storage.dtype() {
        DType::F32 if at.is_contiguous() => Held::View(storage, at),
        DType::F32 => Held::Made(pack(storage, &at)?, Layout::contiguous((rows, cols))),
        _ => Held::Made(storage.to_dtype(&at, DType::F32)?, Layout::contiguous((rows, cols))),
    })
}

/// Scales of rows and columns as vectors of f32.
struct LineScales<'a> {
    rows: Held<'a>,
    cols: Held<'a>,
}

/// A vector, or what had to be made for it.
enum Held<'a> {
    View(&'a CudaStorage, Layout),
    Made(CudaStorage, Layout),
}

impl Held<'_> {
    fn view(&self) -> View<'_, CudaStorage> {
        match self {
            Self::View(storage, layout) => (storage, layout),
            Self::Made(storage, layout) => (storage, layout),
        }
    }

    /// `len` elements of a matrix that follow each other along a side, or one for all of them.
    fn new<'a>(
        (storage, layout): View<'a, CudaStorage>,
        side: usize,
        len: usize,
    ) -> Result<Held<'a>> {
        let stride = if layout.dims()[side] == 1 { 0 } else { layout.stride()[side] };
        let at = |offset| Layout::new(len.into(), vec![stride], offset);
        Ok(match storage.dtype() {
            DType::F32 => Held::View(storage, at(layout.start_offset())),
            _ => {
                let wide = storage.to_dtype(&at(layout.start_offset()), DType::F32)?;
                Held::Made(wide, Layout::contiguous(len))
            }
        })
    }
}

impl<'a> LineScales<'a> {
    /// Those of x, `[rows, 1]`, 1 or none, and of a weight.
    fn new(
        x: &CudaStorage,
        rows: Option<View<'a, CudaStorage>>,
        w: &CudaWeight<'a>,
    ) -> Result<Self> {
        let rows = match rows {
            Some(rows) => Held::new(rows, 0, rows.1.dims()[0])?,
            None => Held::Made(empty::full(x, 1, 1.0)?, Layout::contiguous(1)),
        };
        Ok(Self { rows, cols: Held::new(w.scales, 1, w.facts.dims[1])? })
    }

    fn scales<'b>(
        &'b self,
        one: f32,
        zero: Option<(i32, View<'b, CudaStorage>)>,
    ) -> CodeScales<'b> {
        CodeScales::Lines { one, rows: self.rows.view(), cols: self.cols.view(), zero }
    }
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

/// Whether the kernels multiply e4m3 on a GPU, with scales of lines or else of blocks.
fn takes_e4m3(op: &'static str, device: &CudaDevice, lines: bool) -> Result<bool> {
    Ok(match Gpu::of(op, device)?.device.target {
        Target::Sm80 => false,
        Target::Sm89 => lines,
        Target::Sm90a => true,
    })
}

/// `act(scales · (x - zero)·w + bias)` of bytes, int8 or e4m3; `[.., M, K]` and `[K, N]`, which are not empty.
fn matmul_codes(
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
    let lines = matches!(scales, CodeScales::Lines { .. });
    if factor == Factor::E4m3 && !takes_e4m3(op, x.0.device(), lines)? {
        let (what, fix) = (
            "this crate".into(),
            "take one of compute capability 9.0, or without scales of blocks 8.9".into(),
        );
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
fn column_sums(op: &'static str, w: Operand) -> Result<CudaStorage> {
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
fn lies_along_k(stack: &Stack, dtype: DType) -> Option<Lines> {
    Lines::of(stack, per_chunk(dtype)).filter(|lines| lines.major == Major::K)
}

/// A weight `[K, N]` as lines along K.
fn weight<'a>(op: &'static str, (storage, stack): Operand<'a>) -> Result<(Fitted<'a>, Lines)> {
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
