//! Sums of two tensors.

use candle_core::backend::{BackendDevice, BackendStorage};
use candle_core::op::Add;
use candle_core::{CpuStorage, CudaStorage, Result, Tensor};

use super::{Computed, Differentiable, Op, View, apply};
use crate::check;

const OP: &str = "kaio_add";

/// The sum of two tensors of one shape and dtype.
pub(crate) fn add(lhs: &Tensor, rhs: &Tensor) -> Result<Tensor> {
    let args @ [a, b] = [("lhs", lhs), ("rhs", rhs)];
    check::tensors(OP, &args)?;
    check::dtype(OP, a, &check::FLOATS)?;
    check::same_dtype(OP, b, a)?;
    check::same_shape(OP, b, a)?;
    match lhs.device().is_cpu() {
        true => check::memory(OP, "the result", lhs.dims(), lhs.dtype())?,
        false => check::copyable(OP, lhs.elem_count())?,
    }
    let [sum] = apply(Sum, &[lhs, rhs])?;
    Ok(sum)
}

struct Sum;

impl Sum {
    /// By candle's kernels, which read any strides.
    fn of<S>([(a, at), (b, b_at)]: [View<S>; 2]) -> Result<Vec<Computed<S>>>
    where
        S: BackendStorage<Device: BackendDevice<Storage = S>>,
    {
        let sum = match at.shape().elem_count() {
            0 => a.device().zeros_impl(at.shape(), a.dtype())?,
            _ => a.binary_impl::<Add>(b, at, b_at)?,
        };
        Ok(vec![(sum, at.shape().clone())])
    }
}

impl Op for Sum {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [a, b] = *inputs else { unreachable!("two operands") };
        Self::of([a, b])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let [a, b] = *inputs else { unreachable!("two operands") };
        Self::of([a, b])
    }
}

impl Differentiable for Sum {
    fn reads(&self, _: usize, _: &[&Tensor]) -> bool {
        false
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// That of the sum, of both.
    fn grad(
        &self,
        _: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [grad] = grads else { unreachable!("one result") };
        Ok(vec![grad.clone(), grad.clone()])
    }
}
