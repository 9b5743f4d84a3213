//! Which engine computes an op. In a build without the feature `cuda`, where no CUDA tensor exists to call
//! them with, the same functions say that it is missing.
#![cfg_attr(not(feature = "cuda"), allow(unused_variables))]

use candle_core::{CudaDevice, CudaStorage, DType, Layout, Result, Tensor};

use super::Operand;
use crate::op::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants, Epilogue, MatmulProblem, Norm, NormEach, NormGrads, NormInputs, NormResults,
    NormUpstream, RopeProblem, Rounding, RowLoss, RowLosses, Upstream, View,
};
use crate::options::{Gate, Reduction};
use crate::quant::QuantScheme;
use crate::quant::load::int4::Packing;
use crate::quant::planes::{Form, Planes, Weight};
use crate::stack::Stack;
use crate::train::{AdamWCall, AdamWTables, Sum, Update};
use crate::{Activation, Engine};

#[cfg(feature = "cuda")]
use {
    super::driver::gpu::{Gpu, has_kernels},
    super::driver::pool::Pool,
    super::{empty, kaio_ops, native, scaled},
    crate::error::Error,
    crate::op::NormStats,
    candle_core::backend::BackendStorage,
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

/// The most bytes that were in use on a GPU at one time.
pub(crate) fn peak_memory(op: &'static str, device: &CudaDevice) -> Result<u64> {
    on_gpu!(Ok(Pool::of(op, device)?.peak()?))
}

/// The count of these begins anew.
pub(crate) fn reset_peak_memory(op: &'static str, device: &CudaDevice) -> Result<()> {
    on_gpu!(Ok(Pool::of(op, device)?.forget()?))
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

/// The elements of a view in memory of their own.
pub(crate) fn pack(storage: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    on_gpu!({
        match layout.shape().elem_count() {
            0 => empty::zeros(storage, 0, storage.dtype()),
            _ => super::fit::pack(storage, layout),
        }
    })
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
        let problem = MatmulProblem::new(op, x.1, &Layout::contiguous(&weight.facts.dims[..]))?;
        if problem.out.elem_count() == 0 || problem.lhs.cols == 0 {
            return empty::matmul(op, &problem, epilogue, x.0, bias);
        }
        match native::matmul_rounded(op, x, rounding, weight, epilogue, bias)? {
            Some(out) => Ok(out),
            None => scaled::matmul_rounded(op, x, rounding, weight, epilogue, bias),
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

/// `act(x)` of a matrix, packed, in its dtype.
pub(crate) fn activation(op: &'static str, act: Activation, x: Operand) -> Result<CudaStorage> {
    on_gpu!({
        match x.1.elements() {
            0 => empty::zeros(x.0, 0, x.0.dtype()),
            _ => native::activation(op, act, x),
        }
    })
}

/// `grad · act′(x)` in a dtype, if there is an activation of an x, and the sums of its columns in another.
pub(crate) fn activation_backward(
    op: &'static str,
    grad: Operand,
    before: Option<(Activation, Operand, DType)>,
    sums: Option<DType>,
) -> Result<(Option<CudaStorage>, Option<CudaStorage>)> {
    on_gpu!({
        match grad.1.elements() {
            0 => Ok((
                before.map(|(.., dtype)| empty::zeros(grad.0, 0, dtype)).transpose()?,
                sums.map(|dtype| empty::zeros(grad.0, grad.1.cols, dtype)).transpose()?,
            )),
            _ => native::activation_backward(op, grad, before, sums),
        }
    })
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

/// A step of AdamW of tensors on one GPU, none of them empty, at least one.
pub(crate) fn adamw(
    op: &'static str,
    updates: &[Update],
    call: &AdamWCall,
    tables: &mut AdamWTables,
) -> Result<()> {
    on_gpu!(native::adamw(op, updates, call, tables))
}

/// The norm of all gradients together times `scale`, and the factor (with the scale) that makes it at most `max_norm`:
/// f32 `[2]`. The gradients are on one GPU, none of them empty, at least one, and without gaps.
pub(crate) fn grad_norm(
    op: &'static str,
    grads: &[&Tensor],
    scale: f32,
    max_norm: f32,
) -> Result<Tensor> {
    on_gpu!(native::grad_norm(op, grads, scale, max_norm))
}

/// The same gradients times the second of two numbers, the factor of [`grad_norm`]: in their dtypes, or in f16 or bf16.
pub(crate) fn scale_grads(
    op: &'static str,
    grads: &[&Tensor],
    clip: &Tensor,
    to: Option<DType>,
) -> Result<Vec<Tensor>> {
    on_gpu!(native::scale_grads(op, grads, clip, to))
}

/// Adds gradients, such as those of [`grad_norm`], to sums.
pub(crate) fn accumulate(op: &'static str, sums: &[Sum]) -> Result<()> {
    on_gpu!(native::accumulate(op, sums))
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

/// The losses of rows of logits with targets without gaps, and what their gradient begins with.
pub(crate) fn cross_entropy(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    (logits, stack): Operand,
    targets: View<CudaStorage>,
) -> Result<RowLosses<CudaStorage>> {
    on_gpu!({
        if targets.1.shape().elem_count() > 0 {
            return native::cross_entropy(op, row_loss, reduction, (logits, stack), targets);
        }
        let [losses, stats] = [0; 2].map(|len| empty::zeros(logits, len, DType::F32));
        let [loss, share] = reduce_losses(op, row_loss, reduction, losses?, targets)?;
        Ok(RowLosses { loss, stats: stats?, share })
    })
}

/// The losses of all rows reduced, and what the gradient of each counted row is multiplied with.
pub(crate) fn reduce_losses(
    op: &'static str,
    row_loss: RowLoss,
    reduction: Reduction,
    losses: CudaStorage,
    targets: View<CudaStorage>,
) -> Result<[CudaStorage; 2]> {
    on_gpu!({
        let one = empty::full(&losses, 1, 1.0)?;
        match reduction {
            Reduction::None => Ok([losses, one]),
            _ if targets.1.shape().elem_count() > 0 => {
                native::reduce_losses(op, row_loss, reduction, &losses, targets)
            }
            Reduction::Sum => Ok([empty::full(&losses, 1, 0.0)?, one]),
            Reduction::Mean => Ok([empty::full(&losses, 1, f32::NAN)?, one]),
        }
    })
}

/// `len` times a number, in f32.
pub(crate) fn full(like: &CudaStorage, len: usize, value: f32) -> Result<CudaStorage> {
    on_gpu!(empty::full(like, len, value))
}

/// `A·B` in the dtype of both.
pub(crate) fn product(
    op: &'static str,
    problem: &MatmulProblem,
    [a, b]: [&CudaStorage; 2],
) -> Result<CudaStorage> {
    on_gpu!({
        let epilogue = Epilogue::round(a.dtype());
        matmul(op, problem, Engine::Native, epilogue, a, b, None)
    })
}

/// `A·B` in the dtype of what it is written to, from an element on; or added to that, if it is f32. The depth is not empty.
pub(crate) fn product_to(
    op: &'static str,
    problem: &MatmulProblem,
    operands: [&CudaStorage; 2],
    out: (&mut CudaStorage, usize),
    adds: bool,
) -> Result<()> {
    on_gpu!({
        match problem.out.elem_count() {
            0 => Ok(()),
            _ => native::product_to(op, problem, operands, out, adds),
        }
    })
}

/// What [`product_to`] writes to all of.
pub(crate) fn unwritten(like: &CudaStorage, len: usize, dtype: DType) -> Result<CudaStorage> {
    on_gpu!(super::driver::memory::uninit(like.device(), &len.into(), dtype))
}

/// The losses of the rows of a matrix without gaps, from an element of all losses on; with `upstream` gradients and what
/// these are multiplied with, their gradients in its place.
pub(crate) fn cross_entropy_in_place(
    op: &'static str,
    row_loss: RowLoss,
    logits: (&mut CudaStorage, &Stack),
    targets: View<CudaStorage>,
    upstream: Option<[View<CudaStorage>; 2]>,
    losses: (&mut CudaStorage, usize),
) -> Result<()> {
    on_gpu!(native::cross_entropy_in_place(op, row_loss, logits, targets, upstream, losses))
}

/// The gradient of logits, of which there are some, in their dtype, packed.
pub(crate) fn cross_entropy_backward(
    op: &'static str,
    row_loss: RowLoss,
    logits: Operand,
    targets: View<CudaStorage>,
    upstream: &Upstream<CudaStorage>,
) -> Result<CudaStorage> {
    on_gpu!(native::cross_entropy_backward(op, row_loss, logits, targets, upstream))
}

/// The rows of a table at ids without gaps, in the table's dtype.
pub(crate) fn embedding(
    op: &'static str,
    (table, stack): Operand,
    ids: View<CudaStorage>,
) -> Result<CudaStorage> {
    on_gpu!({
        match ids.1.shape().elem_count() * stack.cols {
            0 => empty::zeros(table, 0, table.dtype()),
            _ => native::embedding(op, (table, stack), ids),
        }
    })
}

/// The gradient of a table of `classes` rows, given those of its rows at ids; none of both is empty.
pub(crate) fn embedding_backward(
    op: &'static str,
    grads: Operand,
    ids: View<CudaStorage>,
    classes: usize,
) -> Result<CudaStorage> {
    on_gpu!(native::embedding_backward(op, grads, ids, classes))
}
