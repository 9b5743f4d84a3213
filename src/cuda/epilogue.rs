//! What is done to the sums of a product, in candle's kernels: for products that have no kernel of this
//! crate.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::{Add, CmpOp, Gelu, GeluErf, Silu};
use candle_core::{CudaStorage, DType, Layout, Result};

use super::fit::copyable;
use crate::Activation;
use crate::op::{Epilogue, View};

/// Bias, activation and rounding of `len` packed f32 sums, in rows of `n`.
pub(super) fn apply(
    op: &'static str,
    mut sums: CudaStorage,
    (len, n): (usize, usize),
    bias: Option<View<CudaStorage>>,
    epilogue: Epilogue,
) -> Result<CudaStorage> {
    let Epilogue { out_dtype, activation } = epilogue;
    if bias.is_some() || activation.is_some() || out_dtype != DType::F32 {
        copyable(op, len)?;
    }
    if let Some(bias) = bias {
        sums = add_row(&sums, (len, n), bias)?;
    }
    if let Some(activation) = activation {
        sums = activate(&sums, len, activation)?;
    }
    match out_dtype {
        DType::F32 => Ok(sums),
        _ => sums.to_dtype(&Layout::contiguous(len), out_dtype),
    }
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
