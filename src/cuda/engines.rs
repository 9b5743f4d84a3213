//! Which engine computes an op. In a build without the feature `cuda`, where no CUDA tensor exists to call
//! them with, the same functions say that it is missing.
#![cfg_attr(not(feature = "cuda"), allow(unused_variables))]

use candle_core::{CudaStorage, DType, Result, Tensor};

use super::Operand;
use crate::Engine;
use crate::op::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants, Epilogue, MatmulProblem, Norm, NormEach, NormGrads, NormInputs, NormResults,
    NormUpstream, RopeProblem, View,
};
use crate::options::Gate;
use crate::quant::QuantScheme;
use crate::quant::planes::{Form, Planes, Weight};
use crate::stack::Stack;

#[cfg(feature = "cuda")]
use {
    super::driver::gpu::{Gpu, has_kernels},
    super::{empty, kaio_ops, native, scaled},
    crate::error::Error,
    crate::op::NormStats,
    candle_core::{Layout, backend::BackendStorage},
};

/// The body of a function that ops call.
#[cfg(feature = "cuda")]
macro_rules! on_gpu {
    ($body:expr) => {
        $body
    };
}
#[cfg(not(feature = "cuda"))]
macro_rules! on_gpu {
    ($body:expr) => {
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    };
}

pub(crate) fn matmul(
    op: &'static str,
    problem: &MatmulProblem,
    engine: Engine,
    epilogue: Epilogue,
    a: &CudaStorage,
    b: &CudaStorage,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        if problem.out.elem_count() == 0 || problem.lhs.cols == 0 {
            return empty::matmul(op, problem, epilogue, a, bias);
        }
        match engine {
            Engine::Auto | Engine::Native => native::matmul(op, problem, epilogue, a, b, bias),
            Engine::KaioOps => kaio_ops::matmul(op, problem, epilogue, a, b, bias),
        }
    })
}

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

/// A weight `[K, N]` on a GPU rounded to codes: finite floats, at least one.
pub(crate) fn encode(op: &'static str, weight: &Tensor, scheme: QuantScheme) -> Result<Planes> {
    on_gpu!(native::encode(op, weight, scheme))
}

/// The largest magnitude of a matrix of floats on a GPU, of which it is all that is read: infinite or NaN if any is.
pub(crate) fn peak(op: &'static str, matrix: &Tensor) -> Result<f32> {
    on_gpu!(native::peak(op, matrix))
}

/// How many elements a storage has.
pub(crate) fn elements(storage: &CudaStorage) -> usize {
    #[cfg(feature = "cuda")]
    return super::driver::memory::elements(storage);
    #[cfg(not(feature = "cuda"))]
    0
}

/// A tensor's elements, row by row, in memory of their own.
pub(crate) fn copy(op: &'static str, tensor: &Tensor) -> Result<Tensor> {
    on_gpu!(native::copy(op, tensor))
}

/// The kernels that some work launches in this thread, by their names.
pub(crate) fn kernels(work: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    on_gpu!({
        let (result, kernels) = super::driver::log::record(work);
        result.map(|()| kernels)
    })
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
        let weight_is = Layout::contiguous(&weight.facts.dims[..]);
        let weight_is = if transposed { weight_is.transpose(0, 1)? } else { weight_is };
        let problem = MatmulProblem::new(op, x.1, &weight_is)?;
        if problem.out.elem_count() == 0 || problem.lhs.cols == 0 {
            return empty::matmul(op, &problem, epilogue, x.0, bias);
        }
        match x.0.dtype() == DType::F16 && weight.facts.exponent != 0 {
            true => scaled::matmul_quant(op, x, weight, transposed, epilogue, bias),
            false => native::matmul_quant(op, x, weight, transposed, epilogue, bias),
        }
    })
}

