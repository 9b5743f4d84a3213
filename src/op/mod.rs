//! What each op means: its arguments, its result's shape, its gradient.
//!
//! A method of [`KaioTensorExt`](crate::KaioTensorExt) lands here. The op's module checks the
//! arguments and describes the work as a value that implements [`Op`], which [`apply`] runs and puts into
//! candle's graph.

mod activation;
mod add;
mod alone;
mod attention;
mod block;
mod casts;
mod checkpoint;
mod cross_entropy;
mod embedding;
mod glu;
mod linear_cross_entropy;
mod matmul;
mod node;
mod norm;
mod project;
mod quantized;
mod rope;
mod softmax;
mod tape;

pub(crate) use add::add;
pub use alone::Backward;
pub use attention::FlashAttnBackward;
pub(crate) use attention::{
    AttentionGrads, AttentionInputs, AttentionProblem, AttentionResults, AttentionUpstream,
    AttentionWants, Mask, attention_tc, flash_attn, flash_attn_with_lse,
};
pub(crate) use block::block;
pub(crate) use casts::once as cast_once;
pub(crate) use checkpoint::checkpoint;
pub(crate) use cross_entropy::{RowLoss, RowLosses, Upstream, cross_entropy, span};
pub(crate) use embedding::embedding;
pub(crate) use glu::glu;
pub(crate) use linear_cross_entropy::linear_cross_entropy;
pub use linear_cross_entropy::linear_cross_entropy_within;
pub(crate) use matmul::{Epilogue, MatmulProblem, matmul};
pub(crate) use node::apply;
pub(crate) use norm::{
    Each as NormEach, Grads as NormGrads, Inputs as NormInputs, Norm, Results as NormResults,
    Stats as NormStats, Upstream as NormUpstream, add_layer_norm, add_rms_norm, layer_norm,
    rms_norm,
};
pub(crate) use project::{Rounding, dequantize};
pub(crate) use quantized::{
    QkvWeights, matmul_fp8, matmul_int4, matmul_int8, matmul_int8_with, matmul_quant, qkv_project,
    qkv_project_of, swiglu_project,
};
pub(crate) use rope::{RopeProblem, rope};
pub(crate) use softmax::softmax;
pub(crate) use tape::last as last_pass;

use std::ops::Deref;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

/// A storage and the view of it that is meant.
pub(crate) type View<'a, S> = (&'a S, &'a Layout);

/// A result and its shape.
pub(crate) type Computed<S> = (S, Shape);

/// A computation on checked inputs. Results are contiguous, and always as many.
pub(crate) trait Op: Send + Sync + 'static {
    /// The method that the user called.
    fn name(&self) -> &'static str;
    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>>;
    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>>;
}

/// An [`Op`] with a gradient.
pub(crate) trait Differentiable: Op {
    /// Whether an input, counted from 0, has a gradient. The others are constants.
    fn differentiates(&self, _input: usize) -> bool {
        true
    }

    /// Whether a gradient that is wanted of `inputs` reads the elements of one of them, counted from 0. The others are not kept
    /// for it: [`grad`](Self::grad) may be given a tensor of the same shape and dtype that tracks a gradient if the input does,
    /// with one element in memory.
    fn reads(&self, _input: usize, _inputs: &[&Tensor]) -> bool {
        true
    }

    /// Whether a gradient reads a result that the caller sees, counted from 0. In the others' place [`grad`](Self::grad) may be
    /// given an empty tensor.
    fn reads_result(&self, _result: usize) -> bool {
        true
    }

    /// The gradients of the inputs; `None`, or what is then dropped, for those that track none.
    ///
    /// `results` are all that the op computed, also what its caller does not see. `grads` are the
    /// gradients of those that the caller sees; `None` for one on which nothing depends, but not for all.
    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>>;
}

/// A cast that also takes tensors without elements, for which candle's CUDA kernels do not launch.
pub(crate) fn cast(t: &Tensor, dtype: DType) -> Result<Tensor> {
    match t.elem_count() {
        0 => Tensor::zeros(t.shape(), dtype, t.device()),
        _ => t.to_dtype(dtype),
    }
}

/// As rows of a matrix, of which a vector is one, in candle's graph.
fn matrix(t: &Tensor) -> Result<Tensor> {
    let mut t = t.clone();
    while t.rank() < 2 {
        t = t.unsqueeze(0)?;
    }
    Ok(t)
}

/// Runs an op outside candle's graph, within a gradient.
pub(crate) fn eval<const N: usize>(op: &impl Op, inputs: &[&Tensor]) -> Result<[Tensor; N]> {
    let results = eval_all(op, inputs)?;
    results.try_into().map_err(|_| candle_core::Error::msg("an op with another number of results"))
}

/// The same, with what the op saves for its gradient.
fn eval_all(op: &impl Op, inputs: &[&Tensor]) -> Result<Vec<Tensor>> {
    Ok(compute(op, inputs)?.into_iter().map(tensor).collect())
}

/// What an op computes.
fn compute(op: &impl Op, inputs: &[&Tensor]) -> Result<Vec<Computed<Storage>>> {
    let guards: Vec<_> = inputs.iter().map(|t| t.storage_and_layout()).collect();
    match &*guards[0].0 {
        Storage::Cpu(_) => {
            let results = op.cpu(&on_cpu(op.name(), &guards)?)?;
            Ok(results.into_iter().map(|(storage, shape)| (Storage::Cpu(storage), shape)).collect())
        }
        Storage::Cuda(_) => {
            let results = op.cuda(&on_cuda(op.name(), &guards)?)?;
            Ok(results
                .into_iter()
                .map(|(storage, shape)| (Storage::Cuda(storage), shape))
                .collect())
        }
        Storage::Metal(_) => bail!("{}: no Metal kernels", op.name()),
    }
}

/// A result outside candle's graph.
fn tensor((storage, shape): Computed<Storage>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), false)
}

/// What locked storages hold.
fn on_cpu<'a, G: Deref<Target = Storage>>(
    op: &str,
    guards: &'a [(G, &'a Layout)],
) -> Result<Vec<View<'a, CpuStorage>>> {
    let view = |(storage, layout): &'a (G, &'a Layout)| match &**storage {
        Storage::Cpu(s) => Ok((s, *layout)),
        _ => bail!("{op}: inputs on several devices"),
    };
    guards.iter().map(view).collect()
}

fn on_cuda<'a, G: Deref<Target = Storage>>(
    op: &str,
    guards: &'a [(G, &'a Layout)],
) -> Result<Vec<View<'a, CudaStorage>>> {
    let view = |(storage, layout): &'a (G, &'a Layout)| match &**storage {
        Storage::Cuda(s) => Ok((s, *layout)),
        _ => bail!("{op}: inputs on several devices"),
    };
    guards.iter().map(view).collect()
}

/// Sums over the dimensions along which `shape` was broadcast.
fn sum_to(t: &Tensor, shape: &Shape) -> Result<Tensor> {
    let extra = t.rank() - shape.rank();
    let mut t = t.clone();
    for _ in 0..extra {
        t = t.sum(0)?;
    }
    for (i, &len) in shape.dims().iter().enumerate() {
        if len == 1 && t.dims()[i] != 1 {
            t = t.sum_keepdim(i)?;
        }
    }
    Ok(t)
}
