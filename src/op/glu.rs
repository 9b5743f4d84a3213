//! Gated linear units, `act(gate) · up` (Shazeer, "GLU Variants Improve Transformer", 2020), with gradients.

use candle_core::{CpuStorage, CudaStorage, DType, Result, Tensor};

use super::{Computed, Differentiable, Op, View, apply, eval, matrix};
use crate::options::Gate;
use crate::stack::Stack;
use crate::{check, cpu, cuda};

/// `act(gate) · up` of two tensors of one shape and dtype.
pub(crate) fn glu(op: &'static str, kind: Gate, gate: &Tensor, up: &Tensor) -> Result<Tensor> {
    let args @ [a, b] = [("gate", gate), ("up", up)];
    check::tensors(op, &args)?;
    check::dtype(op, a, &check::FLOATS)?;
    check::same_dtype(op, b, a)?;
    check::same_shape(op, b, a)?;
    if gate.device().is_cpu() {
        check::memory(op, "the result", gate.dims(), DType::F32)?;
    }
    let [out] = apply(Glu { op, kind }, &[&matrix(gate)?, &matrix(up)?])?;
    if out.rank() == gate.rank() { Ok(out) } else { out.reshape(gate.shape()) }
}

struct Glu {
    op: &'static str,
    kind: Gate,
}

impl Op for Glu {
    fn name(&self) -> &'static str {
        self.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [gate, up] = *inputs else { unreachable!("two operands") };
        Ok(vec![(cpu::glu(self.kind, gate, up)?, gate.1.shape().clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let stacks: Vec<_> = inputs.iter().map(|(_, layout)| Stack::new(layout)).collect();
        let [(gate, at), (up, _)] = *inputs else { unreachable!("two operands") };
        let out = cuda::glu(self.op, self.kind, [(gate, &stacks[0]), (up, &stacks[1])])?;
        Ok(vec![(out, at.shape().clone())])
    }
}

impl Differentiable for Glu {
    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// `dgate = dout · up · act′(gate)` and `dup = dout · act(gate)`, from the operands alone.
    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None, None]) };
        let backward = Backward(Self { ..*self });
        let of_both: [_; 2] = eval(&backward, &[inputs[0], inputs[1], grad])?;
        Ok(of_both.map(Some).into())
    }
}

/// Inputs: gate, up and the result's gradient. Results: the gradients of both.
struct Backward(Glu);

impl Op for Backward {
    fn name(&self) -> &'static str {
        self.0.op
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [gate, up, grad] = *inputs else { unreachable!("two operands and a gradient") };
        let grads = cpu::glu_backward(self.0.kind, gate, up, grad)?;
        Ok(grads.map(|grad| (grad, gate.1.shape().clone())).into())
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let stacks: Vec<_> = inputs.iter().map(|(_, layout)| Stack::new(layout)).collect();
        let operands = std::array::from_fn(|i| (inputs[i].0, &stacks[i]));
        let grads = cuda::glu_backward(self.0.op, self.0.kind, operands)?;
        Ok(grads.map(|grad| (grad, inputs[0].1.shape().clone())).into())
    }
}
