//! What each op means: its arguments, its result's shape, its gradient.
//!
//! A method of [`KaioTensorExt`](crate::KaioTensorExt) lands here. The op's module checks the
//! arguments and describes the work as a value that implements [`Op`]; [`eval`] runs it, and the
//! [`Node`] adaptor puts it into candle's graph if it is [`Differentiable`].

mod attention;
pub(crate) mod check;
mod matmul;
mod qkv;
mod quantized;

pub(crate) use attention::{AttentionProblem, attention_tc, flash_attn};
pub(crate) use matmul::{Epilogue, MatmulProblem, matmul};
pub(crate) use qkv::{QkvWeights, qkv_project};
pub(crate) use quantized::{matmul_int4, matmul_int8};

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp2, CustomOp3, DType, Layout, Result, Shape, Storage, Tensor,
    bail,
};

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
            let views = guards.iter().map(|(storage, layout)| match &**storage {
                Storage::Cpu(s) => Ok((s, *layout)),
                _ => bail!("{}: inputs on several devices", op.name()),
            });
            let (storage, shape) = op.cpu(&views.collect::<Result<Vec<_>>>()?)?;
            (Storage::Cpu(storage), shape)
        }
        Storage::Cuda(_) => {
            let views = guards.iter().map(|(storage, layout)| match &**storage {
                Storage::Cuda(s) => Ok((s, *layout)),
                _ => bail!("{}: inputs on several devices", op.name()),
            });
            let (storage, shape) = op.cuda(&views.collect::<Result<Vec<_>>>()?)?;
            (Storage::Cuda(storage), shape)
        }
        Storage::Metal(_) => bail!("{}: no Metal kernels", op.name()),
    };
    Ok(Tensor::from_storage(storage, shape, BackpropOp::none(), false))
}

/// An op as candle's graph knows it. candle keeps it alive as long as the graph, so that what the
/// forward pass stores in it is there for the backward pass. One node serves one call.
pub(crate) struct Node<O>(pub O);

impl<O: Differentiable> CustomOp2 for Node<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu(&[(s1, l1), (s2, l2)])
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.cuda(&[(s1, l1), (s2, l2)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.0.grad(&[a, b], out, grad)?.into_iter();
        Ok((grads.next().flatten(), grads.next().flatten()))
    }
}

impl<O: Differentiable> CustomOp3 for Node<O> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn cpu_fwd(
        &self,
        s1: &CpuStorage,
        l1: &Layout,
        s2: &CpuStorage,
        l2: &Layout,
        s3: &CpuStorage,
        l3: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.0.cpu(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn cuda_fwd(
        &self,
        s1: &CudaStorage,
        l1: &Layout,
        s2: &CudaStorage,
        l2: &Layout,
        s3: &CudaStorage,
        l3: &Layout,
    ) -> Result<(CudaStorage, Shape)> {
        self.0.cuda(&[(s1, l1), (s2, l2), (s3, l3)])
    }

    fn bwd(
        &self,
        a: &Tensor,
        b: &Tensor,
        c: &Tensor,
        out: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let mut grads = self.0.grad(&[a, b, c], out, grad)?.into_iter();
        let mut next = || grads.next().flatten();
        Ok((next(), next(), next()))
    }
}
