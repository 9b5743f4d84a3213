//! `act(x·W + bias)` for quantised weights W, which are constants, with the gradient of x.

use candle_core::{CpuStorage, CudaStorage, DType, Layout, Result, Shape, Tensor};

use super::activation::{Product, bias_gradient};
use super::matmul::{RESULT, Scaled};
use super::{Computed, Differentiable, Epilogue, Op, View, eval};
use crate::options::Gate;
use crate::quant::QuantWeight;
use crate::quant::planes::{Facts, Operands, Weight};
use crate::stack::Stack;
use crate::{Activation, check, cpu, cuda};

/// What the activations are.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Lhs {
    /// f16 or bf16.
    Float,
    /// int8 bytes. Sums are exact, and then times `scale`.
    Int8 { scale: f32, zero_point: i32 },
    /// e4m3, of which `width` elements of a row share a scale.
    Fp8 { width: usize },
    /// f16 or bf16, which the product rounds to codes.
    Rounded(Rounding),
}

/// How activations are rounded to codes of eight bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rounding {
    /// u8 for int8, or e4m3.
    pub dtype: DType,
    /// Elements of a row that share a scale.
    pub width: usize,
}

/// Products of x with some weights, a result each. Inputs: x, its scales, the bias, and the operands of each weight.
#[derive(Clone)]
pub(super) struct Project {
    pub name: &'static str,
    pub lhs: Lhs,
    /// Whether codes have scales of their own.
    pub scales: bool,
    pub bias: bool,
    pub weights: Vec<Facts>,
    pub epilogue: Epilogue,
}

/// The inputs that are read.
struct Inputs<T> {
    x: T,
    scales: Option<T>,
    bias: Option<T>,
    weights: Vec<Weight<T>>,
}

impl Project {
    fn read<T: Copy>(&self, inputs: &[T]) -> Inputs<T> {
        let mut inputs = inputs.iter().copied();
        let mut next = || inputs.next().expect("as many inputs as the op has");
        let (x, scales) = (next(), self.scales.then(&mut next));
        let bias = self.bias.then(&mut next);
        let weights = self.weights.iter().map(|facts| facts.read(&mut inputs)).collect();
        Inputs { x, scales, bias, weights }
    }

    /// Whether x has a gradient: codes have none.
    fn differentiates_x(&self) -> bool {
        matches!(self.lhs, Lhs::Float | Lhs::Rounded(_))
    }

    fn bias_at(&self) -> Option<usize> {
        self.bias.then_some(1 + usize::from(self.scales))
    }
}

/// The activations as one matrix or, if strides forbid that, as a stack, and the shape of their product
/// with a weight of `n` columns, unless no memory can hold it.
fn rows(op: &'static str, lhs: &Layout, n: usize) -> Result<(Stack, Shape)> {
    let mut dims = lhs.dims().to_vec();
    *dims.last_mut().expect("rank checked") = n;
    check::size(op, RESULT, &dims, DType::F32)?;
    let stack = Stack::new(lhs);
    Ok((stack.fold_rows().unwrap_or(stack), Shape::from(dims)))
}

/// Activations rounded to codes, and the scales of groups in their rows.
fn rounded(
    op: &'static str,
    (x, layout): View<CpuStorage>,
    Rounding { dtype, width }: Rounding,
) -> Result<[(CpuStorage, Layout); 2]> {
    check::memory(op, "rounded activations", layout.dims(), DType::F32)?;
    let (codes, scales) = cpu::quantize_rows((x, &Stack::new(layout)), dtype, width)?;
    let (rows, k) = layout.dims().split_at(layout.dims().len() - 1);
    let groups = (rows.iter().product::<usize>(), k[0].div_ceil(width));
    Ok([
        (codes, Layout::contiguous(layout.shape())),
        (CpuStorage::F32(scales), Layout::contiguous(groups)),
    ])
}

