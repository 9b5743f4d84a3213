//! `C = A·B` for f16 and bf16, with gradients.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::{Differentiable, Node, Op, View, check, eval};
use crate::{
    MatmulOptions, cpu, cuda,
    error::Error,
    stack::{Stack, batch_dims, broadcast_batch},
};

/// Which of an engine's kernels multiplies, where it has both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Pipeline {
    /// Loads a tile, then computes on it.
    Sync,
    /// Loads the next tile with `cp.async` while it computes.
    Async,
}

/// The product of the user's methods.
pub(crate) fn matmul(
    op: &'static str,
    lhs: &Tensor,
    rhs: &Tensor,
    opts: &MatmulOptions,
    pipeline: Pipeline,
) -> Result<Tensor> {
    let (a, b) = (("lhs", lhs), ("rhs", rhs));
    check::one_device(op, &[a, b])?;
    check::dtype(op, a, &[DType::F16, DType::BF16])?;
    check::same_dtype(op, b, a)?;
    let k = check::activations(op, a)?;
    let fix = "add a dimension with `.unsqueeze(0)?`";
    check::rank(op, b, 2..=usize::MAX, "[.., K, N]", fix)?;
    let got = rhs.dims()[rhs.rank() - 2];
    let why = format_args!("the K of `lhs` {:?}", lhs.dims());
    check::dim(op, "rhs", ("K", got), (k, why), "transpose one with `.t()?` or swap the operands")?;
    check::batch(op, b, a)?;
    let out_dtype = opts.out_dtype.unwrap_or(DType::F32);
    if !matches!(out_dtype, DType::F32 | DType::F16 | DType::BF16) {
        return Err(Error::Value {
            op,
            name: "out_dtype",
            got: out_dtype.as_str().into(),
            want: "f32, f16 or bf16".into(),
            fix: "leave it out for f32",
        }
        .into());
    }
    check::engine(op, opts.engine)?;
    lhs.apply_op2(rhs, Node(Matmul { name: op, pipeline, out_dtype }))
}

/// `[.., M, N]` from f16, bf16 or (in a gradient on the CPU) f32 operands, summed in f32.
#[derive(Clone, Copy)]
pub(super) struct Matmul {
    name: &'static str,
    pipeline: Pipeline,
    out_dtype: DType,
}

impl Matmul {
    /// A product to f32.
    pub fn new(name: &'static str) -> Self {
        Self { name, pipeline: Pipeline::Async, out_dtype: DType::F32 }
    }
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
    pub fn new(lhs: &Layout, rhs: &Layout) -> Self {
        let (a, b) = (Stack::new(lhs), Stack::new(rhs));
        let shared = batch_dims(rhs.dims()).is_empty();
        let batch = broadcast_batch(batch_dims(lhs.dims()), batch_dims(rhs.dims()))
            .expect("checked before the op was made");
        let out = Shape::from([batch.as_slice(), &[a.rows, b.cols]].concat());
        match (shared, a.fold_rows()) {
            (true, Some(lhs)) => Self { lhs, rhs: b, out },
            _ => Self { lhs: a.broadcast(&batch), rhs: b.broadcast(&batch), out },
        }
    }
}

impl Op for Matmul {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<(CpuStorage, Shape)> {
        let [(a, la), (b, lb)] = *inputs else { unreachable!("two operands") };
        let problem = MatmulProblem::new(la, lb);
        let out = cpu::matmul(&problem, a, b)?;
        Ok((cpu::narrow_to(self.out_dtype, out)?, problem.out))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<(CudaStorage, Shape)> {
        let [(a, la), (b, lb)] = *inputs else { unreachable!("two operands") };
        let problem = MatmulProblem::new(la, lb);
        let out = cuda::matmul(self.name, &problem, self.pipeline, self.out_dtype, a, b)?;
        Ok((out, problem.out))
    }
}

impl Differentiable for Matmul {
    /// `dA = dC·Bᵀ` and `dB = Aᵀ·dC`, on transposed views, summed over broadcast batch dimensions.
    fn grad(
        &self,
        inputs: &[&Tensor],
        _out: &Tensor,
        grad: &Tensor,
    ) -> Result<Vec<Option<Tensor>>> {
        let (a, b) = (inputs[0], inputs[1]);
        if [a, b, grad].iter().any(|t| t.elem_count() == 0) {
            // No products: nothing depends on the inputs.
            return Ok(vec![Some(a.zeros_like()?), Some(b.zeros_like()?)]);
        }
        let product = Self { out_dtype: DType::F32, ..*self };
        let grad = grad.to_dtype(DType::F32)?;
        let da = || {
            let scaled = Scaled::new(&grad, a.dtype(), grad.rank() - 1)?;
            let da = eval(&product, &[&scaled.grad, &b.t()?])?;
            sum_to(&scaled.restore(da)?, a.shape())?.to_dtype(a.dtype())
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
            let db = eval(&product, &[&a.t()?, &scaled.grad])?;
            sum_to(&scaled.restore(db)?, b.shape())?.to_dtype(b.dtype())
        };
        Ok(vec![a.track_op().then(da).transpose()?, b.track_op().then(db).transpose()?])
    }
}

/// An upstream gradient in a form that the forward kernel multiplies, and the way back.
///
/// The CPU path multiplies f32 as it is. On the GPU the gradient is cast to the operands' dtype, and
/// f16 would lose what is under 6e-8 or over 65504. So each vector along the summed dimension is
/// first divided by its own largest element, which the product's row or column takes back: what is
/// left under f16's range is under 2^-39 of its vector's largest element.
struct Scaled {
    grad: Tensor,
    /// `[.., M, 1]` or `[.., 1, N]`.
    restore: Option<Tensor>,
}

impl Scaled {
    /// The largest f16 is 65504; sums are in f32 and cannot overflow from here.
    const PEAK: f64 = 32768.0;

    fn new(grad: &Tensor, dtype: DType, summed: usize) -> Result<Self> {
        if grad.device().is_cpu() {
            return Ok(Self { grad: grad.clone(), restore: None });
        }
        if dtype != DType::F16 {
            return Ok(Self { grad: grad.to_dtype(dtype)?, restore: None });
        }
        // Clamped so that an all-zero vector is not divided by zero, nor an infinite one by infinity.
        let peak = grad.abs()?.max_keepdim(summed)?.clamp(1e-30f32, f32::MAX)?;
        let restore = (peak / Self::PEAK)?;
        let grad = grad.broadcast_div(&restore)?.to_dtype(dtype)?;
        Ok(Self { grad, restore: Some(restore) })
    }

    fn restore(&self, product: Tensor) -> Result<Tensor> {
        match &self.restore {
            Some(factor) => product.broadcast_mul(factor),
            None => Ok(product),
        }
    }
}

/// Sums over the dimensions along which `shape` was broadcast.
fn sum_to(t: &Tensor, shape: &Shape) -> Result<Tensor> {
    let extra = t.rank() - shape.rank();
    let mut t = t.clone();
    for _ in 0..extra {
        t = t.sum(0)?;
    }
    for (i, &len) in shape.dims().iter().enumerate() {
        if len == 1 && t.dims()[i] != 1 {
            t = t.sum_keepdim(i)?;
        }
    }
    Ok(t)
}
