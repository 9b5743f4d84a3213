//! `act(A·B + bias)` for f16 and bf16, with gradients.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::activation::{Product, activated, bias_gradient};
use super::casts;
use super::{Computed, Differentiable, Op, View, eval, sum_to};
use crate::{
    Activation, Activations, Engine, MatmulOptions, check, cpu, cuda,
    error::Error,
    stack::{Stack, batch_dims, broadcast_batch},
};

/// What operands may be cast from.
pub(super) const CASTABLE: [DType; 3] = [DType::F32, DType::F16, DType::BF16];

/// What a message calls the result, whose sums are f32 whatever it is rounded to.
pub(super) const RESULT: &str = "the result";

/// The product of the user's methods.
pub(crate) fn matmul(
    op: &'static str,
    lhs: &Tensor,
    rhs: &Tensor,
    opts: &MatmulOptions,
) -> Result<Tensor> {
    let (a, b) = (("lhs", lhs), ("rhs", rhs));
    let bias = opts.bias.as_ref().map(|bias| ("bias", bias));
    check::tensors(op, &[Some(a), Some(b), bias].into_iter().flatten().collect::<Vec<_>>())?;
    let dtype = casts::multiplied_in(op, [a, b], opts.compute_dtype)?;
    let k = check::activations(op, a)?;
    let fix = "add a dimension with `.unsqueeze(0)?`";
    check::rank(op, b, 2..=usize::MAX, "[.., K, N]", fix)?;
    let got = rhs.dims()[rhs.rank() - 2];
    let why = format_args!("the K of `lhs` {:?}", lhs.dims());
    check::dim(op, "rhs", ("K", got), (k, why), "transpose one with `.t()?` or swap the operands")?;
    check::batch(op, b, a)?;
    let n = rhs.dims()[rhs.rank() - 1];
    if let Some((arg, t)) = bias {
        check::dtype(op, (arg, t), &[DType::F32, dtype])?;
        check::rank(op, (arg, t), 1..=1, "[N]", "flatten it with `.flatten_all()?`")?;
        let why = format_args!("the N of `rhs` {:?}", rhs.dims());
        check::dim(op, arg, ("N", t.dims()[0]), (n, why), "give it one element for each column")?;
    }
    if opts.activations != Activations::Float {
        return Err(Error::Value {
            op,
            name: "activations",
            got: format!("Activations::{:?}", opts.activations),
            want: "Activations::Float, with a weight that is not quantised".into(),
            fix: "see `kaio_matmul_quant_with`",
        }
        .into());
    }
    let out_dtype = opts.out_dtype.unwrap_or(DType::F32);
    check_out_dtype(op, "out_dtype", out_dtype, "leave it out for f32")?;
    let cast = casts::operands([lhs, rhs], dtype)?;
    let sources = cast.each_ref().map(Option::is_some);
    let [a, b] = [(&cast[0], lhs), (&cast[1], rhs)].map(|(cast, t)| cast.as_ref().unwrap_or(t));
    let bias = bias.map(|(_, bias)| bias);
    let of = |i: usize| sources[i].then_some([lhs, rhs][i]);
    let inputs: Vec<_> = [Some(a), Some(b), bias, of(0), of(1)].into_iter().flatten().collect();
    let empty =
        n == 0 || [&lhs.dims()[..lhs.rank() - 1], batch_dims(rhs.dims())].concat().contains(&0);
    let epilogue = Epilogue { out_dtype, activation: opts.activation };
    let matmul = Matmul { name: op, engine: opts.engine, epilogue, bias: bias.is_some(), sources };
    let [product] = activated(matmul, &inputs, empty)?;
    Ok(product)
}

/// Results are f32, f16 or bf16.
pub(super) fn check_out_dtype(
    op: &'static str,
    name: &'static str,
    dtype: DType,
    fix: &'static str,
) -> Result<()> {
    if matches!(dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Ok(());
    }
    let (got, want) = (dtype.as_str().into(), "f32, f16 or bf16".into());
    Err(Error::Value { op, name, got, want, fix }.into())
}

/// What is done to the f32 sums of a product, after the bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Epilogue {
    /// Rounded to once, at the end.
    pub out_dtype: DType,
    pub activation: Option<Activation>,
}

