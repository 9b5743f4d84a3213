//! Flash attention as a differentiable op.

use candle_core::op::BackpropOp;
use candle_core::{CpuStorage, CudaStorage, D, Result, Shape, Storage, Tensor};

use super::super::{Computed, Differentiable, Op, View, on_cpu};
use super::call::{Call, heads_first, heads_first_back};
use super::problem::{AttentionGrads, AttentionProblem, AttentionUpstream, AttentionWants};
use super::recompute;
use crate::stack::Stack;
use crate::{cpu, cuda};

/// Inputs: q, k, v and the optional operands, of which the bias is the first. Results: the attention, if
/// wanted the log-sum-exp, and what the backward pass of the CPU path needs: for each row the largest
/// score and the sum of the exponentials.
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

impl Differentiable for FlashAttention {
    /// q, k, v and the bias.
    fn differentiates(&self, input: usize) -> bool {
        input < 3 + usize::from(self.call.has_bias())
    }

    /// Rebuilds the probabilities block by block (FlashAttention-2, Dao 2023, algorithm 2): by loops on the
    /// CPU, in candle's own ops on a GPU.
    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let out = &results[0];
        let grad = match &grads[0] {
            Some(grad) => grad.clone(),
            None => out.zeros_like()?,
        };
        let lse_grad = match grads.get(1) {
            Some(Some(grad)) => Some(grad.unsqueeze(D::Minus1)?),
            _ => None,
        };
        let upstream = Upstream { out, grad: &grad, lse_grad: lse_grad.as_ref() };
        let all = match results.split_last_chunk() {
            Some((_, [max, sum])) if out.device().is_cpu() => {
                self.by_loops(inputs, upstream, [max, sum])?
            }
            _ => recompute::gradients(&self.call, inputs, upstream)?,
        };
        Ok(all.list())
    }
}

/// What a backward pass begins with.
#[derive(Clone, Copy)]
pub(super) struct Upstream<'a> {
    pub out: &'a Tensor,
    pub grad: &'a Tensor,
    /// Of the log-sum-exp, with one column.
    pub lse_grad: Option<&'a Tensor>,
}

impl FlashAttention {
    /// The gradients on the CPU, given each row's largest score and sum of exponentials.
    pub fn by_loops(
        &self,
        inputs: &[&Tensor],
        upstream: Upstream,
        stats: [&Tensor; 2],
    ) -> Result<AttentionGrads<Tensor>> {
        let after = [Some(upstream.out), Some(upstream.grad), Some(stats[0]), Some(stats[1])];
        let after = after.into_iter().chain([upstream.lse_grad]).flatten();
        let guards: Vec<_> =
            inputs.iter().copied().chain(after).map(|t| t.storage_and_layout()).collect();
        let views = on_cpu(self.call.name, &guards)?;
        let (own, after) = views.split_at(inputs.len());
        let (problem, operands) = self.call.read(own);
        let upstream = AttentionUpstream {
            out: after[0].0,
            grad: (after[1].0, heads_first(self.call.layout, after[1].1)),
            max: after[2].0,
            sum: after[3].0,
            lse_grad: after.get(4).map(|&(grad, at)| (grad, Stack::new(at).with_batch_dims(2))),
        };
        let bias = self.call.inputs(inputs).extras.bias.filter(|bias| bias.track_op());
        let grads =
            cpu::attention_backward(&problem, &operands, &upstream, bias.map(|bias| bias.dims()))?;
        let narrowed = |grad: Vec<f32>, like: &Tensor| {
            let storage = Storage::Cpu(cpu::narrow_to(like.dtype(), grad)?);
            let len = like.elem_count();
            Ok::<_, candle_core::Error>(Tensor::from_storage(
                storage,
                len,
                BackpropOp::none(),
                false,
            ))
        };
        let matrices = |grad: Vec<f32>, like: &Tensor| {
            heads_first_back(self.call.layout, &narrowed(grad, like)?, like)
        };
        Ok(AttentionGrads {
            q: matrices(grads.q, inputs[0])?,
            k: matrices(grads.k, inputs[1])?,
            v: matrices(grads.v, inputs[2])?,
            bias: match grads.bias.zip(bias) {
                Some((grad, bias)) => Some(narrowed(grad, bias)?.reshape(bias.shape())?),
                None => None,
            },
        })
    }
}
