//! One attention problem: its inputs, what it should give, and how near.

use candle_core::DType::{self, F32, F64};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::Sizes;
use super::loops::{Loops, nds, plain};
use crate::common::Layout::{self, Expanded, Plain, Repeated};
use crate::common::{Nd, Source, close, identical, ulp};

/// How q, k and v are views of the tensors that track gradients.
#[derive(Clone, Copy, Debug)]
pub enum Leaves {
    /// A tensor for each.
    Each([Layout; 3]),
    /// One `[B, S, 3, H, D]`.
    Fused,
    /// One tensor is all three.
    Shared,
}

/// A scalar that is linear in the result: what its gradient looks like when it arrives.
#[derive(Clone, Copy, Debug)]
pub enum Loss {
    Weighted,
    Sum,
    Transposed,
    Cast(DType),
}

impl Loss {
    fn of(self, out: &Tensor, weights: &Tensor) -> Result<Tensor> {
        match self {
            Self::Weighted => (out * weights)?.sum_all(),
            Self::Sum => out.sum_all(),
            Self::Transposed => (out.t()? * weights.t()?)?.sum_all(),
            Self::Cast(dtype) => (out.to_dtype(dtype)? * weights.to_dtype(dtype)?)?.sum_all(),
        }
    }
}

/// An exact result.
pub struct Want {
    pub value: Nd,
    /// The sum of the magnitudes of its terms.
    pub size: Nd,
}

impl Want {
    /// What an ulp of each of its terms, and of the result itself, makes of element `i`.
    fn rounding(&self, dtype: DType, i: usize) -> f64 {
        ulp(dtype, self.value.data[i]) + ulp(F32, 1.0) * self.size.data[i]
    }
}

#[derive(Clone, Debug)]
pub struct Problem {
    pub dtype: DType,
    /// Of q, k and v.
    pub dims: [Vec<usize>; 3],
    pub causal: bool,
    pub scale: Option<f32>,
    pub leaves: Leaves,
    pub tracked: [bool; 3],
    pub loss: Loss,
}

impl Problem {
    pub fn new(dtype: DType, (heads, hkv, [sq, sk, d, dv]): Sizes) -> Self {
        let mut shared = heads.to_vec();
        shared.last_mut().into_iter().for_each(|h| *h = hkv);
        let with = |heads: &[usize], matrix: [usize; 2]| [heads, &matrix].concat();
        Self {
            dtype,
            dims: [with(heads, [sq, d]), with(&shared, [sk, d]), with(&shared, [sk, dv])],
            causal: false,
            scale: None,
            leaves: Leaves::Each([Plain; 3]),
            tracked: [true; 3],
            loss: Loss::Weighted,
        }
    }

    pub fn check(&self, device: &Device) -> Result<()> {
        let repeats =
            |layouts: [Layout; 3]| layouts.iter().any(|l| [Repeated, Expanded].contains(l));
        if let Leaves::Each(layouts) = self.leaves
            && (device.is_cuda()
                && self.is_empty()
                && repeats(layouts)
                && self.tracked != [false; 3])
        {
            // candle's own backward of a broadcast view divides by zero on CUDA.
            return Self { tracked: [false; 3], ..self.clone() }.check(device);
        }
        let inputs = self.inputs(&mut Source::new(&format!("{self:?}"), device))?;
        let want = self.reference(&inputs)?;
        self.compare(&inputs, &want, &self.allowed(&inputs, &want)?)
    }

    /// Whether a dimension is zero: then all gradients are.
    fn is_empty(&self) -> bool {
        self.dims.iter().flatten().any(|&len| len == 0)
    }

    /// The leaves, NaN where no view shows them, and behind them the loss's weights.
    pub fn inputs(&self, source: &mut Source) -> Result<Vec<Tensor>> {
        let (q, v) = (&self.dims[0], &self.dims[2]);
        let leaves = match (self.leaves, &q[..]) {
            (Leaves::Each(layouts), _) => (0..3).map(|i| layouts[i].base(&self.dims[i])).collect(),
            (Leaves::Fused, &[b, h, s, d]) => vec![vec![b, s, 3, h, d]],
            _ => vec![q.clone()],
        };
        let blank: Vec<_> = leaves.iter().map(|dims| Nd::full(dims, 0.0)).collect();
        let shown = self.pull(&blank, &self.dims.each_ref().map(|dims| Nd::full(dims, 1.0)))?;
        let leaf = |(dims, shown): (Vec<_>, Nd)| {
            let mut shown = shown.data.into_iter();
            source.tensor_of(self.dtype, &dims, Plain, |source| match shown.next() {
                Some(0.0) if !self.is_empty() => f64::NAN,
                _ => source.unit(),
            })
        };
        let mut inputs = leaves.into_iter().zip(shown).map(leaf).collect::<Result<Vec<_>>>()?;
        let out = [&q[..q.len() - 1], &v[v.len() - 1..]].concat();
        inputs.push(source.tensor(self.dtype, &out, Plain)?);
        Ok(inputs)
    }

