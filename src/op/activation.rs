//! What follows a product, with gradients: activations, and biases.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Tensor};

use super::{Computed, Differentiable, Epilogue, Op, View, apply, eval_all};
use crate::stack::Stack;
use crate::{Activation, cpu, cuda};

/// A product of one result with an epilogue.
pub(super) trait Product: Differentiable {
    fn epilogue(&mut self) -> &mut Epilogue;
    /// Which input is the bias.
    fn bias(&self) -> Option<usize>;
    /// What the gradients of its operands are multiplied in.
    fn multiplied(&self, inputs: &[&Tensor]) -> DType;
}

/// A product. Where an input tracks a gradient, what its activation is applied to is rounded to the result's dtype, and kept for
/// the backward pass; an empty product has nothing to activate.
pub(super) fn activated<P: Product, const N: usize>(
    mut product: P,
    inputs: &[&Tensor],
    empty: bool,
) -> Result<[Tensor; N]> {
    let activation = &mut product.epilogue().activation;
    if empty || activation.is_none() || !inputs.iter().any(|t| t.track_op()) {
        return apply(product, inputs);
    }
    match activation.take() {
        Some(act) => apply(Activated { product, act }, inputs),
        None => apply(product, inputs),
    }
}

/// `act(z)` of a product z. Results: that, and z.
struct Activated<P> {
    product: P,
    act: Activation,
}

impl<P: Product> Op for Activated<P> {
    fn name(&self) -> &'static str {
        self.product.name()
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let mut results = self.product.cpu(inputs)?;
        let (z, shape) = &results[0];
        let out = cpu::activation(self.act, (z, &Layout::contiguous(shape)))?;
        results.insert(0, (out, shape.clone()));
        Ok(results)
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let mut results = self.product.cuda(inputs)?;
        let (z, shape) = &results[0];
        let stack = Stack::new(&Layout::contiguous(shape));
        let out = cuda::activation(self.name(), self.act, (z, &stack))?;
        results.insert(0, (out, shape.clone()));
        Ok(results)
    }
}

impl<P: Product> Differentiable for Activated<P> {
    fn differentiates(&self, input: usize) -> bool {
        self.product.differentiates(input)
    }

    fn reads(&self, input: usize, inputs: &[&Tensor]) -> bool {
        self.product.reads(input, inputs)
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// `dz = grad · act′(z)` and its sums, which are the bias's gradient, in one pass; the product has the others.
    fn grad(
        &self,
        inputs: &[&Tensor],
        results: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let [Some(grad)] = grads else { return Ok(vec![None; inputs.len()]) };
        let z = &results[1];
        let bias = self.product.bias().filter(|&at| inputs[at].track_op());
        let op = Backward {
            name: self.name(),
            activation: Some((self.act, upstream(grad, self.product.multiplied(inputs)))),
            bias: bias.map(|at| inputs[at].dtype()),
        };
        let mut gradients = eval_all(&op, &[grad, z])?.into_iter();
        let dz = gradients.next();
        // The product is not to sum what has been summed.
        let constant = bias.map(|at| inputs[at].detach());
        let mut inputs = inputs.to_vec();
        if let Some((at, constant)) = bias.zip(constant.as_ref()) {
            inputs[at] = constant;
        }
        let mut all = self.product.grad(&inputs, &results[1..], &[dz])?;
        if let Some(at) = bias {
            all[at] = gradients.next();
        }
        Ok(all)
    }
}

/// What `grad · act′(z)` is kept in: what it will be multiplied in, but f32 where that may lose what f32 holds: in f16, which has
/// too few exponents, and on the CPU, whose products take f32.
fn upstream(grad: &Tensor, multiplied: DType) -> DType {
    let as_it_is = grad.dtype() == multiplied;
    match as_it_is || (multiplied == DType::BF16 && grad.device().is_cuda()) {
        true => multiplied,
        false => DType::F32,
    }
}

/// The gradient of a bias of a product with gradient `grad`.
pub(super) fn bias_gradient(op: &'static str, grad: &Tensor, bias: &Tensor) -> Result<Tensor> {
    if grad.elem_count() == 0 {
        return bias.zeros_like();
    }
    let op = Backward { name: op, activation: None, bias: Some(bias.dtype()) };
    let [sums] = super::eval(&op, &[grad])?;
    Ok(sums)
}

/// Inputs: a gradient and, with an activation, what that is applied to. Results: `grad · act′(z)` in a dtype, if there is an
/// activation, and the sums over all rows in the bias's dtype, if there is a bias.
struct Backward {
    name: &'static str,
    activation: Option<(Activation, DType)>,
    bias: Option<DType>,
}

impl Backward {
    fn results<S>(&self, grad: &Layout, (out, sums): (Option<S>, Option<S>)) -> Vec<Computed<S>> {
        let n = grad.dims()[grad.dims().len() - 1];
        let out = out.map(|out| (out, grad.shape().clone()));
        out.into_iter().chain(sums.map(|sums| (sums, n.into()))).collect()
    }
}

impl Op for Backward {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let before = self.activation.map(|(act, dtype)| (act, inputs[1], dtype));
        let computed = cpu::activation_backward(inputs[0], before, self.bias)?;
        Ok(self.results(inputs[0].1, computed))
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let stacks: Vec<_> = inputs.iter().map(|(_, layout)| Stack::new(layout)).collect();
        let operand = |i: usize| (inputs[i].0, &stacks[i]);
        let before = self.activation.map(|(act, dtype)| (act, operand(1), dtype));
        let computed = cuda::activation_backward(self.name, operand(0), before, self.bias)?;
        Ok(self.results(inputs[0].1, computed))
    }
}