/// `act(x·W)` of f16 or bf16 activations for each of some weights, if one kernel makes all of them.
pub(crate) fn matmul_quant_all(
    op: &'static str,
    x: View<CudaStorage>,
    weights: &[CudaWeight],
    epilogue: Epilogue,
) -> Result<Option<Vec<CudaStorage>>> {
    on_gpu!({
        let empty = weights.iter().any(|weight| weight.facts.dims.contains(&0));
        if weights.len() < 2 || empty || x.1.shape().elem_count() == 0 {
            return Ok(None);
        }
        native::matmul_quant_all(op, x, weights, epilogue)
    })
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
        let problem = MatmulProblem::new(op, x.1, &Layout::contiguous(&weight.facts.dims[..]))?;
        if problem.out.elem_count() == 0 || problem.lhs.cols == 0 {
            return empty::matmul(op, &problem, epilogue, x.0, bias);
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
        let problem = MatmulProblem::new(op, x.1, &Layout::contiguous(&weight.facts.dims[..]))?;
        if problem.out.elem_count() == 0 || problem.lhs.cols == 0 {
            return empty::matmul(op, &problem, epilogue, x.0, bias);
        }
        match native::matmul_fp8(op, x, scales, width, weight, epilogue, bias)? {
            Some(out) => Ok(out),
            None => scaled::matmul_fp8(op, x, scales, width, weight, epilogue, bias),
        }
    })
}

/// Activations rounded to int8 in u8 or to e4m3, the elements from row to row of these, and the scales of groups of
/// `width` elements of each row.
pub(crate) fn quantize_rows(
    op: &'static str,
    x: View<CudaStorage>,
    dtype: DType,
    width: usize,
) -> Result<(CudaStorage, usize, CudaStorage)> {
    on_gpu!({
        match x.1.shape().elem_count() {
            0 => {
                let (rows, k) = x.1.dims().split_at(x.1.dims().len() - 1);
                let groups = rows.iter().product::<usize>() * k[0].div_ceil(width);
                Ok((empty::zeros(x.0, 0, dtype)?, k[0], empty::zeros(x.0, groups, DType::F32)?))
            }
            _ => {
                let rows = (x.0, &Stack::new(x.1));
                let native::Rounded { codes, row, scales } =
                    native::quantize_rows(op, rows, dtype, width)?;
                Ok((codes, row, scales))
            }
        }
    })
}