impl Op for Project {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let Inputs { x: (x, layout), scales, bias, weights } = self.read(inputs);
        let Epilogue { out_dtype, activation } = self.epilogue;
        let made = match self.lhs {
            Lhs::Rounded(rounding) => Some(rounded(self.name, (x, layout), rounding)?),
            _ => None,
        };
        let (x, scales) = match &made {
            Some([(codes, _), (scales, groups)]) => (codes, Some((scales, groups))),
            None => (x, scales),
        };
        // Codes lie row by row.
        let layout = made.as_ref().map_or(layout, |[(_, codes), _]| codes);
        let product = |weight: &Weight<View<CpuStorage>>| {
            let n = weight.facts.dims[1];
            let (lhs, shape) = rows(self.name, layout, n)?;
            check::memory(self.name, RESULT, shape.dims(), DType::F32)?;
            let x = cpu::Activations { codes: (x, &lhs), scales };
            let mut out = match self.lhs {
                Lhs::Float => cpu::matmul_quant(x.codes, weight, false)?,
                Lhs::Int8 { scale, zero_point } => {
                    cpu::matmul_int8(&x, (scale, zero_point), weight)?
                }
                Lhs::Rounded(Rounding { dtype: DType::U8, .. }) => {
                    cpu::matmul_int8(&x, (1.0, 0), weight)?
                }
                Lhs::Fp8 { width } | Lhs::Rounded(Rounding { width, .. }) => {
                    cpu::matmul_fp8(&x, width, weight)?
                }
            };
            cpu::epilogue(&mut out, n, bias, activation)?;
            Ok((cpu::narrow_to(out_dtype, out)?, shape))
        };
        weights.iter().map(product).collect()
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let Inputs { x, scales, bias, weights } = self.read(inputs);
        // What no memory can hold is refused before what no kernel takes.
        let shape = |weight: &Weight<_>| {
            let (_, shape) = rows(self.name, x.1, weight.facts.dims[1])?;
            check::size(self.name, RESULT, shape.dims(), DType::F32)?;
            Ok(shape)
        };
        let shapes = weights.iter().map(shape).collect::<Result<Vec<_>>>()?;
        if matches!(self.lhs, Lhs::Float)
            && bias.is_none()
            && let Some(all) = cuda::matmul_quant_all(self.name, x, &weights, self.epilogue)?
        {
            return Ok(all.into_iter().zip(shapes).collect());
        }
        let product = |weight: &Weight<View<CudaStorage>>| {
            let (op, epilogue) = (self.name, self.epilogue);
            match self.lhs {
                Lhs::Float => cuda::matmul_quant(op, x, weight, false, epilogue, bias),
                Lhs::Int8 { scale, zero_point } => {
                    let factors = (scale, zero_point);
                    cuda::matmul_int8(op, x, scales, factors, weight, epilogue, bias)
                }
                Lhs::Fp8 { width } => {
                    cuda::matmul_fp8(op, x, scales, width, weight, epilogue, bias)
                }
                Lhs::Rounded(rounding) => {
                    cuda::matmul_rounded(op, x, rounding, weight, epilogue, bias)
                }
            }
        };
        weights.iter().zip(shapes).map(|(weight, shape)| Ok((product(weight)?, shape))).collect()
    }
}

impl Differentiable for Project {
    fn differentiates(&self, input: usize) -> bool {
        (input == 0 && self.differentiates_x()) || self.bias_at() == Some(input)
    }

    /// The weights alone, for the gradient of x.
    fn reads(&self, input: usize, inputs: &[&Tensor]) -> bool {
        let before = 1 + usize::from(self.scales) + usize::from(self.bias);
        self.differentiates_x() && inputs[0].track_op() && input >= before
    }

    fn reads_result(&self, _: usize) -> bool {
        false
    }

    /// `dx = Σ dC·Wᵀ` over the weights. Where x is rounded to eight bits, the rounding counts as the identity. Never asked of a
    /// product with an activation that has elements: [`activated`](super::activation::activated) has it.
    fn grad(
        &self,
        inputs: &[&Tensor],
        _: &[Tensor],
        grads: &[Option<Tensor>],
    ) -> Result<Vec<Option<Tensor>>> {
        let mut all = vec![None; inputs.len()];
        let Inputs { bias, weights, .. } = self.read(inputs);
        if let Some((at, bias)) = self.bias_at().zip(bias).filter(|(_, bias)| bias.track_op())
            && let [Some(grad)] = grads
        {
            all[at] = Some(bias_gradient(self.name, grad, bias)?);
        }
        let x = inputs[0];
        if !self.differentiates_x() || !x.track_op() {
            return Ok(all);
        }
        let mut pairs = weights.iter().zip(grads).filter_map(|(w, grad)| Some((w, grad.as_ref()?)));
        let terms = pairs.clone().count();
        // One term is rounded by its kernel; several are added in f32.
        let dtype = if terms == 1 { x.dtype() } else { DType::F32 };
        let sum = pairs.try_fold(None, |sum: Option<Tensor>, (weight, grad)| {
            if grad.elem_count() == 0 || x.elem_count() == 0 {
                return Ok(sum);
            }
            let term = self.times_transposed(grad, weight, x.dtype(), dtype)?;
            Ok::<_, candle_core::Error>(Some(match sum {
                Some(sum) => (sum + term)?,
                None => term,
            }))
        })?;
        all[0] = Some(match sum {
            Some(sum) => sum.to_dtype(x.dtype())?,
            None => x.zeros_like()?,
        });
        Ok(all)
    }
}

impl Product for Project {
    fn epilogue(&mut self) -> &mut Epilogue {
        &mut self.epilogue
    }

    fn bias(&self) -> Option<usize> {
        self.bias_at()
    }

    fn multiplied(&self, inputs: &[&Tensor]) -> DType {
        if self.differentiates_x() { inputs[0].dtype() } else { DType::F32 }
    }
}

