//! One attention problem: its inputs, what it should give, and how near.

use candle_core::DType::{self, F32, F64};
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;

use super::Sizes;
use super::loops::{Loops, matrix, nds};
use super::options::{Options, Rules};
use super::plain::plain;
use crate::suites::Layout::{self, Expanded, Plain, Repeated};
use crate::suites::{Nd, Source, close, identical, plain_on, results_alone, ulp};

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
    /// As `Weighted`, and the gradient is a view that no graph of candle's hands on, which adds each to zeros.
    View(Layout),
}

impl Loss {
    pub fn of(self, out: &Tensor, weights: &Tensor) -> Result<Tensor> {
        match self {
            Self::Weighted | Self::View(_) => (out * weights)?.sum_all(),
            Self::Sum => out.sum_all(),
            Self::Transposed => (out.t()? * weights.t()?)?.sum_all(),
            Self::Cast(dtype) => (out.to_dtype(dtype)? * weights.to_dtype(dtype)?)?.sum_all(),
        }
    }
}

/// A cast, also of no elements, for which candle's CUDA kernels do not launch.
pub fn cast(t: &Tensor, dtype: DType) -> Result<Tensor> {
    match t.elem_count() {
        0 => Tensor::zeros(t.shape(), dtype, t.device()),
        _ => t.to_dtype(dtype),
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
    pub fn rounding(&self, dtype: DType, i: usize) -> f64 {
        ulp(dtype, self.value.data[i]) + ulp(F32, 1.0) * self.size.data[i]
    }
}

#[derive(Clone, Debug)]
pub struct Problem {
    pub dtype: DType,
    /// Of q, k and v, heads before rows.
    pub dims: [Vec<usize>; 3],
    pub options: Options,
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
            options: Options::default(),
            leaves: Leaves::Each([Plain; 3]),
            tracked: [true; 3],
            loss: Loss::Weighted,
        }
    }

    /// The same without gradients.
    pub fn untracked(mut self) -> Self {
        self.tracked = [false; 3];
        self.options.bias.iter_mut().for_each(|bias| bias.tracked = false);
        self
    }

    pub fn check(&self, device: &Device) -> Result<()> {
        self.check_by(Engine::default(), device)
    }

    /// The same, by one engine.
    pub fn check_by(&self, engine: Engine, device: &Device) -> Result<()> {
        if results_alone() {
            self.clone().untracked().check_beside(&Device::Cpu, engine, device)?;
            return match engine {
                Engine::KaioOps => Ok(()),
                _ => self.check_gradients(device),
            };
        }
        if matches!(self.loss, Loss::View(_)) {
            return self.check_gradients(device);
        }
        let repeats =
            |layouts: [Layout; 3]| layouts.iter().any(|l| [Repeated, Expanded].contains(l));
        if let Leaves::Each(layouts) = self.leaves
            && (device.is_cuda()
                && self.is_empty()
                && repeats(layouts)
                && self.tracked != [false; 3])
        {
            // candle's own backward of a broadcast view divides by zero on CUDA.
            return self.clone().untracked().check_by(engine, device);
        }
        self.check_beside(device, engine, device)
    }

    /// Checks the result alone, beside the plain formula on the CPU: what this crate's kernels store is
    /// touched by nobody else on the device.
    pub fn check_result(&self, device: &Device) -> Result<()> {
        self.clone().untracked().check_beside(&Device::Cpu, Engine::default(), device)
    }

    fn check_beside(&self, plain: &Device, engine: Engine, device: &Device) -> Result<()> {
        let inputs = self.inputs(&mut Source::new(&format!("{self:?}"), device))?;
        let want = self.reference(&inputs)?;
        self.compare_by(engine, &inputs, &want, &self.allowed_beside(plain, &inputs, &want)?)
    }

    /// Whether a dimension is zero: then all gradients are.
    pub fn is_empty(&self) -> bool {
        self.dims.iter().flatten().any(|&len| len == 0)
    }

    /// B, Hq, Sq, Sk.
    pub fn sizes(&self) -> [usize; 4] {
        let (mut sizes, q) = ([1; 4], &self.dims[0]);
        sizes[4 - q.len()..].copy_from_slice(q);
        [sizes[0], sizes[1], sizes[2], self.dims[1][self.dims[1].len() - 2]]
    }

    pub fn rules(&self, bias: Option<Nd>) -> Rules {
        let [_, d] = matrix(&self.dims[0]);
        Rules::new(&self.options, self.sizes(), d, bias)
    }

    /// Of q, k, v and the bias.
    fn all_dims(&self) -> Vec<Vec<usize>> {
        let bias = self.options.bias.as_ref().map(|bias| bias.dims(self.sizes()));
        self.dims.iter().cloned().chain(bias).collect()
    }

    /// The leaves, the bias's last, NaN where no view shows them, and after them the loss's weights.
    pub fn inputs(&self, source: &mut Source) -> Result<Vec<Tensor>> {
        let (q, v) = (&self.dims[0], &self.dims[2]);
        let mut leaves = match (self.leaves, &q[..]) {
            (Leaves::Each(layouts), _) => (0..3).map(|i| layouts[i].base(&self.dims[i])).collect(),
            (Leaves::Fused, &[b, h, s, d]) => vec![vec![b, s, 3, h, d]],
            _ => vec![q.clone()],
        };
        let qkv = leaves.len();
        let dims = self.all_dims();
        leaves.extend(self.options.bias.iter().map(|bias| bias.layout.base(&dims[3])));
        let blank: Vec<_> = leaves.iter().map(|dims| Nd::full(dims, 0.0)).collect();
        let ones: Vec<_> = dims.iter().map(|dims| Nd::full(dims, 1.0)).collect();
        let shown = self.pull(&blank, &ones)?;
        let leaf = |(i, (dims, shown)): (usize, (Vec<_>, Nd))| {
            let bias = self.options.bias.as_ref().filter(|_| i == qkv);
            let dtype = bias.map_or(self.dtype, |bias| bias.dtype(self.dtype));
            let (mut place, [_, cols]) = (0, matrix(&[&[1], dims.as_slice()].concat()));
            source.tensor_of(dtype, &dims, Plain, |source| {
                let (hidden, row) = (shown.data[place] == 0.0, place / cols.max(1));
                place += 1;
                let hides = bias.is_some_and(|bias| bias.hides);
                let (x, hides) = (source.unit(), hides && (source.bits() % 5 == 0 || row % 7 == 3));
                match (hidden && !self.is_empty(), hides) {
                    (true, _) => f64::NAN,
                    (false, true) => f64::NEG_INFINITY,
                    (false, false) => x,
                }
            })
        };
        let leaves = leaves.into_iter().zip(shown).enumerate();
        let mut inputs = leaves.map(leaf).collect::<Result<Vec<_>>>()?;
        let out = [&q[..q.len() - 1], &v[v.len() - 1..]].concat();
        let (dtype, layout) = match self.loss {
            Loss::View(layout) => (self.options.out_dtype(self.dtype), layout),
            _ => (self.dtype, Plain),
        };
        inputs.push(source.tensor(dtype, &out, layout)?);
        Ok(inputs)
    }

    /// q, k, v and the bias, heads before rows.
    pub fn views(&self, leaves: &[Tensor]) -> Result<Vec<Tensor>> {
        let view = |i: usize| match self.leaves {
            Leaves::Each(layouts) => layouts[i].view(&leaves[i], &self.dims[i]),
            Leaves::Fused => leaves[0].narrow(2, i, 1)?.squeeze(2)?.transpose(1, 2),
            Leaves::Shared => Ok(leaves[0].clone()),
        };
        let bias = self.options.bias.as_ref().map(|bias| {
            let leaf = leaves.last().expect("the bias is the last");
            bias.layout.view(leaf, &bias.dims(self.sizes()))
        });
        (0..3).map(view).chain(bias).collect()
    }

    /// Whether each leaf tracks a gradient.
    pub fn tracked(&self, leaves: usize) -> Vec<bool> {
        let bias = self.options.bias.as_ref().map(|bias| bias.tracked);
        let qkv = leaves - usize::from(bias.is_some());
        self.tracked[..qkv].iter().copied().chain(bias).collect()
    }

    /// The result and the gradients of the tracked leaves. The op gets q, k, v and the bias.
    pub fn run(
        &self,
        inputs: &[Tensor],
        op: impl FnOnce(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Vec<Option<Tensor>>> {
        let (weights, leaves) = inputs.split_last().expect("the weights come last");
        let mut vars = leaves.to_vec();
        for (var, tracked) in vars.iter_mut().zip(self.tracked(leaves.len())) {
            if tracked {
                *var = Var::from_tensor(var)?.into_inner();
            }
        }
        let out = op(&self.views(&vars)?)?;
        let grads = match self.tracked(leaves.len()).contains(&true) {
            false => None,
            true => Some(self.loss.of(&out, &cast(weights, out.dtype())?)?.backward()?),
        };
        for (var, leaf) in vars.iter().zip(leaves) {
            identical("input", var, &Nd::of(leaf)?)?;
        }
        let grad = |var: &Tensor| grads.as_ref()?.get(var).cloned();
        Ok(std::iter::once(Some(out)).chain(vars.iter().map(grad)).collect())
    }

    /// What [`run`](Self::run) gives, by loops in f64, and after it the log-sum-exp.
    pub fn reference(&self, inputs: &[Tensor]) -> Result<Vec<Want>> {
        let exact = nds(inputs)?;
        let (weights, leaves) = exact.split_last().expect("the weights come last");
        let tensors = leaves.iter().map(|leaf| leaf.tensor(F64)).collect::<Result<Vec<_>>>()?;
        let loops = self.loops(&nds(&self.views(&tensors)?)?);
        let lse = Want { value: loops.lse.clone(), size: loops.lse_size.clone() };
        if self.is_empty() {
            let zeros = std::iter::once(weights).chain(leaves).map(|nd| Nd::full(&nd.dims, 0.0));
            let zeros = zeros.map(|zero| Want { size: zero.clone(), value: zero });
            return Ok(zeros.chain([lse]).collect());
        }
        let value = loops.forward();
        let size = loops.sizes(false).forward();
        if !self.tracked(leaves.len()).contains(&true) {
            return Ok(vec![Want { value, size }, lse]);
        }
        let out = Var::from_tensor(&value.tensor(F64)?)?;
        let grads = self.loss.of(&out, &weights.tensor(F64)?)?.backward()?;
        let grad = Nd::of(grads.get(&out).expect("the loss depends on it"))?;
        let grads = self.pull(leaves, &loops.backward(&grad, &value, -1.0))?;

        // The gradients start from a result that was rounded to its dtype.
        let rounding = ulp(self.options.out_dtype(self.dtype), 1.0) / ulp(F32, 1.0);
        let mut rounded = value.map(|x| x.abs() * rounding);
        rounded.data.iter_mut().zip(&size.data).for_each(|(x, size)| *x += size);
        let sizes = loops.sizes(true);
        let grad_sizes = self.pull(leaves, &sizes.backward(&grad.map(f64::abs), &rounded, 1.0))?;
        let grads = grads.into_iter().zip(grad_sizes).map(|(value, size)| Want { value, size });
        Ok(std::iter::once(Want { value, size }).chain(grads).chain([lse]).collect())
    }

    /// The reference of q, k, v and the bias.
    pub fn loops(&self, views: &[Nd]) -> Loops {
        let qkv = [0, 1, 2].map(|i| views[i].clone());
        Loops::new(qkv, &self.rules(views.get(3).cloned()))
    }

    /// The leaves' gradients, given those of the views: sums over what these repeat.
    pub fn pull(&self, leaves: &[Nd], grads: &[Nd]) -> Result<Vec<Nd>> {
        if self.is_empty() {
            return Ok(leaves.iter().map(|leaf| Nd::full(&leaf.dims, 0.0)).collect());
        }
        let var = |leaf: &Nd| Ok(Var::from_tensor(&leaf.map(|_| 0.0).tensor(F64)?)?.into_inner());
        let vars = leaves.iter().map(var).collect::<Result<Vec<_>>>()?;
        let mut sum = Tensor::zeros((), F64, &Device::Cpu)?;
        for (view, grad) in self.views(&vars)?.iter().zip(grads) {
            sum = (sum + (view * grad.tensor(F64)?)?.sum_all()?)?;
        }
        let store = sum.backward()?;
        vars.iter().map(|var| Nd::of(store.get(var).expect("the sum depends on it"))).collect()
    }

    /// Twice the largest error of the plain formula in the dtype of the result, or, as tensor cores have
    /// it, of the operands. In f32 it has to agree with the loops: that makes it, and candle's
    /// autograd, a third opinion.
    pub fn allowed(&self, inputs: &[Tensor], want: &[Want]) -> Result<Vec<f64>> {
        self.allowed_beside(&plain_on(inputs[0].device()), inputs, want)
    }

    /// The same, with the plain formula on a device.
    pub fn allowed_beside(
        &self,
        device: &Device,
        inputs: &[Tensor],
        want: &[Want],
    ) -> Result<Vec<f64>> {
        if self.is_empty() {
            return Ok(vec![0.0; want.len()]);
        }
        let dtype = match inputs[0].device().is_cpu() {
            true => self.options.out_dtype(self.dtype),
            false => self.dtype,
        };
        let inputs = inputs.iter().map(|t| t.to_device(device)).collect::<Result<Vec<_>>>()?;
        let got = self.run(&inputs, |views| {
            let cast = |i: usize| views[i].to_dtype(dtype);
            let bias = views.get(3);
            let rules = self.rules(bias.map(Nd::of).transpose()?);
            plain(&[cast(0)?, cast(1)?, cast(2)?], bias, &rules)
        })?;
        let error = |(want, got): (&Want, &Option<Tensor>)| {
            let (value, Some(got)) = (&want.value, got) else { return Ok(0.0) };
            if self.dtype == F32 {
                // As many ulps as its sums have terms: those over equal keys round alike.
                let ulps = self.sizes()[3].max(16) as f64;
                close("the plain formula", got, value, |at| ulps * want.rounding(F32, at))?;
            }
            Ok(2.0 * value.max_error(got)?)
        };
        want.iter().zip(&got).map(error).collect()
    }

    /// The result, heads before rows, and the log-sum-exp if the method gives it.
    pub fn call(&self, views: &[Tensor]) -> Result<(Tensor, Option<Tensor>)> {
        self.call_by(Engine::default(), views)
    }

    fn call_by(&self, engine: Engine, views: &[Tensor]) -> Result<(Tensor, Option<Tensor>)> {
        let [q, k, v] = self.turned(views)?;
        if self.options.is_plain() && engine == Engine::default() {
            return Ok((q.kaio_flash_attn(&k, &v, self.options.causal)?, None));
        }
        let opts = self.opts(views)?.engine(engine);
        let (out, lse) = q.kaio_flash_attn_with_lse(&k, &v, &opts)?;
        if !out.is_contiguous() {
            bail!("the result is not contiguous");
        }
        Ok((self.turn(&out)?, Some(lse)))
    }

    /// Heads before rows as the op takes them, or back.
    pub fn turn(&self, t: &Tensor) -> Result<Tensor> {
        match self.options.bshd && t.rank() > 2 {
            true => t.transpose(t.rank() - 3, t.rank() - 2),
            false => Ok(t.clone()),
        }
    }

    /// q, k and v as the op takes them.
    pub fn turned(&self, views: &[Tensor]) -> Result<[Tensor; 3]> {
        Ok([self.turn(&views[0])?, self.turn(&views[1])?, self.turn(&views[2])?])
    }

    /// The options that go with q, k, v and the bias.
    pub fn opts(&self, views: &[Tensor]) -> Result<FlashAttnOptions> {
        let [batch, heads, ..] = self.sizes();
        self.options.build([batch, heads], views.get(3), views[0].device())
    }

    pub fn compare(&self, inputs: &[Tensor], want: &[Want], allowed: &[f64]) -> Result<()> {
        self.compare_by(Engine::default(), inputs, want, allowed)
    }

    fn compare_by(
        &self,
        engine: Engine,
        inputs: &[Tensor],
        want: &[Want],
        allowed: &[f64],
    ) -> Result<()> {
        let mut lse = None;
        let got = self.run(inputs, |views| {
            let (out, with) = self.call_by(engine, views)?;
            lse = with;
            Ok(out)
        })?;
        let (want_lse, want) = want.split_last().expect("the log-sum-exp comes last");
        if let Some(lse) = lse {
            // For 16-bit operands the GPU's tanh is good to 2^-22 absolutely, whatever the cap.
            let cap = self.options.softcap.filter(|_| lse.device().is_cuda() && self.dtype != F32);
            let capped = f64::from(cap.unwrap_or(0.0)) / 4_194_304.0;
            let bound = |at| capped + 2.0 * want_lse.rounding(F32, at);
            close("log-sum-exp", &lse, &want_lse.value, bound)?;
        }
        let tracked = self.tracked(inputs.len() - 1);
        for (i, got) in got.into_iter().enumerate() {
            let name = ["out", "gradient 0", "gradient 1", "gradient 2", "gradient 3"][i];
            let dtype = match i {
                0 => self.options.out_dtype(self.dtype),
                i => inputs[i - 1].dtype(),
            };
            match (got, i == 0 || tracked[i - 1]) {
                (None, false) => {}
                (Some(got), true) if got.dtype() == dtype => {
                    let tol = |at| allowed[i] + want[i].rounding(dtype, at);
                    close(name, &got, &want[i].value, tol)?;
                }
                (got, _) => bail!("{name} is {:?}", got.map(|t| t.dtype())),
            }
        }
        Ok(())
    }
}