/// Whether [`Engine::Auto`] is native: what is older than the kernels still has those of kaio-ops.
#[cfg(feature = "cuda")]
fn takes(
    op: &'static str,
    problem: &AttentionProblem,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<bool> {
    Ok(native::flash_limit(problem).is_none() && has_kernels(op, inputs.q.device())?)
}

/// The result, and what is wanted besides, over two batch dimensions or, where heads share no keys and nothing
/// else has them, any.
pub(crate) fn flash_attn(
    op: &'static str,
    problem: &AttentionProblem,
    engine: Engine,
    wants: AttentionWants,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<AttentionResults<CudaStorage>> {
    on_gpu!({
        if wants.stats {
            differentiable(op, problem, engine, inputs)?;
        }
        if problem.is_empty() {
            return empty::flash_attn(problem, wants, inputs, |scores, inputs| {
                let wants = AttentionWants { lse: true, stats: false };
                flash_attn(op, scores, engine, wants, inputs)
            });
        }
        let native = match engine {
            Engine::KaioOps => false,
            Engine::Auto => takes(op, problem, inputs)?,
            Engine::Native => match native::flash_limit(problem) {
                None => true,
                Some((what, fix)) => {
                    let (engine, limit) = ("Engine::Native".into(), format!("cannot take {what}"));
                    let fix = fix.into();
                    return Err(Error::Unsupported { op, what: engine, limit, fix }.into());
                }
            },
        };
        match native {
            true => native::flash_attn(op, problem, wants, inputs),
            false => kaio_ops::flash_attn(op, problem, wants.lse, inputs),
        }
    })
}

/// An input tracks a gradient: native kernels have a backward pass, those of kaio-ops have none.
#[cfg(feature = "cuda")]
fn differentiable(
    op: &'static str,
    problem: &AttentionProblem,
    engine: Engine,
    inputs: &AttentionInputs<CudaStorage>,
) -> Result<()> {
    let refuse = |what: &str, limit: String, fix: &str| {
        let (what, fix) = (what.into(), fix.into());
        Err(Error::Unsupported { op, what, limit, fix }.into())
    };
    match engine {
        Engine::KaioOps => refuse(
            "Engine::KaioOps",
            "has no backward pass of attention, and an input tracks a gradient".into(),
            "leave the engine to `Engine::Auto`, which has one, or `.detach()` the inputs",
        ),
        // It says itself what it cannot take.
        Engine::Native => Ok(()),
        Engine::Auto => {
            // Old GPUs are refused as such.
            Gpu::of(op, inputs.q.device())?;
            match native::flash_limit(problem) {
                None => Ok(()),
                Some((what, fix)) => {
                    refuse("this crate", format!("cannot differentiate attention of {what}"), fix)
                }
            }
        }
    }
}

/// The gradients of q, k and v, which lie as `places` says, each in a storage that has no other elements, and of
/// a bias of shape `bias` (up to `[B, Hq, Sq, Sk]`), packed. The problem is not empty, and [`flash_attn`] took it.
pub(crate) fn attention_backward(
    op: &'static str,
    problem: &AttentionProblem,
    deterministic: bool,
    inputs: &AttentionInputs<CudaStorage>,
    upstream: &AttentionUpstream<CudaStorage>,
    places: [&Stack; 3],
    bias: Option<&[usize]>,
) -> Result<AttentionGrads<CudaStorage>> {
    on_gpu!(native::attention_backward(op, problem, deterministic, inputs, upstream, places, bias))
}

/// `act(gate) · up`, packed.
pub(crate) fn glu(op: &'static str, kind: Gate, operands: [Operand; 2]) -> Result<CudaStorage> {
    on_gpu!({
        let [(gate, stack), _] = operands;
        match stack.elements() {
            0 => empty::zeros(gate, 0, gate.dtype()),
            _ => native::glu(op, kind, operands),
        }
    })
}

/// The gradients of gate and up, given both and the result's gradient.
pub(crate) fn glu_backward(
    op: &'static str,
    kind: Gate,
    operands: [Operand; 3],
) -> Result<[CudaStorage; 2]> {
    on_gpu!({
        let [(gate, stack), ..] = operands;
        let zeros = || empty::zeros(gate, 0, gate.dtype());
        match stack.elements() {
            0 => Ok([zeros()?, zeros()?]),
            _ => native::glu_backward(op, kind, operands),
        }
    })
}

/// Normed rows of x or of its sum with a residual, that sum, and what a gradient needs of each row if it is saved.
pub(crate) fn norm(
    norm: &Norm,
    inputs: &NormInputs<View<CudaStorage>>,
) -> Result<NormResults<CudaStorage>> {
    on_gpu!({
        let (x, layout) = inputs.x;
        if layout.shape().elem_count() > 0 {
            return native::norm(norm, inputs);
        }
        let none = || empty::zeros(x, 0, x.dtype());
        let of_rows = || empty::zeros(x, 0, DType::F32);
        let mean = || norm.centred.then(of_rows).transpose();
        let stats = || Ok::<_, candle_core::Error>(NormStats { rstd: of_rows()?, mean: mean()? });
        Ok(NormResults {
            out: none()?,
            sum: inputs.residual.map(|_| none()).transpose()?,
            stats: norm.save.then(stats).transpose()?,
        })
    })
}

/// The gradients that are wanted of what was normed, the weight and the bias.
pub(crate) fn norm_backward(
    op: &'static str,
    inputs: &NormUpstream<View<CudaStorage>>,
    wants: NormEach<bool>,
) -> Result<NormGrads<CudaStorage>> {
    on_gpu!({
        let ((x, layout), (weight, vector)) = (inputs.x, inputs.weight);
        let NormEach { x: of_x, weight: of_weight, bias } = wants;
        if layout.shape().elem_count() > 0 && (of_x || of_weight || bias) {
            return native::norm_backward(op, inputs, wants);
        }
        let width = vector.dims()[0];
        let columns =
            |wanted: bool| wanted.then(|| empty::zeros(weight, width, weight.dtype())).transpose();
        Ok(NormEach {
            x: of_x.then(|| empty::zeros(x, 0, x.dtype())).transpose()?,
            weight: columns(of_weight)?,
            bias: columns(bias)?,
        })
    })
}

/// Softmax of the rows of a view; given a gradient, the gradient of the rows of which it is the softmax.
pub(crate) fn softmax(
    op: &'static str,
    x: View<CudaStorage>,
    grad: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        match x.1.shape().elem_count() {
            0 => empty::zeros(x.0, 0, x.0.dtype()),
            _ => native::softmax(op, x, grad),
        }
    })
}

/// Rows with pairs of their elements turned, of storages of rows, cosines and sines.
pub(crate) fn rope(
    op: &'static str,
    problem: &RopeProblem,
    storages: [&CudaStorage; 3],
) -> Result<CudaStorage> {
    on_gpu!({
        match problem.x.elements() {
            0 => empty::zeros(storages[0], 0, storages[0].dtype()),
            _ => native::rope(op, problem, storages),
        }
    })
}
