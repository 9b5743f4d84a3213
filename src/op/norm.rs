//! RMSNorm (Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019) and LayerNorm (Ba, Kiros and Hinton, "Layer
//! Normalization", 2016) over the last dimension, with gradients.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::{Computed, Differentiable, Op, View, apply, eval_all, matrix};
use crate::error::Error;
use crate::{check, cpu, cuda};

/// `x · rstd · weight`, with `rstd = 1/√(mean(x²) + eps)`.
pub(crate) fn rms_norm(x: &Tensor, weight: &Tensor, eps: f32) -> Result<Tensor> {
    let norm = Norm::new("kaio_rms_norm", false, eps);
    let [out] = norm.of(Inputs { x, residual: None, weight, bias: None })?;
    Ok(out)
}

/// `(x − mean) · rstd · weight + bias`, with `rstd = 1/√(mean((x − mean)²) + eps)`.
pub(crate) fn layer_norm(
    x: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f32,
) -> Result<Tensor> {
    let norm = Norm::new("kaio_layer_norm", true, eps);
    let [out] = norm.of(Inputs { x, residual: None, weight, bias })?;
    Ok(out)
}

/// The RMSNorm of `x + residual`, and that sum.
pub(crate) fn add_rms_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let norm = Norm::new("kaio_add_rms_norm", false, eps);
    norm.of(Inputs { x, residual: Some(residual), weight, bias: None }).map(Into::into)
}

/// The LayerNorm of `x + residual`, and that sum.
pub(crate) fn add_layer_norm(
    x: &Tensor,
    residual: &Tensor,
    weight: &Tensor,
    bias: Option<&Tensor>,
    eps: f32,
) -> Result<(Tensor, Tensor)> {
    let norm = Norm::new("kaio_add_layer_norm", true, eps);
    norm.of(Inputs { x, residual: Some(residual), weight, bias }).map(Into::into)
}

/// A norm's inputs. Weight and bias are vectors.
#[derive(Clone, Copy)]
pub(crate) struct Inputs<T> {
    pub x: T,
    /// Added to x before.
    pub residual: Option<T>,
    pub weight: T,
    pub bias: Option<T>,
}

impl<T: Copy> Inputs<T> {
    fn all(&self) -> impl Iterator<Item = T> {
        let Self { x, residual, weight, bias } = *self;
        [Some(x), residual, Some(weight), bias].into_iter().flatten()
    }
}

/// What a norm computes, row-major.
pub(crate) struct Results<S> {
    pub out: S,
    /// Of x and residual, if there is one.
    pub sum: Option<S>,
    /// `rstd` of each row and, where it is subtracted, the mean: in f32, if they are saved.
    pub stats: Option<Stats<S>>,
}

/// What a gradient needs of each row.
#[derive(Clone, Copy)]
pub(crate) struct Stats<S> {
    pub rstd: S,
    pub mean: Option<S>,
}

/// From what gradients are computed.
#[derive(Clone, Copy)]
pub(crate) struct Upstream<T> {
    /// What was normed.
    pub x: T,
    pub weight: T,
    pub stats: Stats<T>,
    /// Of the normed rows.
    pub grad: T,
    /// Of the sum of x and residual, if it has one.
    pub sum_grad: Option<T>,
}

/// Of x, weight and bias.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Each<T> {
    pub x: T,
    pub weight: T,
    pub bias: T,
}

/// The gradients that are wanted.
pub(crate) type Grads<S> = Each<Option<S>>;

/// What norm.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Norm {
    pub op: &'static str,
    /// Whether the mean is subtracted.
    pub centred: bool,
    pub eps: f32,
    /// Whether what a gradient needs is saved.
    pub save: bool,
    add: bool,
    bias: bool,
}

impl Norm {
    fn new(op: &'static str, centred: bool, eps: f32) -> Self {
        Self { op, centred, eps, save: false, add: false, bias: false }
    }

