//! Products of 8-bit operands, which tensor cores take along K alone.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Shape};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::engines::CudaWeight;
use super::super::fit::pack;
use super::super::{Operand, empty};
use super::along_k::{activations, lies_along_k, weight};
use super::matmul::{Call, CallScales};
use super::ones::{Ones, ones};
use super::operand::{ALIGN, Lines, Source, element, row};
use super::quantize::Rows;
use crate::error::Error;
use crate::kernel::Element;
use crate::kernel::gemm::{BLOCK, Epilogue, Scale};
use crate::op::{self, Rounding, View};
use crate::ptx::{Factor, Target};
use crate::quant::{Per, QuantScheme};
use crate::stack::Stack;

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
    let (device, weight) = (x.device(), (w.codes.0, &rhs));
    let sums = match zero_point {
        0 => None,
        _ => Some(column_sums(op, device, weight)?),
    };
    let columns = Layout::contiguous(rhs.cols);
    let zero = sums.as_ref().map(|sums| (zero_point, (sums, &columns)));
    let rows = rows.map(|rows| Held::new(rows, 0, rows.1.dims()[0]));
    let lines = LineScales::new(op, device, rows.transpose()?, w)?;
    let x = activations(op, (x, &stack))?;
    let scales = lines.scales(one, zero);
    codes_call(op, device, Factor::S8, (x, weight), scales, bias, epilogue)?.run_chosen()
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
    let (device, weight, k) = (x.device(), (w.codes.0, &rhs), stack.cols);
    let Some(scales) = Fp8Scales::of(op, device, (width, k), w)? else { return Ok(None) };
    let blocks = [k, rhs.cols].map(|len| len.div_ceil(BLOCK as usize));
    let m = stack.count() * stack.rows;
    let product = |scales| {
        let x = activations(op, (x, &stack))?;
        let call = codes_call(op, device, Factor::E4m3, (x, weight), scales, bias, epilogue)?;
        call.run_chosen().map(Some)
    };
    match scales {
        Fp8Scales::Lines => {
            let rows = rows.map(|rows| Held::new(rows, 0, rows.1.dims()[0]));
            let lines = LineScales::new(op, device, rows.transpose()?, w)?;
            product(lines.scales(1.0, None))
        }
        Fp8Scales::Blocks => {
            // Scales of more than one block are repeated.
            let one = match rows.is_none() || w.facts.unit {
                true => Some(empty::full(x, 1, 1.0)?),
                false => None,
            };
            let unit = Layout::contiguous((1, 1));
            let given = |scales: Option<_>| {
                scales.or(one.as_ref().map(|one| (one, &unit))).expect("a one for what is missing")
            };
            let rows = repeated(given(rows), [m, blocks[0]])?;
            let cols = repeated(given((!w.facts.unit).then_some(w.scales)), blocks)?;
            product(CodeScales::Blocks { rows: rows.vector(), cols: cols.vector() })
        }
    }
}

/// Scales of e4m3 that there are kernels for.
enum Fp8Scales {
    /// Of rows and columns.
    Lines,
    /// Of blocks along the depth.
    Blocks,
}

impl Fp8Scales {
    /// With groups of `width` of the `k` elements of a row of activations.
    fn of(
        op: &'static str,
        device: &CudaDevice,
        (width, k): (usize, usize),
        w: &CudaWeight,
    ) -> Result<Option<Self>> {
        let QuantScheme::Fp8 { per } = w.facts.scheme else { return Ok(None) };
        let lines = width >= k && per != Per::Block;
        let grouped = width >= k || width == BLOCK as usize;
        Ok(match takes_e4m3(op, device, lines)? {
            false => None,
            true if lines => Some(Self::Lines),
            true => (grouped && per != Per::Channel).then_some(Self::Blocks),
        })
    }
}

