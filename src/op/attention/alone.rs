//! The backward pass by itself, for benches: what candle's graph zeroes and adds is not timed with it.

use candle_core::{Result, Tensor};

use super::super::{Differentiable, eval_all};
use super::flash::FlashAttention;
use crate::FlashAttnOptions;

/// Attention that has run, outside of candle's graph, and whose gradient runs as often as asked.
pub struct FlashAttnBackward {
    op: FlashAttention,
    inputs: Vec<Tensor>,
    /// The attention, and after it what was saved for the gradient.
    results: Vec<Tensor>,
}

impl FlashAttnBackward {
    /// Runs the forward pass, and saves what the backward pass needs. A bias whose gradient is wanted has to
    /// track it.
    pub fn new(qkv: [&Tensor; 3], opts: &FlashAttnOptions) -> Result<Self> {
        Self::prepared(qkv, opts, false)
    }

    /// The same with the log-sum-exp, whose gradient [`run_both`](Self::run_both) takes.
    pub fn with_lse(qkv: [&Tensor; 3], opts: &FlashAttnOptions) -> Result<Self> {
        Self::prepared(qkv, opts, true)
    }

    fn prepared(qkv: [&Tensor; 3], opts: &FlashAttnOptions, wants_lse: bool) -> Result<Self> {
        let (op, inputs) = super::prepare("kaio_flash_attn_with", qkv, opts, wants_lse)?;
        let op = FlashAttention { tracked: true, ..op };
        let results = eval_all(&op, &inputs.iter().collect::<Vec<_>>())?;
        Ok(Self { op, inputs, results })
    }

    /// The attention.
    pub fn out(&self) -> &Tensor {
        &self.results[0]
    }

    /// The gradients of q, k, v and the options' tensors, given that of the attention.
    pub fn run(&self, grad: &Tensor) -> Result<Vec<Option<Tensor>>> {
        self.run_all(&[Some(grad.clone())])
    }

    /// The same, given those of the attention and of the log-sum-exp, or of one of them.
    pub fn run_both(&self, grads: [Option<Tensor>; 2]) -> Result<Vec<Option<Tensor>>> {
        self.run_all(&grads)
    }

    fn run_all(&self, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        self.op.grad(&self.inputs.iter().collect::<Vec<_>>(), &self.results, grads)
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device::Cpu, Var};

    use super::*;
    use crate::KaioTensorExt as _;

    #[test]
    fn it_is_that_of_the_graph() -> Result<()> {
        let var = |heads| Var::randn(0f32, 1., (2, heads, 70, 16), &Cpu);
        let ([q, k, v], bias) =
            ([var(4)?, var(2)?, var(2)?], Var::randn(0f32, 1., (70, 70), &Cpu)?);
        let opts = FlashAttnOptions::default().causal(true).bias(bias.as_tensor().clone());
        let alone = FlashAttnBackward::new([&q, &k, &v], &opts)?;
        let grad = alone.out().randn_like(0., 1.)?;

        let (out, lse) = q.kaio_flash_attn_with_lse(&k, &v, &opts)?;
        let lse_grad = lse.randn_like(0., 1.)?;
        let of_out = (out * &grad)?.sum_all()?;
        let of_both = (&of_out + (lse * &lse_grad)?.sum_all()?)?;
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        let compare = |loss: &Tensor, got: Vec<Option<Tensor>>| -> Result<()> {
            let store = loss.backward()?;
            for (var, got) in [&q, &k, &v, &bias].into_iter().zip(got) {
                let want = store.get(var).expect("the loss depends on it");
                assert_eq!(flat(&got.expect("it tracks a gradient"))?, flat(want)?);
            }
            Ok(())
        };
        compare(&of_out, alone.run(&grad)?)?;
        compare(&of_out, alone.run(&grad)?)?;
        let both = FlashAttnBackward::with_lse([&q, &k, &v], &opts)?;
        compare(&of_both, both.run_both([Some(grad), Some(lse_grad)])?)
    }
}
