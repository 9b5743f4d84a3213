//! Gradients without candle's graph: on the device nothing runs but this crate's kernels and copies, and the
//! upstream gradient arrives as it lies.

use candle_core::DType::{BF16, F64};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::tune::FlashAttnBackward;

use super::loops::nds;
use super::options::{Bias, Lengths, Options};
use super::problem::{Loss, Problem, cast};
use super::{SMALL, Sizes, grid, run};
use crate::suites::{Layout, Nd, Source, Tally, close, identical, plain_on};

/// Views of all kinds as the upstream gradient.
pub fn upstream_views(device: &Device) {
    let tiles: Sizes = (&[2, 4], 2, [140, 150, 64, 64]);
    let mut problems = vec![];
    for (i, problem) in grid(&[(&[], 1, [9, 13, 8, 24]), SMALL, tiles]).enumerate() {
        for (j, layout) in Layout::ALL.into_iter().enumerate() {
            let i = i + j;
            let options = Options {
                bshd: i.is_multiple_of(2),
                wide: i.is_multiple_of(3),
                deterministic: i.is_multiple_of(5),
                bias: i.is_multiple_of(4).then(Bias::default),
                ..problem.options.clone()
            };
            problems.push(Problem { options, loss: Loss::View(layout), ..problem.clone() });
        }
    }
    run("flash_attn upstream views", device, problems);
}

/// More tiles than a large GPU has multiprocessors, so that a block of threads goes from tile to tile.
pub fn gradients_of_many_tiles(device: &Device) {
    let suite = "flash_attn gradients of many tiles";
    if device.is_cpu() {
        return Tally::new(suite, device).inapplicable("the CPU path has no such blocks");
    }
    let lengths = |of: [u32; 5]| Some(of.into_iter().cycle().take(50).collect());
    let padded = Lengths::Padded([lengths([140, 0, 129, 64, 1]), lengths([150, 160, 0, 17, 140])]);
    let (plain, causal) = (Options::default, Options::causal);
    let cases: [(Sizes, _); 6] = [
        ((&[20, 8], 8, [130, 150, 64, 64]), plain()),
        // Some queries see no keys.
        ((&[20, 5], 5, [200, 190, 128, 128]), causal()),
        ((&[20, 8], 2, [100, 260, 64, 64]), causal()),
        ((&[20, 5], 5, [190, 210, 96, 96]), Options { left: Some(30), ..causal() }),
        ((&[50, 2], 1, [140, 160, 64, 64]), Options { lengths: padded, ..causal() }),
        ((&[20, 4], 4, [70, 100, 256, 256]), plain()),
    ];
    let problems = cases.into_iter().flat_map(|(sizes, options)| {
        [false, true].map(|deterministic| {
            let options = Options { deterministic, ..options.clone() };
            Problem { options, ..Problem::new(BF16, sizes) }
        })
    });
    run(suite, device, problems);
}

impl Problem {
    /// Checks the gradients alone, as the op makes them of an upstream gradient.
    pub fn check_gradients(&self, device: &Device) -> Result<()> {
        let inputs = self.inputs(&mut Source::new(&format!("{self:?}"), device))?;
        let (weights, leaves) = inputs.split_last().expect("the weights come last");
        let tracked = self.tracked(leaves.len());
        if !tracked.contains(&true) {
            return Ok(());
        }
        let want = self.reference(&inputs)?;
        let allowed = self.allowed_beside(&plain_on(device), &inputs, &want)?;
        let before = nds(leaves)?;
        let grads = self.gradients_alone(leaves, &self.upstream(weights, device)?)?;
        // Of a bias that tracks none.
        let nothing = |i: usize| Ok(Nd::full(self.views(leaves)?[i].dims(), 0.0));
        let grad = |(i, grad): (usize, &Option<Tensor>)| match grad {
            Some(grad) => Nd::of(grad),
            None => nothing(i),
        };
        let of_views = grads.iter().enumerate().map(grad).collect::<Result<Vec<_>>>()?;
        let got = self.pull(&before, &of_views)?;
        for (i, got) in got.iter().enumerate().filter(|&(i, _)| tracked[i]) {
            let (want, dtype) = (&want[i + 1], leaves[i].dtype());
            let tol = |at| allowed[i + 1] + want.rounding(dtype, at);
            close(&format!("gradient {i}"), &got.tensor(F64)?, &want.value, tol)?;
        }
        for (leaf, before) in leaves.iter().zip(&before) {
            identical("input", leaf, before)?;
        }
        Ok(())
    }

    /// The gradients of the views of q, k, v and the bias, heads before rows, given that of the result.
    pub fn gradients_alone(
        &self,
        leaves: &[Tensor],
        upstream: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let mut leaves = leaves.to_vec();
        if let (Some(bias), Some(leaf)) = (&self.options.bias, leaves.last_mut())
            && bias.tracked
        {
            *leaf = Var::from_tensor(leaf)?.into_inner();
        }
        let views = self.views(&leaves)?;
        let [q, k, v] = self.turned(&views)?;
        let attention = FlashAttnBackward::new([&q, &k, &v], &self.opts(&views)?)?;
        let grads = attention.run(&self.turn(upstream)?)?;
        let grad = |(i, view): (usize, &Tensor)| match grads.get(i).and_then(Option::as_ref) {
            Some(grad) if grad.dtype() != view.dtype() => {
                bail!("gradient {i} is {:?}", grad.dtype())
            }
            Some(grad) if i < 3 => self.turn(grad).map(Some),
            grad => Ok(grad.cloned()),
        };
        views.iter().enumerate().map(grad).collect()
    }

    /// The gradient of the loss by the result, heads before rows, as it lies when it arrives.
    fn upstream(&self, weights: &Tensor, device: &Device) -> Result<Tensor> {
        if matches!(self.loss, Loss::View(_)) {
            return Ok(weights.clone());
        }
        let (dtype, weights) =
            (self.options.out_dtype(self.dtype), weights.to_device(&Device::Cpu)?);
        let out = Var::zeros(weights.shape(), dtype, &Device::Cpu)?;
        let grads = self.loss.of(&out, &cast(&weights, dtype)?)?.backward();
        let grad = match self.is_empty() {
            true => weights.zeros_like()?.to_dtype(dtype)?,
            false => grads?.get(&out).expect("the loss depends on it").to_dtype(dtype)?,
        };
        match self.loss {
            Loss::Sum if !self.is_empty() => {
                let one = Tensor::ones(vec![1; grad.rank()], dtype, &Device::Cpu)?;
                one.to_device(device)?.broadcast_as(grad.shape())
            }
            Loss::Transposed => grad.t()?.contiguous()?.to_device(device)?.t(),
            _ => grad.contiguous()?.to_device(device),
        }
    }
}