/// `act(x·w + bias)` of floats, rounded to codes here; `None` if there is no kernel for these. Neither the result nor the depth
/// is empty.
pub(crate) fn matmul_rounded(
    op: &'static str,
    (x, layout): View<CudaStorage>,
    rounding: Rounding,
    w: &CudaWeight,
    epilogue: op::Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<Option<CudaStorage>> {
    /// Bytes of codes and scales up to which they lie behind the result, as long as that lives: a call of few rows takes
    /// the host's time, and each allocation a part of it.
    const BEHIND: usize = 1 << 16;
    /// Bytes of a weight, and products, that take the GPU no longer than its two launches the host: some 8 µs.
    const SHORT: [usize; 2] = [1 << 25, 1 << 32];

    let (stack, rhs) = (Stack::new(layout), Stack::new(w.codes.1));
    let (device, weight, k) = (x.device(), (w.codes.0, &rhs), stack.cols);
    let m = stack.count() * stack.rows;
    let factor = if rounding.dtype == DType::U8 { Factor::S8 } else { Factor::E4m3 };
    let blocks = match factor {
        Factor::E4m3 => match Fp8Scales::of(op, device, (rounding.width, k), w)? {
            None => return Ok(None),
            Some(scales) => matches!(scales, Fp8Scales::Blocks),
        },
        _ => false,
    };
    let rows = Rows::new(op, (x, &stack), rounding)?;
    let (codes, scratch) = (rows.codes(), rows.codes() + WORD * rows.scales());
    let (len, size) = (m * rhs.cols, epilogue.out_dtype.size_in_bytes());
    let before = (len * size).next_multiple_of(ALIGN);
    let behind = scratch <= BEHIND;
    let alloc = |bytes: usize, dtype: DType| {
        uninit(device, &Shape::from(bytes.div_ceil(dtype.size_in_bytes())), dtype)
    };
    let mut out = alloc(if behind { before + scratch } else { len * size }, epilogue.out_dtype)?;
    let mut own = if behind { None } else { Some(alloc(scratch, DType::U8)?) };
    // Rounds to memory behind the result, which stays where it is, or to what is held until all is submitted.
    let held = own.as_mut().map(|own| Memory::of_mut(own, device));
    let at = match &held {
        Some(held) => held.address(),
        None => Memory::of_mut(&mut out, device).address() + before as u64,
    };
    let lhs = Stack::row_major(m, rows.row()).narrow(m, k);
    let lines = lies_along_k(&lhs, rounding.dtype).expect("rows of codes begin where lines do");
    let lhs = (Source::Held(at, lhs), lines);
    let scales = Vector::At(at + codes as u64, rows.scales());
    let lines;
    let scales = match blocks {
        // Of as many blocks as the weight's are.
        true => CodeScales::Blocks { rows: scales, cols: Vector::Of(w.scales.0, w.scales.1) },
        false => {
            lines =
                LineScales::new(op, device, Some(Held::At(at + codes as u64, rows.scales())), w)?;
            lines.scales(1.0, None)
        }
    };
    let call = codes_call(op, device, factor, (lhs, weight), scales, bias, epilogue)?;
    let short = k * rhs.cols <= SHORT[0] && m * k * rhs.cols <= SHORT[1];
    rows.round_and([at, at + codes as u64], |mut launches| {
        if short {
            launches.are_short();
        }
        call.run_chosen_after(launches, &mut out)
    })?;
    drop(held);
    Ok(Some(out))
}

/// Bytes of a scale.
const WORD: usize = size_of::<f32>();

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
    /// The first of ones.
    Ones(Arc<Ones>, usize),
    /// At an address that the caller holds.
    At(u64, usize),
}

impl Held<'_> {
    fn vector(&self) -> Vector<'_> {
        match self {
            Self::View(storage, layout) => Vector::Of(storage, layout),
            Self::Made(storage, layout) => Vector::Of(storage, layout),
            Self::Ones(ones, len) => Vector::At(ones.address(), *len),
            &Self::At(address, len) => Vector::At(address, len),
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
    /// Those of x, one for each row or for all, or none, and of a weight.
    fn new(
        op: &'static str,
        device: &CudaDevice,
        rows: Option<Held<'a>>,
        w: &CudaWeight<'a>,
    ) -> Result<Self> {
        let n = w.facts.dims[1];
        let ones =
            |len| Ok::<_, candle_core::Error>(Held::Ones(ones(op, device, DType::F32, len)?, len));
        Ok(match rows {
            // One for all columns is one for all rows as well.
            None if !w.facts.unit && w.scales.1.dims()[1] == 1 => {
                Self { rows: Held::new(w.scales, 1, 1)?, cols: ones(n)? }
            }
            rows => Self {
                rows: rows.map_or_else(|| ones(1), Ok)?,
                cols: if w.facts.unit { ones(n)? } else { Held::new(w.scales, 1, n)? },
            },
        })
    }

    fn scales<'b>(
        &'b self,
        one: f32,
        zero: Option<(i32, View<'b, CudaStorage>)>,
    ) -> CodeScales<'b> {
        CodeScales::Lines { one, rows: self.rows.vector(), cols: self.cols.vector(), zero }
    }
}

/// f32 without gaps.
#[derive(Clone, Copy)]
pub(crate) enum Vector<'a> {
    /// All elements of a view.
    Of(&'a CudaStorage, &'a Layout),
    /// So many at an address, a multiple of 16, that the caller holds.
    At(u64, usize),
}

