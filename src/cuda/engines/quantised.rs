//! Quantised weights, and products of codes.

use candle_core::{CudaStorage, DType, Result, Tensor};

use crate::op::{Epilogue, Rounding, View};
use crate::quant::QuantScheme;
use crate::quant::load::int4::Packing;
use crate::quant::planes::{Form, Planes, Weight};

#[cfg(feature = "cuda")]
use {
    super::super::{empty, native, scaled},
    crate::op::MatmulProblem,
    candle_core::Layout,
};

/// A weight on a GPU.
pub(crate) type CudaWeight<'a> = Weight<View<'a, CudaStorage>>;

/// A packed weight in the form that files hold.
pub(crate) fn unpack(op: &'static str, packed: &Planes) -> Result<Planes> {
    on_gpu!(native::unpack(op, packed))
}

/// The form in which products read a weight that is in the plain one, if it is another.
pub(crate) fn repack(op: &'static str, plain: &Planes) -> Result<Option<Form>> {
    on_gpu!(native::repack(op, plain))
}

/// The same of a weight in the layout of `quantize_int4`, of any strides and not empty.
pub(crate) fn pack_signed(op: &'static str, planes: &Planes) -> Result<Form> {
    on_gpu!(native::pack_signed(op, planes))
}

/// Plain codes of four bits, u32 `[⌈k/8⌉, n]`, of a checkpoint's words on a GPU, whose rows may be taken in an order; past the
/// last one is `fill`. No dimension is 0.
pub(crate) fn regroup(
    op: &'static str,
    words: &Tensor,
    packing: Packing,
    dims: [usize; 2],
    order: Option<&Tensor>,
    fill: u8,
) -> Result<Tensor> {
    on_gpu!(native::regroup(op, words, packing, dims, order, fill))
}

/// The sum of all codes of words `[⌈k/8⌉, n]` on a GPU, each of eight rows.
pub(crate) fn sum_of_codes(op: &'static str, words: &Tensor, dims: [usize; 2]) -> Result<f64> {
    on_gpu!(native::sum_of_codes(op, words, dims))
}

/// A weight `[K, N]` on a GPU rounded to codes: finite floats, at least one.
pub(crate) fn encode(op: &'static str, weight: &Tensor, scheme: QuantScheme) -> Result<Planes> {
    on_gpu!(native::encode(op, weight, scheme))
}

/// The largest magnitude of a matrix of floats on a GPU, of which it is all that is read: infinite or NaN if any is.
pub(crate) fn peak(op: &'static str, matrix: &Tensor) -> Result<f32> {
    on_gpu!(native::peak(op, matrix))
}

/// A weight in a float dtype, row-major.
pub(crate) fn dequantize(
    op: &'static str,
    weight: &CudaWeight,
    dtype: DType,
) -> Result<CudaStorage> {
    on_gpu!({
        match weight.facts.dims.contains(&0) {
            true => empty::zeros(weight.scales.0, 0, dtype),
            false => native::dequantize(op, weight, dtype),
        }
    })
}

/// The product of a weight, or of it transposed, if the result or the depth is empty.
#[cfg(feature = "cuda")]
fn of_nothing(
    op: &'static str,
    x: View<CudaStorage>,
    weight: &CudaWeight,
    transposed: bool,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<Option<CudaStorage>> {
    let layout = Layout::contiguous(&weight.facts.dims[..]);
    let layout = if transposed { layout.transpose(0, 1)? } else { layout };
    let problem = MatmulProblem::new(op, x.1, &layout)?;
    let nothing = problem.out.elem_count() == 0 || problem.lhs.cols == 0;
    nothing.then(|| empty::matmul(op, &problem, epilogue, x.0, bias)).transpose()
}

/// `act(x·W + bias)`, or `x·Wᵀ`, of f16 or bf16 activations.
pub(crate) fn matmul_quant(
    op: &'static str,
    x: View<CudaStorage>,
    weight: &CudaWeight,
    transposed: bool,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        if let Some(out) = of_nothing(op, x, weight, transposed, epilogue, bias)? {
            return Ok(out);
        }
        native::matmul_quant(op, x, weight, transposed, epilogue, bias)
    })
}

/// `act(x·W)` of f16 or bf16 activations for each of some weights, if one kernel makes all of them.
pub(crate) fn matmul_quant_all(
    op: &'static str,
    x: View<CudaStorage>,
    weights: &[CudaWeight],
    epilogue: Epilogue,
) -> Result<Option<Vec<CudaStorage>>> {
    on_gpu!(match weights.len() > 1 && together(x, weights) {
        true => native::matmul_quant_all(op, x, weights, native::Results::Each, epilogue),
        false => Ok(None),
    })
}

/// `act(x·G) · (x·U)` of f16 or bf16 activations, if one kernel makes it.
pub(crate) fn matmul_quant_gated(
    op: &'static str,
    x: View<CudaStorage>,
    weights: &[CudaWeight; 2],
    epilogue: Epilogue,
) -> Result<Option<CudaStorage>> {
    on_gpu!(match together(x, weights) {
        true => {
            let gated = native::Results::Gated;
            let all = native::matmul_quant_all(op, x, weights, gated, epilogue)?;
            Ok(all.and_then(|all| all.into_iter().next()))
        }
        false => Ok(None),
    })
}

/// Whether x and weights may be a kernel's that has several weights: nothing is empty, nor has a power of its own.
#[cfg(feature = "cuda")]
fn together(x: View<CudaStorage>, weights: &[CudaWeight]) -> bool {
    let unfit = |w: &CudaWeight| w.facts.dims.contains(&0) || native::divides(x, w);
    x.1.shape().elem_count() > 0 && !weights.iter().any(unfit)
}

/// `act(scale · rows · columns · Σ (x − zero_point)·w + bias)` of int8 bytes, with `factors` scale and zero point.
pub(crate) fn matmul_int8(
    op: &'static str,
    x: View<CudaStorage>,
    scales: Option<View<CudaStorage>>,
    factors: (f32, i32),
    weight: &CudaWeight,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        if let Some(out) = of_nothing(op, x, weight, false, epilogue, bias)? {
            return Ok(out);
        }
        native::matmul_int8(op, x, scales, factors, weight, epilogue, bias)
    })
}

/// `act(Σ x·w + bias)` of e4m3, each with its scales: those of x of groups of `width` elements of a row.
pub(crate) fn matmul_fp8(
    op: &'static str,
    x: View<CudaStorage>,
    scales: Option<View<CudaStorage>>,
    width: usize,
    weight: &CudaWeight,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        if let Some(out) = of_nothing(op, x, weight, false, epilogue, bias)? {
            return Ok(out);
        }
        match native::matmul_fp8(op, x, scales, width, weight, epilogue, bias)? {
            Some(out) => Ok(out),
            None => scaled::matmul_fp8(op, x, scales, width, weight, epilogue, bias),
        }
    })
}

/// `act(x·W + bias)` of floats that are rounded to the codes of the weight's scheme.
pub(crate) fn matmul_rounded(
    op: &'static str,
    x: View<CudaStorage>,
    rounding: Rounding,
    weight: &CudaWeight,
    epilogue: Epilogue,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        if let Some(out) = of_nothing(op, x, weight, false, epilogue, bias)? {
            return Ok(out);
        }
        match native::matmul_rounded(op, x, rounding, weight, epilogue, bias)? {
            Some(out) => Ok(out),
            None => scaled::matmul_rounded(op, x, rounding, weight, epilogue, bias),
        }
    })
}