    fn of<const N: usize>(mut self, inputs: Inputs<&Tensor>) -> Result<[Tensor; N]> {
        self.check(&inputs)?;
        self.add = inputs.residual.is_some();
        self.bias = inputs.bias.is_some();
        self.save = inputs.all().any(Tensor::track_op);
        let rank = inputs.x.rank();
        let [x, residual] = [Some(inputs.x), inputs.residual];
        let [x, residual] = [x, residual].map(|t| t.map(matrix).transpose());
        let (x, residual) = (x?.expect("there is an x"), residual?);
        let inputs = Inputs { x: &x, residual: residual.as_ref(), ..inputs };
        let mut results = apply::<_, N>(self, &inputs.all().collect::<Vec<_>>())?;
        if rank == 1 {
            for result in &mut results {
                *result = result.squeeze(0)?;
            }
        }
        Ok(results)
    }

    fn check(&self, inputs: &Inputs<&Tensor>) -> Result<()> {
        let Self { op, eps, .. } = *self;
        let x = ("x", inputs.x);
        let residual = inputs.residual.map(|t| ("residual", t));
        let vectors = [Some(("weight", inputs.weight)), inputs.bias.map(|t| ("bias", t))];
        let vectors = || vectors.into_iter().flatten();
        check::tensors(op, &[x].into_iter().chain(residual).chain(vectors()).collect::<Vec<_>>())?;
        check::rank(op, x, 1..=usize::MAX, "[.., width]", "add a dimension with `.unsqueeze(0)?`")?;
        check::dtype(op, x, &check::FLOATS)?;
        if let Some(residual) = residual {
            check::same_dtype(op, residual, x)?;
            check::same_shape(op, residual, x)?;
        }
        let width = inputs.x.dims()[inputs.x.rank() - 1];
        for (arg, t) in vectors() {
            check::rank(op, (arg, t), 1..=1, "[width]", "flatten it with `.flatten_all()?`")?;
            let why = format_args!("the last dimension of `x` {:?}", inputs.x.dims());
            let each = "give it one element for each column";
            check::dim(op, arg, ("width", t.dims()[0]), (width, why), each)?;
        }
        match inputs.x.dtype() {
            DType::F32 => check::dtype(op, ("weight", inputs.weight), &[DType::F32])?,
            half => check::dtype(op, ("weight", inputs.weight), &[DType::F32, half])?,
        }
        if let Some(bias) = inputs.bias {
            check::same_dtype(op, ("bias", bias), ("weight", inputs.weight))?;
        }
        check::finite(op, "eps", eps)?;
        if eps < 0.0 {
            let (got, want) = (eps.to_string(), "at least 0".into());
            return Err(Error::Value { op, name: "eps", got, want, fix: "use 1e-5 or 1e-6" }.into());
        }
        if inputs.x.device().is_cpu() {
            check::memory(op, "the result", inputs.x.dims(), DType::F32)?;
        }
        Ok(())
    }

    fn read<T: Copy>(&self, inputs: &[T]) -> Inputs<T> {
        let mut inputs = inputs.iter().copied();
        let mut next = || inputs.next().expect("as many inputs as the op has");
        let (x, residual) = (next(), self.add.then(&mut next));
        Inputs { x, residual, weight: next(), bias: self.bias.then(&mut next) }
    }

    fn results<S>(&self, results: Results<S>, x: &Layout) -> Vec<Computed<S>> {
        let rows = Shape::from(x.shape().elem_count() / x.dims()[x.dims().len() - 1].max(1));
        let like_x = [Some(results.out), results.sum].into_iter().flatten();
        let like_x = like_x.map(|storage| (storage, x.shape().clone()));
        let stats = results.stats.map(|Stats { rstd, mean }| [Some(rstd), mean]);
        let stats = stats.into_iter().flatten().flatten();
        like_x.chain(stats.map(|storage| (storage, rows.clone()))).collect()
    }
}

