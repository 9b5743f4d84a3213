//! Flash attention as a differentiable op.

use candle_core::{CpuStorage, CudaStorage, Layout, Result, Shape, Tensor};

use super::super::{Computed, Differentiable, Op, View, eval_all};
use super::backward::{Attends, Upstream, gradients};
use super::call::{Call, heads_first, heads_first_back};
use super::problem::{AttentionGrads, AttentionInputs, AttentionProblem, AttentionWants};
use crate::stack::Stack;
use crate::{cpu, cuda};

/// Inputs: q, k, v and the optional operands, of which the bias is the first. Results: the attention, if
/// wanted the log-sum-exp, and two numbers of each row that a backward pass rebuilds the probabilities from.
pub(super) struct FlashAttention {
    pub call: Call,
    /// f32, heads before rows: the natural log-sum-exp of each row's scores, −∞ where it sees no key.
    pub wants_lse: bool,
    /// Whether a backward pass may follow.
    pub tracked: bool,
}

/// Heads and rows, as many dimensions as the result has without its columns.
fn rows(problem: &AttentionProblem) -> Shape {
    let batch = problem.q.batch().iter().map(|&(len, _)| len).chain([problem.seq_q()]);
    Shape::from(batch.skip(4 - problem.shape.rank()).collect::<Vec<_>>())
}

impl Op for FlashAttention {
    fn name(&self) -> &'static str {
        self.call.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let (problem, inputs) = self.call.read(inputs);
        let cpu::Attended { out, max, sum } = cpu::attention(&problem, &inputs)?;
        let row = |values| (CpuStorage::F32(values), rows(&problem));
        let mut results = vec![(cpu::narrow_to(problem.out_dtype, out)?, problem.shape.clone())];
        if self.wants_lse {
            let lse = std::iter::zip(&max, &sum).map(|(max, sum)| max + sum.ln());
            results.push(row(lse.collect()));
        }
        if self.tracked {
            results.extend([row(max), row(sum)]);
        }
        Ok(results)
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let (problem, inputs) = self.call.read(inputs);
        let Call { name, engine, .. } = self.call;
        let wants = AttentionWants { lse: self.wants_lse, stats: self.tracked };
        let results = cuda::flash_attn(name, &problem, engine, wants, &inputs)?;
        let of_rows = results.lse.into_iter().chain(results.stats.into_iter().flatten());
        let of_rows: Vec<_> = of_rows.map(|values| (values, rows(&problem))).collect();
        Ok([(results.out, problem.shape)].into_iter().chain(of_rows).collect())
    }
}

impl Attends for FlashAttention {
    fn name(&self) -> &'static str {
        self.call.name
    }

    fn deterministic(&self) -> bool {
        self.call.deterministic
    }

    fn read<'a, S>(&self, views: &[View<'a, S>]) -> (AttentionProblem, AttentionInputs<'a, S>) {
        self.call.read(views)
    }

    fn matrices(&self, layout: &Layout) -> Stack {
        heads_first(self.call.layout, layout)
    }

    fn back(&self, t: &Tensor, shape: &Shape) -> Result<Tensor> {
        heads_first_back(self.call.layout, t, shape)
    }
}

impl Differentiable for FlashAttention {
    /// q, k, v and the bias.
    fn differentiates(&self, input: usize) -> bool {
        input < 3 + usize::from(self.call.has_bias())
    }

    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let bias = self.call.inputs(inputs).extras.bias.filter(|bias| bias.track_op());
        let problem = self.call.problem(inputs.iter().map(|t| t.layout()));
        let lse_grad = grads.get(1).and_then(Option::as_ref);
        if problem.value_dim() == 0 && problem.has_scores() && lse_grad.is_some() {
            return self.grad_without_values(inputs, lse_grad);
        }
        if problem.is_empty() {
            let zeros = inputs[..3].iter().copied().chain(bias).map(Tensor::zeros_like);
            return zeros.map(|zeros| zeros.map(Some)).collect();
        }
        let [out, .., a, b] = results else { unreachable!("a result and two numbers of each row") };
        let grad = match &grads[0] {
            Some(grad) => grad.clone(),
            None => out.zeros_like()?,
        };
        let upstream = Upstream { out, grad: &grad, lse_grad, stats: [a, b] };
        let shapes = [0, 1, 2].map(|i| inputs[i].shape());
        let AttentionGrads { q, k, v, bias } = gradients(self, inputs, upstream, shapes, bias)?;
        Ok(vec![Some(q), Some(k), Some(v), bias])
    }
}

impl FlashAttention {
    /// Through the log-sum-exp of values without columns: a column of zeros stands in for these.
    fn grad_without_values(
        &self,
        inputs: &[&Tensor],
        lse_grad: Option<&Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let v = inputs[2];
        let dims = [&v.dims()[..v.rank() - 1], &[1]].concat();
        let column = Tensor::zeros(dims, v.dtype(), v.device())?;
        let mut inputs = inputs.to_vec();
        inputs[2] = &column;
        let results = eval_all(self, &inputs)?;
        let mut grads = self.grad(&inputs, &results, &[None, lse_grad.cloned()])?;
        grads[2] = Some(v.zeros_like()?);
        Ok(grads)
    }
}
