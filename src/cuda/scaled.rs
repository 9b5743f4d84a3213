//! Operands that no kernel of this crate takes as they are, e4m3 on some GPUs: products of others, and candle's kernels for the
//! rest.

use candle_core::backend::BackendStorage;
use candle_core::op::Mul;
use candle_core::{CudaStorage, DType, Layout, Result};

use super::engines::CudaWeight;
use super::fit::{self, Fitted, Want, fit};
use super::native::{Codewords, Panel};
use super::{empty, epilogue, native};
use crate::kernel::dequant::Codes;
use crate::op::{Epilogue, Rounding, View};
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
    let weight = match weight.facts.unit {
        true => CudaWeight { scales: unit, ..*weight },
        false => *weight,
    };
    let blocks = width < k || matches!(weight.facts.scheme, QuantScheme::Fp8 { per: Per::Block });
    let rows = match stack.fold_rows() {
        Some(rows) => Fitted::view(x.0, rows),
        None => fit(op, (x.0, &stack), Want { folded: true, ..Want::default() })?,
    };
    let lhs_layout = rows.stack.layout();
    let lhs = |group, scales| Codewords {
        kind: Codes::E4m3,
        dims: [m, k],
        group,
        codes: (rows.storage(), &lhs_layout),
        scales,
    };
    let by_row = u32::from(lhs_scales.1.dims()[0] > 1);
    if blocks {
        let group = [by_row, if width < k { width as u32 } else { 0 }];
        let lhs = lhs(group, lhs_scales).panel(op, DType::BF16)?;
        return product(op, &lhs, &weight, epilogue, bias);
    }
    let lhs = lhs([0, 0], unit).panel(op, DType::F16)?;
    let mut plain = weight;
    plain.scales = unit;
    plain.facts.scheme = QuantScheme::Fp8 { per: Per::Tensor };
    let mut sums = product(op, &lhs, &plain, Epilogue::round(DType::F32), None)?;
    fit::copyable(op, m * n)?;
    let row = if by_row == 1 { lhs_scales.1.stride()[0] } else { 0 };
    sums = times(&sums, (m, n), lhs_scales, [row, 0])?;
    sums = times(&sums, (m, n), weight.scales, columns(&weight))?;
    epilogue::apply(op, sums, (m * n, n), bias, epilogue)
}

/// `act(x·W + bias)` of floats rounded to e4m3, which no kernel multiplies.
pub(super) fn matmul_rounded(
    op: &'static str,
    x: View<CudaStorage>,
    rounding: Rounding,
    weight: &CudaWeight,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    let stack = Stack::new(x.1);
    let native::Rounded { codes, row, scales } =
        native::quantize_rows(op, (x.0, &stack), rounding)?;
    let (m, k) = (stack.count() * stack.rows, stack.cols);
    let codes = (&codes, &each((m, k), [row, 1], 0));
    let groups = packed((m, k.div_ceil(rounding.width)));
    matmul_fp8(op, codes, Some((&scales, &groups)), rounding.width, weight, epilogue, bias)
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
