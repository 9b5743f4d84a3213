//! Flash attention as a differentiable op.

use std::sync::{Arc, OnceLock};

use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, Result, Shape, Storage, Tensor};

use super::super::{Differentiable, Op, View, eval};
use super::call::{Call, heads_first, heads_first_back};
use super::problem::{AttentionInputs, AttentionProblem, AttentionUpstream};
use super::recompute;
use crate::{cpu, cuda};

/// Inputs: q, k, v and the optional operands, of which the bias is the first.
pub(super) struct FlashAttention {
    pub call: Call,
    pub keeps_lse: bool,
    /// f32, heads before rows: the natural log-sum-exp of each row's scores, −∞ where it sees no key.
    pub lse: Arc<OnceLock<Tensor>>,
}

impl FlashAttention {
    fn keep(&self, problem: &AttentionProblem, lse: Storage) {
        if self.keeps_lse {
            // Heads and rows, as many dimensions as the result has without its columns.
            let batch = problem.q.batch().iter().map(|&(len, _)| len).chain([problem.seq_q()]);
            let shape: Vec<_> = batch.skip(4 - problem.shape.rank()).collect();
            let lse = Tensor::from_storage(lse, shape, BackpropOp::none(), false);
            self.lse.set(lse).expect("a node runs forward once");
        }
    }
}

impl Op for FlashAttention {
    fn name(&self) -> &'static str {
        self.call.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let (problem, inputs) = self.call.read(inputs);
        let (out, lse) = cpu::attention(&problem, &inputs)?;
        self.keep(&problem, Storage::Cpu(CpuStorage::F32(lse)));
        Ok((cpu::narrow_to(problem.out_dtype, out)?, problem.shape))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let (problem, inputs) = self.call.read(inputs);
        let Call { name, engine, .. } = self.call;
        let (out, lse) = cuda::flash_attn(name, &problem, engine, self.keeps_lse, &inputs)?;
        if let Some(lse) = lse {
            self.keep(&problem, Storage::Cuda(lse));
        }
        Ok((out, problem.shape))
    }
}

impl Differentiable for FlashAttention {
    /// Rebuilds the probabilities block by block from the kept log-sum-exp (FlashAttention-2, Dao 2023,
    /// algorithm 2): by loops on the CPU, on a GPU by an engine's kernels if they take the case, else
    /// in candle's own ops.
    fn grad(&self, inputs: &[&Tensor], out: &Tensor, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        let lse = self.lse.get().expect("kept because an input is tracked");
        let problem = self.call.problem(inputs.iter().map(|t| t.layout()));
        let by_kernel = out.device().is_cpu() || cuda::differentiates_flash_attn(&problem);
        let grads = match by_kernel {
            true => self.by_kernel(inputs, &[out, grad, lse])?,
            false => recompute::gradients(&self.call, inputs, [out, grad, lse])?,
        };
        // The bias, where there is one, is the fourth input.
        let tracked = inputs.iter().map(|t| t.track_op());
        Ok(tracked.zip(grads).map(|(tracked, grad)| grad.filter(|_| tracked)).collect())
    }
}

impl FlashAttention {
    pub fn by_kernel(&self, inputs: &[&Tensor], after: &[&Tensor]) -> Result<[Option<Tensor>; 4]> {
        let bias = self.call.inputs(inputs).extras.bias.filter(|bias| bias.track_op());
        let backward = Backward {
            call: self.call.clone(),
            bias: bias.map(|bias| (bias.shape().clone(), OnceLock::new())),
        };
        // One flat result holds three gradients in turn.
        let flat = eval(&backward, &[inputs, after].concat())?;
        let mut start = 0;
        let mut part = |t: &Tensor| {
            let len = t.elem_count();
            let part = flat.narrow(0, start, len)?;
            start += len;
            heads_first_back(self.call.layout, &part, t)
        };
        let [q, k, v] = [part(inputs[0])?, part(inputs[1])?, part(inputs[2])?].map(Some);
        Ok([q, k, v, backward.bias.and_then(|(_, grad)| grad.into_inner())])
    }
}

/// Inputs: those of the forward pass, then the result, its gradient and the log-sum-exp. Result: dq, dk
/// and dv in a row, heads before rows.
struct Backward {
    call: Call,
    /// The shape of the bias, if its gradient is wanted, and that gradient.
    bias: Option<(Shape, OnceLock<Tensor>)>,
}

impl Backward {
    fn read<'a, S>(
        &self,
        views: &[View<'a, S>],
    ) -> (AttentionProblem, AttentionInputs<'a, S>, AttentionUpstream<'a, S>) {
        let (inputs, &[(out, _), (grad, at), (lse, _)]) =
            views.split_last_chunk().expect("three behind the inputs");
        let (problem, inputs) = self.call.read(inputs);
        let grad = (grad, heads_first(self.call.layout, at));
        (problem, inputs, AttentionUpstream { out, grad, lse })
    }
}

impl Op for Backward {
    fn name(&self) -> &'static str {
        self.call.name
    }

    fn cpu(&self, views: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let (problem, inputs, upstream) = self.read(views);
        let shape = self.bias.as_ref().map(|(shape, _)| shape.dims());
        let (grads, bias) = cpu::attention_backward(&problem, &inputs, &upstream, shape)?;
        if let (Some((shape, grad)), Some(storage)) = (&self.bias, inputs.extras.bias) {
            let storage = Storage::Cpu(cpu::narrow_to(storage.dtype(), bias)?);
            let bias = Tensor::from_storage(storage, shape.clone(), BackpropOp::none(), false);
            grad.set(bias).expect("an op runs once");
        }
        let shape = Shape::from(grads.len());
        Ok((cpu::narrow_to(inputs.q.dtype(), grads)?, shape))
    }

    fn cuda(&self, views: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let (problem, inputs, upstream) = self.read(views);
        let name = self.call.name;
        let grads = cuda::flash_attn_backward(name, &problem, &inputs, &upstream)?;
        let len: usize =
            [&problem.q, &problem.k, &problem.v].map(|stack| stack.elements()).iter().sum();
        Ok((grads, Shape::from(len)))
    }
}
