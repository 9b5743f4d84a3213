//! Attention from f16 to f32 over batch dimensions that are broadcast, as a differentiable op.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::super::{Computed, Differentiable, Op, View, sum_to};
use super::backward::{Attends, Upstream, gradients};
use super::problem::{AttentionGrads, AttentionInputs, AttentionProblem, AttentionWants, Extras};
use crate::stack::Stack;
use crate::{Engine, cpu, cuda};

/// Inputs: q, k and v. Results: the attention, and two numbers of each row that a backward pass rebuilds the
/// probabilities from.
pub(super) struct BroadcastAttention {
    pub name: &'static str,
    pub causal: bool,
    /// Whether a backward pass may follow.
    pub tracked: bool,
}

impl BroadcastAttention {
    /// The shapes of q, k and v, repeated over all batch dimensions.
    fn repeated(problem: &AttentionProblem) -> [Shape; 3] {
        [&problem.q, &problem.k, &problem.v].map(|stack| {
            let batch = stack.batch().iter().map(|&(len, _)| len);
            Shape::from(batch.chain([stack.rows, stack.cols]).collect::<Vec<_>>())
        })
    }

    /// Without its last dimension.
    fn rows(problem: &AttentionProblem) -> Shape {
        let dims = problem.shape.dims();
        Shape::from(&dims[..dims.len() - 1])
    }
}

impl Op for BroadcastAttention {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let (problem, inputs) = self.read(inputs);
        let cpu::Attended { out, max, sum } = cpu::attention(&problem, &inputs)?;
        let row = |values| (CpuStorage::F32(values), Self::rows(&problem));
        let stats = if self.tracked { vec![row(max), row(sum)] } else { vec![] };
        let out = (CpuStorage::F32(out), problem.shape.clone());
        Ok([out].into_iter().chain(stats).collect())
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let (problem, inputs) = self.read(inputs);
        let wants = AttentionWants { lse: false, stats: self.tracked };
        let results = cuda::flash_attn(self.name, &problem, Engine::Auto, wants, &inputs)?;
        let stats = results.stats.into_iter().flatten();
        let stats: Vec<_> = stats.map(|values| (values, Self::rows(&problem))).collect();
        Ok([(results.out, problem.shape)].into_iter().chain(stats).collect())
    }
}

impl Attends for BroadcastAttention {
    fn name(&self) -> &'static str {
        self.name
    }

    fn deterministic(&self) -> bool {
        false
    }

    fn read<'a, S>(&self, views: &[View<'a, S>]) -> (AttentionProblem, AttentionInputs<'a, S>) {
        let [(q, lq), (k, lk), (v, lv)] = *views else { unreachable!("q, k, v") };
        let problem = AttentionProblem::broadcast(lq, lk, lv, self.causal);
        (problem, AttentionInputs { q, k, v, extras: Extras::default() })
    }

    fn matrices(&self, layout: &Layout) -> Stack {
        Stack::new(layout)
    }

    fn back(&self, t: &Tensor, shape: &Shape) -> Result<Tensor> {
        t.reshape(shape)
    }
}

impl Differentiable for BroadcastAttention {
    /// Sums over what was broadcast, in f32.
    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let layouts = [0, 1, 2].map(|i| inputs[i].layout());
        let problem = AttentionProblem::broadcast(layouts[0], layouts[1], layouts[2], self.causal);
        if problem.is_empty() {
            return inputs.iter().map(|t| t.zeros_like().map(Some)).collect();
        }
        let ([out, a, b], [Some(grad)]) = (results, grads) else {
            unreachable!("a result with a gradient, and two numbers of each row")
        };
        let shapes = Self::repeated(&problem);
        let upstream = Upstream { out, grad, lse_grad: None, stats: [a, b] };
        let AttentionGrads { q, k, v, .. } =
            gradients(self, inputs, upstream, shapes.each_ref(), None)?;
        let summed = |(grad, t): (Tensor, &&Tensor)| match grad.shape() == t.shape() {
            true => Ok(Some(grad)),
            false => sum_to(&grad.to_dtype(DType::F32)?, t.shape())?.to_dtype(t.dtype()).map(Some),
        };
        [q, k, v].into_iter().zip(inputs).map(summed).collect()
    }
}