impl Epilogue {
    /// Nothing but the rounding.
    pub fn round(out_dtype: DType) -> Self {
        Self { out_dtype, activation: None }
    }
}

/// `act(A·B + bias)`, `[.., M, N]`, from f16, bf16 or (in a gradient on the CPU) f32 operands, summed
/// in f32. Inputs: A, B, perhaps the bias, and what A and B were cast from, if they were: those have the gradients then.
#[derive(Clone, Copy)]
pub(super) struct Matmul {
    name: &'static str,
    engine: Engine,
    epilogue: Epilogue,
    bias: bool,
    sources: [bool; 2],
}

/// The facts of one product.
pub(crate) struct MatmulProblem {
    pub lhs: Stack,
    pub rhs: Stack,
    pub out: Shape,
}

impl MatmulProblem {
    /// A right-hand side without batch dimensions folds the batch of the left-hand side into its
    /// rows, so that one product is left. Where strides forbid that, it stays a stack beside a
    /// right-hand side that is broadcast by stride: the CPU path multiplies its matrices in turn, the
    /// GPU packs them into one. The right-hand side is never repeated in memory.
    ///
    /// A result that no memory can hold is an error.
    pub fn new(op: &'static str, lhs: &Layout, rhs: &Layout) -> Result<Self> {
        let (a, b) = (Stack::new(lhs), Stack::new(rhs));
        let shared = batch_dims(rhs.dims()).is_empty();
        let batch = broadcast_batch(batch_dims(lhs.dims()), batch_dims(rhs.dims()))
            .expect("checked before the op was made");
        let out = Shape::from([batch.as_slice(), &[a.rows, b.cols]].concat());
        check::size(op, RESULT, out.dims(), DType::F32)?;
        Ok(match (shared, a.fold_rows()) {
            (true, Some(lhs)) => Self { lhs, rhs: b, out },
            _ => Self { lhs: a.broadcast(&batch), rhs: b.broadcast(&batch), out },
        })
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [(a, la), (b, lb), ..] = *inputs else { unreachable!("two operands") };
        let bias = self.bias.then(|| inputs[2]);
        let problem = MatmulProblem::new(self.name, la, lb)?;
        check::memory(self.name, RESULT, problem.out.dims(), DType::F32)?;
        let mut out = cpu::matmul(&problem, a, b)?;
        let Epilogue { out_dtype, activation } = self.epilogue;
        cpu::epilogue(&mut out, problem.rhs.cols, bias, activation)?;
        Ok(vec![(cpu::narrow_to(out_dtype, out)?, problem.out)])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [(a, la), (b, lb), ..] = *inputs else { unreachable!("two operands") };
        let bias = self.bias.then(|| inputs[2]);
        let problem = MatmulProblem::new(self.name, la, lb)?;
        let Self { name, engine, epilogue, .. } = *self;
        let out = cuda::matmul(name, &problem, engine, epilogue, a, b, bias)?;
        Ok(vec![(out, problem.out)])
    }
}

impl Differentiable for Matmul {
    /// Each operand for the gradient of the other.
    fn reads(&self, input: usize, inputs: &[&Tensor]) -> bool {
        input < 2 && inputs[self.leaf(1 - input)].track_op()
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// `dA = dC·Bᵀ` and `dB = Aᵀ·dC`, on transposed views, summed over broadcast batch dimensions;
    /// the bias takes the sum of `dC` over all rows. Never asked of a product with an activation that has elements:
    /// [`activated`] has it.
    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None; inputs.len()]) };
        let (a, b) = (inputs[0], inputs[1]);
        let [of_a, of_b] = [0, 1].map(|i| self.leaf(i));
        let da = || {
            let scaled = Scaled::new(grad, a.dtype(), grad.rank() - 1)?;
            self.product_like(inputs[of_a], &scaled.grad, &b.t()?, &scaled)
        };
        let db = || {
            // A shared B takes its gradient from all rows of all batches: one product, no sum after.
            let (a, grad) = match b.rank() {
                2 if grad.rank() > 2 => {
                    (a.flatten_to(a.rank() - 2)?, grad.flatten_to(grad.rank() - 2)?)
                }
                _ => (a.clone(), grad.clone()),
            };
            let scaled = Scaled::new(&grad, b.dtype(), grad.rank() - 2)?;
            self.product_like(inputs[of_b], &a.t()?, &scaled.grad, &scaled)
        };
        // No products: nothing depends on the operands.
        let empty = [a, b, grad].iter().any(|t| t.elem_count() == 0);
        let operand = |t: &Tensor, gradient: &dyn Fn() -> Result<Tensor>| match t.track_op() {
            true if empty => t.zeros_like().map(Some),
            true => gradient().map(Some),
            false => Ok(None),
        };
        let mut grads = vec![None; inputs.len()];
        grads[of_a] = operand(inputs[of_a], &da)?;
        grads[of_b] = operand(inputs[of_b], &db)?;
        if let Some(at) = self.bias().filter(|&at| inputs[at].track_op()) {
            grads[at] = Some(bias_gradient(self.name, grad, inputs[at])?);
        }
        Ok(grads)
    }
}

