//! What is done to rows and to elements.

use candle_core::{CudaStorage, DType, Result};

use super::super::Operand;
use crate::Activation;
use crate::op::{
    Norm, NormEach, NormGrads, NormInputs, NormResults, NormUpstream, RopeProblem, View,
};
use crate::options::Gate;

#[cfg(feature = "cuda")]
use {
    super::super::{empty, native},
    crate::op::NormStats,
    candle_core::backend::BackendStorage,
};

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
