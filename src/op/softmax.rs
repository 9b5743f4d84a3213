//! Softmax over the last dimension, with its gradient.

use candle_core::{CpuStorage, CudaStorage, DType, Result, Tensor};

use super::{Computed, Differentiable, Op, View, apply, eval, matrix};
use crate::{check, cpu, cuda};

const NAME: &str = "kaio_softmax";

/// `e^(x − max) / Σ e^(x − max)` over the last dimension.
pub(crate) fn softmax(x: &Tensor) -> Result<Tensor> {
    let arg = ("x", x);
    check::tensors(NAME, &[arg])?;
    check::rank(NAME, arg, 1..=usize::MAX, "[.., width]", "add a dimension with `.unsqueeze(0)?`")?;
    check::dtype(NAME, arg, &check::FLOATS)?;
    if x.device().is_cpu() {
        check::memory(NAME, "the result", x.dims(), DType::F32)?;
    }
    let [out] = apply(Softmax, &[&matrix(x)?])?;
    if x.rank() == 1 { out.squeeze(0) } else { Ok(out) }
}

struct Softmax;

impl Op for Softmax {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        Ok(vec![(cpu::softmax(inputs[0])?, inputs[0].1.shape().clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        Ok(vec![(cuda::softmax(NAME, inputs[0], None)?, inputs[0].1.shape().clone())])
    }
}

impl Differentiable for Softmax {
    fn reads(&self, _: usize, _: &[&Tensor]) -> bool {
        false
    }

    /// `dx = y · (dy − Σ y·dy)`.
    fn grad(
        &self,
        _: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None]) };
        let [of_x] = eval(&Backward, &[&results[0], grad])?;
        Ok(vec![Some(of_x)])
    }
}

/// Inputs: the result and its gradient.
struct Backward;

impl Op for Backward {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        Ok(vec![(cpu::softmax_backward(inputs[0], inputs[1])?, inputs[0].1.shape().clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let of_x = cuda::softmax(NAME, inputs[0], Some(inputs[1]))?;
        Ok(vec![(of_x, inputs[0].1.shape().clone())])
    }
}