impl Op for Norm {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let inputs = self.read(inputs);
        Ok(self.results(cpu::norm(self, &inputs)?, inputs.x.1))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let inputs = self.read(inputs);
        Ok(self.results(cuda::norm(self, &inputs)?, inputs.x.1))
    }
}

impl Differentiable for Norm {
    /// What was normed, which is a result where it is a sum, and the weight.
    fn reads(&self, input: usize, _: &[&Tensor]) -> bool {
        if self.add { input == 2 } else { input < 2 }
    }

    fn reads_result(&self, result: usize) -> bool {
        result == 1
    }

    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let Inputs { x, residual, weight, bias } = self.read(inputs);
        let tracks = |t: Option<&Tensor>| t.is_some_and(Tensor::track_op);
        let rows = tracks(Some(x)) || tracks(residual);
        let wants = Each { x: rows, weight: tracks(Some(weight)), bias: tracks(bias) };
        let sum_grad = grads.get(1).cloned().flatten();
        let of = match &grads[0] {
            Some(grad) => {
                let stats = &results[grads.len()..];
                let sum_grad = sum_grad.filter(|_| wants.x);
                let backward = Backward { norm: *self, wants, add: sum_grad.is_some() };
                let normed = if self.add { &results[1] } else { x };
                let inputs = [normed, weight, grad].into_iter().chain(&sum_grad).chain(stats);
                backward.grads(&inputs.collect::<Vec<_>>())?
            }
            // Only the sum went on.
            None => {
                let none = |t: Option<&Tensor>| match t {
                    Some(t) if t.track_op() => t.zeros_like().map(Some),
                    _ => Ok(None),
                };
                Each { x: sum_grad, weight: none(Some(weight))?, bias: none(bias)? }
            }
        };
        let residual = residual.map(|_| of.x.clone());
        let bias = bias.map(|_| of.bias);
        Ok([Some(of.x), residual, Some(of.weight), bias].into_iter().flatten().collect())
    }
}

/// Inputs: what was normed, the weight, the gradient of the normed rows, that of the sum if it has one, and what was
/// saved. Results: the gradients that are wanted.
struct Backward {
    norm: Norm,
    wants: Each<bool>,
    /// Whether the sum of x and residual has a gradient of its own.
    add: bool,
}

impl Backward {
    fn grads(&self, inputs: &[&Tensor]) -> Result<Grads<Tensor>> {
        let Each { x, weight, bias } = self.wants;
        let mut results = eval_all(self, inputs)?.into_iter();
        let mut next = |wanted: bool| if wanted { results.next() } else { None };
        Ok(Each { x: next(x), weight: next(weight), bias: next(bias) })
    }

    fn read<T: Copy>(&self, inputs: &[T]) -> Upstream<T> {
        let mut inputs = inputs.iter().copied();
        let mut next = || inputs.next().expect("as many inputs as the op has");
        let (x, weight, grad, sum_grad) = (next(), next(), next(), self.add.then(&mut next));
        let stats = Stats { rstd: next(), mean: self.norm.centred.then(&mut next) };
        Upstream { x, weight, stats, grad, sum_grad }
    }

    fn results<S>(&self, grads: Grads<S>, x: &Layout) -> Vec<Computed<S>> {
        let width = Shape::from(x.dims()[x.dims().len() - 1]);
        let vectors = [grads.weight, grads.bias].into_iter().flatten();
        let vectors = vectors.map(|storage| (storage, width.clone()));
        grads.x.map(|storage| (storage, x.shape().clone())).into_iter().chain(vectors).collect()
    }
}

impl Op for Backward {
    fn name(&self) -> &'static str {
        self.norm.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let inputs = self.read(inputs);
        Ok(self.results(cpu::norm_backward(&inputs, self.wants)?, inputs.x.1))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let inputs = self.read(inputs);
        let grads = cuda::norm_backward(self.norm.op, &inputs, self.wants)?;
        Ok(self.results(grads, inputs.x.1))
    }
}
