//! Operands of eight bits where no kernel of this crate takes them as they are: products of what they stand for, and candle's
//! kernels for the rest.

use candle_core::backend::BackendStorage;
use candle_core::op::{Abs, Add, CmpOp, Div, Maximum, Minimum, Mul, ReduceOp, Round};
use candle_core::{CudaStorage, DType, Layout, Result};

use super::engines::CudaWeight;
use super::native::{Codewords, Panel};
use super::{empty, epilogue, fit, native};
use crate::kernel::dequant::Codes;
use crate::op::{Epilogue, View};
use crate::quant::quantize::E4M3_MAX;
use crate::quant::{Per, QuantScheme};
use crate::stack::Stack;

/// `act(Σ x·w + bias)`: codes of tensors, rows and columns are exact in f16, and scaled after their product; those of blocks
/// are multiplied in bf16, with their scales.
pub(super) fn matmul_fp8(
    op: &'static str,
    x: View<CudaStorage>,
    scales: Option<View<CudaStorage>>,
    width: usize,
    weight: &CudaWeight,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    let stack = Stack::new(x.1);
    let (m, k, n) = (stack.count() * stack.rows, stack.cols, weight.facts.dims[1]);
    let one = empty::full(x.0, 1, 1.0)?;
    let unit_layout = Layout::contiguous((1, 1));
    let unit = (&one, &unit_layout);
    let lhs_scales = scales.unwrap_or(unit);
    let blocks = width < k || matches!(weight.facts.scheme, QuantScheme::Fp8 { per: Per::Block });
    let lhs_layout = Layout::contiguous_with_offset((m, k), x.1.start_offset());
    let lhs = |group, scales| Codewords {
        kind: Codes::E4m3,
        dims: [m, k],
        group,
        codes: (x.0, &lhs_layout),
        scales,
    };
    let by_row = u32::from(lhs_scales.1.dims()[0] > 1);
    if blocks {
        let group = [by_row, if width < k { width as u32 } else { 0 }];
        let lhs = lhs(group, lhs_scales).panel(op, DType::BF16)?;
        return product(op, &lhs, weight, epilogue, bias);
    }
    let lhs = lhs([0, 0], unit).panel(op, DType::F16)?;
    let mut plain = *weight;
    plain.scales = unit;
    plain.facts.scheme = QuantScheme::Fp8 { per: Per::Tensor };
    let mut sums = product(op, &lhs, &plain, Epilogue::round(DType::F32), None)?;
    fit::copyable(op, m * n)?;
    let row = if by_row == 1 { lhs_scales.1.stride()[0] } else { 0 };
    sums = times(&sums, (m, n), lhs_scales, [row, 0])?;
    sums = times(&sums, (m, n), weight.scales, columns(weight))?;
    epilogue::apply(op, sums, (m * n, n), bias, epilogue)
}

fn product(
    op: &'static str,
    lhs: &Panel,
    weight: &CudaWeight,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    native::matmul_quant(op, (&lhs.storage, &lhs.layout), weight, false, epilogue, bias)
}

/// Strides of the scales of columns.
fn columns(weight: &CudaWeight) -> [usize; 2] {
    let layout = weight.scales.1;
    [0, if layout.dims()[1] == 1 { 0 } else { layout.stride()[1] }]
}

fn packed(dims: (usize, usize)) -> Layout {
    Layout::contiguous(dims)
}

fn each(dims: (usize, usize), strides: [usize; 2], offset: usize) -> Layout {
    Layout::new(dims.into(), strides.into(), offset)
}

/// Packed f32 times a matrix that is repeated by its strides.
fn times(
    sums: &CudaStorage,
    dims: (usize, usize),
    (scales, layout): View<CudaStorage>,
    strides: [usize; 2],
) -> Result<CudaStorage> {
    let at = each(dims, strides, layout.start_offset());
    match scales.dtype() {
        DType::F32 => sums.binary_impl::<Mul>(scales, &packed(dims), &at),
        _ => {
            let wide = scales.to_dtype(&Layout::contiguous(layout.shape()), DType::F32)?;
            sums.binary_impl::<Mul>(&wide, &packed(dims), &each(dims, strides, 0))
        }
    }
}

/// Activations rounded to int8 in u8 or to e4m3, and the scales of groups of `width` elements of each row.
pub(super) fn quantize_rows(
    op: &'static str,
    (x, layout): View<CudaStorage>,
    dtype: DType,
    width: usize,
) -> Result<(CudaStorage, CudaStorage)> {
    let dims = layout.dims();
    let (k, len) = (dims[dims.len() - 1], layout.shape().elem_count());
    let groups = k.div_ceil(width);
    let lines = len / k;
    fit::copyable(op, lines * groups * width)?;
    let mut wide = match x.dtype() {
        DType::F32 => fit::pack(x, layout)?,
        _ => x.to_dtype(layout, DType::F32)?,
    };
    if groups * width != k {
        wide = fit::pad(&wide, lines, k, 0, groups * width)?;
    }
    let shape = (lines * groups, width);
    let (all, ones) = (packed(shape), packed((lines * groups, 1)));
    let peaks = wide.unary_impl::<Abs>(&all)?.reduce_op(ReduceOp::Max, &all, &[1])?;
    // A sum of x·0 is 0, or NaN if any of them is infinite or NaN, which a maximum may pass over.
    let poison = wide.affine(&all, 0.0, 0.0)?.reduce_op(ReduceOp::Sum, &all, &[1])?;
    let most = if dtype == DType::U8 { 127.0 } else { E4M3_MAX };
    let scales = peaks.affine(&ones, 1.0 / f64::from(most), 0.0)?;
    let zero = empty::zeros(x, 1, DType::F32)?;
    let one = empty::full(x, 1, 1.0)?;
    let repeated = |shape| each(shape, [0, 0], 0);
    let none = peaks.cmp(CmpOp::Eq, &zero, &ones, &repeated((lines * groups, 1)))?;
    let scales = none.where_cond(&ones, &one, &repeated((lines * groups, 1)), &scales, &ones)?;
    let scales = scales.binary_impl::<Add>(&poison, &ones, &ones)?;
    let mut scaled = wide.binary_impl::<Div>(&scales, &all, &each(shape, [1, 0], 0))?;
    if groups * width != k {
        let kept = Layout::new((lines, k).into(), vec![groups * width, 1], 0);
        scaled = fit::pack(&scaled, &kept)?;
    }
    let all = Layout::contiguous(len);
    if dtype != DType::U8 {
        return Ok((scaled.to_dtype(&all, dtype)?, scales));
    }
    let bound = |value| empty::full(x, 1, value);
    let at = Layout::new(len.into(), vec![0], 0);
    let rounded = scaled
        .unary_impl::<Round>(&all)?
        .binary_impl::<Minimum>(&bound(127.0)?, &all, &at)?
        .binary_impl::<Maximum>(&bound(-127.0)?, &all, &at)?;
    // Two's complement.
    let negative = rounded.cmp(CmpOp::Lt, &zero, &all, &at)?;
    let wrapped = rounded.affine(&all, 1.0, 256.0)?;
    let bytes = negative.where_cond(&all, &wrapped, &all, &rounded, &all)?;
    Ok((bytes.to_dtype(&all, DType::U8)?, scales))
}