impl Project {
    /// `grad·Wᵀ`, multiplied in the dtype of x where there are only halves.
    fn times_transposed(
        &self,
        grad: &Tensor,
        weight: &Weight<&Tensor>,
        multiplied: DType,
        dtype: DType,
    ) -> Result<Tensor> {
        let scaled = Scaled::new(grad, multiplied, grad.rank() - 1)?;
        let out = if scaled.restores() { DType::F32 } else { dtype };
        let op = Backward { name: self.name, facts: weight.facts, epilogue: Epilogue::round(out) };
        let inputs = [Some(&scaled.grad), Some(weight.codes), Some(weight.scales), weight.zeros];
        let [product] = eval(&op, &inputs.into_iter().flatten().collect::<Vec<_>>())?;
        scaled.restore(product)
    }
}

/// `silu(x·G) · (x·U)`, of which no input tracks a gradient: two products of floats and their operands.
pub(super) struct Gated(pub Project);

impl Op for Gated {
    fn name(&self) -> &'static str {
        self.0.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let [(gate, shape), (up, _)] = &*self.0.cpu(inputs)? else { unreachable!("two weights") };
        let at = Layout::contiguous(shape);
        Ok(vec![(cpu::glu(Gate::Silu, (gate, &at), (up, &at))?, shape.clone())])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let Inputs { x, weights, .. } = self.0.read(inputs);
        let [gate, up] = &*weights else { unreachable!("two weights") };
        let (_, shape) = rows(self.0.name, x.1, gate.facts.dims[1])?;
        let silu = Epilogue { activation: Some(Activation::Silu), ..self.0.epilogue };
        let both = [*gate, *up];
        if let Some(out) = cuda::matmul_quant_gated(self.0.name, x, &both, silu)? {
            return Ok(vec![(out, shape)]);
        }
        let [(gate, _), (up, _)] = &*self.0.cuda(inputs)? else { unreachable!("two weights") };
        let stack = Stack::new(&Layout::contiguous(&shape));
        let out = cuda::glu(self.0.name, Gate::Silu, [(gate, &stack), (up, &stack)])?;
        Ok(vec![(out, shape)])
    }
}

/// `dC·Wᵀ`. Inputs: dC and the operands of W.
struct Backward {
    name: &'static str,
    facts: Facts,
    epilogue: Epilogue,
}

impl Op for Backward {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let (grad, layout) = inputs[0];
        let weight = self.facts.read(&mut inputs[1..].iter().copied());
        let (lhs, shape) = rows(self.name, layout, self.facts.dims[0])?;
        check::memory(self.name, "a gradient", shape.dims(), DType::F32)?;
        let out = cpu::matmul_quant((grad, &lhs), &weight, true)?;
        Ok(vec![(cpu::narrow_to(self.epilogue.out_dtype, out)?, shape)])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let weight = self.facts.read(&mut inputs[1..].iter().copied());
        let (_, shape) = rows(self.name, inputs[0].1, self.facts.dims[0])?;
        let out = cuda::matmul_quant(self.name, inputs[0], &weight, true, self.epilogue, None)?;
        Ok(vec![(out, shape)])
    }
}

/// A weight `[K, N]` in a float dtype, rows in their order.
pub(crate) fn dequantize(op: &'static str, weight: &QuantWeight, dtype: DType) -> Result<Tensor> {
    super::matmul::check_out_dtype(op, "dtype", dtype, "cast what it gives")?;
    let form = weight.prepared(op)?;
    let Operands { facts, tensors } = form.operands()?;
    let [rows] = eval(&Dequantize { name: op, facts, dtype }, &tensors.iter().collect::<Vec<_>>())?;
    match &form.planes().order {
        Some(order) if rows.elem_count() > 0 => {
            check::made(op, ("weight", &rows), rows.dims())?;
            rows.index_select(&order.inverse, 0)
        }
        _ => Ok(rows),
    }
}

/// Inputs: the operands of a weight.
struct Dequantize {
    name: &'static str,
    facts: Facts,
    dtype: DType,
}

impl Op for Dequantize {
    fn name(&self) -> &'static str {
        self.name
    }

    fn cpu(&self, inputs: &[View<CpuStorage>]) -> Result<Vec<Computed<CpuStorage>>> {
        let dims = self.facts.dims;
        check::memory(self.name, RESULT, &dims, DType::F32)?;
        let weight = self.facts.read(&mut inputs.iter().copied());
        Ok(vec![(cpu::dequantize(&weight, self.dtype)?, Shape::from(&dims[..]))])
    }

    fn cuda(&self, inputs: &[View<CudaStorage>]) -> Result<Vec<Computed<CudaStorage>>> {
        let dims = self.facts.dims;
        check::size(self.name, RESULT, &dims, self.dtype)?;
        let weight = self.facts.read(&mut inputs.iter().copied());
        let out = cuda::dequantize(self.name, &weight, self.dtype)?;
        Ok(vec![(out, Shape::from(&dims[..]))])
    }
}