    pub fn qkv(&self, leaves: &[Tensor]) -> Result<[Tensor; 3]> {
        let view = |i: usize| match self.leaves {
            Leaves::Each(layouts) => layouts[i].view(&leaves[i], &self.dims[i]),
            Leaves::Fused => leaves[0].narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2),
            Leaves::Shared => Ok(leaves[0].clone()),
        };
        Ok([view(0)?, view(1)?, view(2)?])
    }

    /// The result and the gradients of the tracked leaves.
    fn run(
        &self,
        inputs: &[Tensor],
        op: impl Fn(&[Tensor; 3]) -> Result<Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let (weights, leaves) = inputs.split_last().expect("the weights come last");
        let mut vars = leaves.to_vec();
        for (var, _) in vars.iter_mut().zip(self.tracked).filter(|(_, tracked)| *tracked) {
            *var = Var::from_tensor(var)?.into_inner();
        }
        let out = op(&self.qkv(&vars)?)?;
        let grads = self.loss.of(&out, weights)?.backward()?;
        for (var, leaf) in vars.iter().zip(leaves) {
            identical("input", var, &Nd::of(leaf)?)?;
        }
        let grads = vars.iter().map(|var| grads.get(var).cloned());
        Ok(std::iter::once(Some(out)).chain(grads).collect())
    }

    /// What [`run`](Self::run) gives, by loops in f64.
    pub fn reference(&self, inputs: &[Tensor]) -> Result<Vec<Want>> {
        let exact = inputs.iter().map(Nd::of).collect::<Result<Vec<_>>>()?;
        let (weights, leaves) = exact.split_last().expect("the weights come last");
        if self.is_empty() {
            let zeros = std::iter::once(weights).chain(leaves).map(|nd| Nd::full(&nd.dims, 0.0));
            return Ok(zeros.map(|zero| Want { size: zero.clone(), value: zero }).collect());
        }
        let tensors = leaves.iter().map(|leaf| leaf.tensor(F64)).collect::<Result<Vec<_>>>()?;
        let loops = Loops::new(nds(&self.qkv(&tensors)?)?, self.causal, self.scale);
        let value = loops.forward();
        let out = Var::from_tensor(&value.tensor(F64)?)?;
        let grads = self.loss.of(&out, &weights.tensor(F64)?)?.backward()?;
        let grad = Nd::of(grads.get(&out).expect("the loss depends on it"))?;
        let grads = self.pull(leaves, &loops.backward(&grad, &value, -1.0))?;

        let size = loops.sizes(false).forward();
        // The gradients start from a result that was rounded to the dtype.
        let mut rounded = value.map(|x| x.abs() * ulp(self.dtype, 1.0) / ulp(F32, 1.0));
        rounded.data.iter_mut().zip(&size.data).for_each(|(x, size)| *x += size);
        let sizes = loops.sizes(true);
        let grad_sizes = self.pull(leaves, &sizes.backward(&grad.map(f64::abs), &rounded, 1.0))?;
        let grads = grads.into_iter().zip(grad_sizes).map(|(value, size)| Want { value, size });
        Ok(std::iter::once(Want { value, size }).chain(grads).collect())
    }

    /// The leaves' gradients, given those of q, k and v: sums over what the views repeat.
    fn pull(&self, leaves: &[Nd], grads: &[Nd; 3]) -> Result<Vec<Nd>> {
        if self.is_empty() {
            return Ok(leaves.iter().map(|leaf| Nd::full(&leaf.dims, 0.0)).collect());
        }
        let var = |leaf: &Nd| Ok(Var::from_tensor(&leaf.tensor(F64)?)?.into_inner());
        let vars = leaves.iter().map(var).collect::<Result<Vec<_>>>()?;
        let mut sum = Tensor::zeros((), F64, &Device::Cpu)?;
        for (view, grad) in self.qkv(&vars)?.iter().zip(grads) {
            sum = (sum + (view * grad.tensor(F64)?)?.sum_all()?)?;
        }
        let store = sum.backward()?;
        vars.iter().map(|var| Nd::of(store.get(var).expect("the sum depends on it"))).collect()
    }

    /// Twice the largest error of the plain formula in the same dtype. In f32 it has to agree with
    /// the loops: that makes it, and candle's autograd, a third opinion.
    pub fn allowed(&self, inputs: &[Tensor], want: &[Want]) -> Result<Vec<f64>> {
        if self.is_empty() {
            return Ok(vec![0.0; want.len()]);
        }
        let got = self.run(inputs, |qkv| plain(qkv, self.causal, self.scale))?;
        let error = |(want, got): (&Want, &Option<Tensor>)| {
            let (value, Some(got)) = (&want.value, got) else { return Ok(0.0) };
            if self.dtype == F32 {
                close("the plain formula", got, value, |at| 8.0 * want.rounding(F32, at))?;
            }
            Ok(2.0 * value.max_error(got)?)
        };
        want.iter().zip(&got).map(error).collect()
    }

    pub fn compare(&self, inputs: &[Tensor], want: &[Want], allowed: &[f64]) -> Result<()> {
        let got = self.run(inputs, |[q, k, v]| match self.scale {
            None => q.kaio_flash_attn(k, v, self.causal),
            Some(scale) => {
                let opts = FlashAttnOptions::default().causal(self.causal).softmax_scale(scale);
                q.kaio_flash_attn_with(k, v, &opts)
            }
        })?;
        for (i, got) in got.into_iter().enumerate() {
            let name = ["out", "gradient 0", "gradient 1", "gradient 2"][i];
            match (got, i == 0 || self.tracked[i - 1]) {
                (None, false) => {}
                (Some(got), true) if got.dtype() == self.dtype => {
                    let tol = |at| allowed[i] + want[i].rounding(self.dtype, at);
                    close(name, &got, &want[i].value, tol)?;
                }
                (got, _) => bail!("{name} is {:?}", got.map(|t| t.dtype())),
            }
        }
        Ok(())
    }
}
