//! What each op means: its arguments, its result's shape, its gradient.
//!
//! A method of [`KaioTensorExt`](crate::KaioTensorExt) lands here. The op's module checks the
//! arguments and describes the work as a value that implements [`Op`]; [`eval`] runs it, and [`apply`]
//! puts it into candle's graph if it is [`Differentiable`].

mod attention;
mod matmul;
mod node;
mod qkv;
mod quantized;

pub(crate) use attention::{
    AttentionInputs, AttentionProblem, AttentionUpstream, Mask, attention_tc, flash_attn,
    flash_attn_with_lse,
};
pub(crate) use matmul::{Epilogue, MatmulProblem, matmul};
pub(crate) use node::apply;
pub(crate) use qkv::{QkvWeights, qkv_project};
pub(crate) use quantized::{matmul_int4, matmul_int8};

use std::ops::Deref;

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Storage, Tensor, bail};

/// A storage and the view of it that is meant.
pub(crate) type View<'a, S> = (&'a S, &'a Layout);

/// A computation on checked inputs. Results are contiguous.
pub(crate) trait Op: Send + Sync + 'static {
    /// The method that the user called.
    fn name(&self) -> &'static str;
    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)>;
    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)>;
}

/// An [`Op`] with a gradient.
pub(crate) trait Differentiable: Op {
    /// The gradients of the inputs, given the result and its gradient; `None` where no one asks.
    fn grad(&self, inputs: &[&Tensor], out: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>>;
}

/// A cast that also takes tensors without elements, for which candle's CUDA kernels do not launch.
pub(crate) fn cast(t: &Tensor, dtype: DType) -> Result<Tensor> {
    match t.elem_count() {
        0 => Tensor::zeros(t.shape(), dtype, t.device()),
        _ => t.to_dtype(dtype),
    }
}

/// Runs an op outside candle's graph.
pub(crate) fn eval(op: &impl Op, inputs: &[&Tensor]) -> Result<Tensor> {
    let guards: Vec<_> = inputs.iter().map(|t| t.storage_and_layout()).collect();
    let (storage, shape) = match &*guards[0].0 {
        Storage::Cpu(_) => {
            let (storage, shape) = op.cpu(&on_cpu(op.name(), &guards)?)?;
            (Storage::Cpu(storage), shape)
        }
        Storage::Cuda(_) => {
            let (storage, shape) = op.cuda(&on_cuda(op.name(), &guards)?)?;
            (Storage::Cuda(storage), shape)
        }
        Storage::Metal(_) => bail!("{}: no Metal kernels", op.name()),
    };
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
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