impl<'a> Vector<'a> {
    fn fit(self, op: &'static str) -> Result<Source<'a>> {
        Ok(match self {
            Self::Of(storage, layout) => row(op, (storage, layout))?.into(),
            Self::At(address, len) => Source::Held(address, Stack::row_major(1, len)),
        })
    }

    /// The same in one dimension.
    fn flat(self, op: &'static str) -> Result<Source<'a>> {
        match self {
            Self::Of(storage, layout) => {
                let len = layout.shape().elem_count();
                let layout = Layout::contiguous_with_offset(len, layout.start_offset());
                Ok(row(op, (storage, &layout))?.into())
            }
            at => at.fit(op),
        }
    }
}

/// What products of codes are multiplied with, in f32.
#[derive(Clone, Copy)]
pub(crate) enum CodeScales<'a> {
    /// A number for all, one or one for each row, and one for each column; and the zero point of x, with the i32
    /// sums of the weight's columns.
    Lines {
        one: f32,
        rows: Vector<'a>,
        cols: Vector<'a>,
        zero: Option<(i32, View<'a, CudaStorage>)>,
    },
    /// `[rows, ⌈K/128⌉]` of x and `[⌈K/128⌉, ⌈N/128⌉]` of the weight, both without gaps.
    Blocks { rows: Vector<'a>, cols: Vector<'a> },
}

impl<'a> CodeScales<'a> {
    /// As a launch takes them, and what the epilogue does with them.
    fn fit(self, op: &'static str) -> Result<(Scale, CallScales<'a>)> {
        Ok(match self {
            Self::Blocks { rows, cols } => {
                (Scale::Blocks, CallScales::Blocks { rows: rows.flat(op)?, cols: cols.flat(op)? })
            }
            Self::Lines { one, rows, cols, zero } => {
                let scale = if zero.is_some() { Scale::ZeroPoint } else { Scale::Lines };
                let zero = match zero {
                    None => None,
                    Some((zero, sums)) => Some((zero, row(op, sums)?.into())),
                };
                let (rows, cols) = (rows.fit(op)?, cols.fit(op)?);
                (scale, CallScales::Lines { one, rows, cols, zero })
            }
        })
    }

    /// The same of sums that may have none.
    pub(super) fn fit_if_any(
        op: &'static str,
        scales: Option<Self>,
    ) -> Result<(Scale, CallScales<'a>)> {
        scales.map_or(Ok((Scale::None, CallScales::None)), |scales| scales.fit(op))
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

/// `act(scales · (x - zero)·w + bias)` of bytes, int8 or e4m3, on a device; lines along K of activations, and `[K, N]`, which are
/// not empty.
pub(super) fn codes_call<'a>(
    op: &'static str,
    device: &CudaDevice,
    factor: Factor,
    ((x, x_lines), w): ((impl Into<Source<'a>>, Lines), Operand<'a>),
    scales: CodeScales<'a>,
    bias: Option<View<'a, CudaStorage>>,
    op::Epilogue { out_dtype, activation }: op::Epilogue,
) -> Result<Call<'a>> {
    let lines = matches!(scales, CodeScales::Lines { .. });
    if factor == Factor::E4m3 && !takes_e4m3(op, device, lines)? {
        let (what, fix) = (
            "this crate".into(),
            "take one of compute capability 9.0, or without scales of blocks 8.9".into(),
        );
        let limit = "has no kernels for e4m3 on this GPU".into();
        return Err(Error::Unsupported { op, what, limit, fix }.into());
    }
    let (m, n) = (x_lines.outer, w.1.cols);
    let (scale, scales) = scales.fit(op)?;
    let epilogue = Epilogue {
        scale,
        bias: bias.map(|(storage, _)| element(storage.dtype())),
        activation,
        ..Epilogue::round(element(out_dtype))
    };
    let (b, b_lines) = weight(op, w)?;
    let operands = [((x.into(), x_lines), factor), ((b.into(), b_lines), factor)];
    Call::of(op, device, operands, epilogue, scales, bias, (out_dtype, m * n))
}

/// i32: the sums of the columns of an int8 weight `[K, N]`, which is not empty: a product with ones.
fn column_sums(op: &'static str, device: &CudaDevice, w: Operand) -> Result<CudaStorage> {
    let (k, n) = (w.1.rows, w.1.cols);
    let row = k.next_multiple_of(ALIGN);
    let ones = ones(op, device, DType::U8, row)?;
    let one = Stack::row_major(1, row).narrow(1, k);
    let lines = lies_along_k(&one, DType::U8).expect("a line");
    let (b, b_lines) = weight(op, w)?;
    let call = Call::of(
        op,
        device,
        [
            ((Source::Held(ones.address(), one), lines), Factor::S8),
            ((b.into(), b_lines), Factor::S8),
        ],
        Epilogue { scale: Scale::Exact, ..Epilogue::round(Element::F32) },
        CallScales::None,
        None,
        (DType::I32, n),
    )?;
    call.run_chosen()
}
