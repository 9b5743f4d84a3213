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
        let (op, inputs) = super::prepare("kaio_flash_attn_with", qkv, opts, false)?;
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
        let inputs: Vec<_> = self.inputs.iter().collect();
        self.op.grad(&inputs, &self.results, &[Some(grad.clone())])
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

        let out = q.kaio_flash_attn_with(&k, &v, &opts)?;
        let store = (out * &grad)?.sum_all()?.backward()?;
        let flat = |t: &Tensor| t.flatten_all()?.to_vec1::<f32>();
        for _ in 0..2 {
            let got = alone.run(&grad)?;
            for (var, got) in [&q, &k, &v, &bias].into_iter().zip(got) {
                let want = store.get(var).expect("the loss depends on it");
                assert_eq!(flat(&got.expect("it tracks a gradient"))?, flat(want)?);
            }
        }
        Ok(())
    }
}