impl Product for Matmul {
    fn epilogue(&mut self) -> &mut Epilogue {
        &mut self.epilogue
    }

    fn bias(&self) -> Option<usize> {
        self.bias.then_some(2)
    }

    fn multiplied(&self, inputs: &[&Tensor]) -> DType {
        inputs[0].dtype()
    }
}

impl Matmul {
    /// The input that has the gradient of operand `i`.
    fn leaf(&self, i: usize) -> usize {
        casts::leaf(i, self.sources, 2 + usize::from(self.bias))
    }

    /// `lhs·rhs`, of which one is `upstream`'s gradient, as the gradient of `operand`.
    fn product_like(
        &self,
        operand: &Tensor,
        lhs: &Tensor,
        rhs: &Tensor,
        upstream: &Scaled,
    ) -> Result<Tensor> {
        let dtype = operand.dtype();
        // Where nothing is left to do after the product, it is rounded by the kernel.
        let done =
            !upstream.restores() && batch_dims(operand.dims()) == batch_dims(upstream.grad.dims());
        let epilogue = Epilogue::round(if done { dtype } else { DType::F32 });
        let [product] =
            eval(&Self { epilogue, bias: false, sources: [false; 2], ..*self }, &[lhs, rhs])?;
        match done {
            true => Ok(product),
            false => sum_to(&upstream.restore(product)?, operand.shape())?.to_dtype(dtype),
        }
    }
}

/// An upstream gradient in a form that the forward kernel multiplies, and the way back.
///
/// One in the operands' dtype is there already, and the CPU path multiplies f32 as it is. On the GPU
/// other gradients are cast to the operands' dtype, and
/// f16 would lose what is under 6e-8 or over 65504. So each vector along the summed dimension is
/// first divided by its own largest element, which the product's row or column takes back: what is
/// left under f16's range is under 2^-39 of its vector's largest element.
pub(super) struct Scaled {
    pub grad: Tensor,
    /// `[.., M, 1]` or `[.., 1, N]`.
    restore: Option<Tensor>,
}

impl Scaled {
    /// The largest f16 is 65504; sums are in f32 and cannot overflow from here.
    const PEAK: f64 = 32768.0;

    pub fn new(grad: &Tensor, dtype: DType, summed: usize) -> Result<Self> {
        if grad.dtype() == dtype || grad.device().is_cpu() {
            return Ok(Self { grad: grad.clone(), restore: None });
        }
        if dtype != DType::F16 {
            return Ok(Self { grad: grad.to_dtype(dtype)?, restore: None });
        }
        let grad = grad.to_dtype(DType::F32)?;
        // Clamped so that an all-zero vector is not divided by zero, nor an infinite one by infinity.
        let peak = grad.abs()?.max_keepdim(summed)?.clamp(1e-30f32, f32::MAX)?;
        let restore = (peak / Self::PEAK)?;
        let grad = grad.broadcast_div(&restore)?.to_dtype(dtype)?;
        Ok(Self { grad, restore: Some(restore) })
    }

    /// Whether [`restore`](Self::restore) does anything.
    pub fn restores(&self) -> bool {
        self.restore.is_some()
    }

    pub fn restore(&self, product: Tensor) -> Result<Tensor> {
        match &self.restore {
            Some(factor) => product.broadcast_mul(factor),
            None => Ok(product),
        }
    }
}
