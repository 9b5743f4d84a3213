//! Products with quantised weights: what the methods take.

mod codes;
mod tensors;
mod weights;

pub(crate) use codes::{matmul_fp8, matmul_int8, matmul_int8_with};
pub(crate) use tensors::{QkvWeights, matmul_int4, qkv_project_of};
pub(crate) use weights::{matmul_quant, qkv_project, swiglu_project};

use candle_core::{DType, Result, Tensor};

use super::Epilogue;
use super::activation::activated;
use super::matmul::RESULT;
use super::project::{Lhs, Project};
use crate::check::{self, Arg};
use crate::error::Error;
use crate::quant::planes::{Form, Operands, Planes};
use crate::quant::{Per, QuantScheme};

/// Operands that fit.
#[derive(Clone, Copy)]
struct Call<'a> {
    op: &'static str,
    x: &'a Tensor,
    scales: Option<&'a Tensor>,
    bias: Option<&'a Tensor>,
    weights: &'a [Operands],
}

impl<'a> Call<'a> {
    fn new(op: &'static str, x: &'a Tensor) -> Self {
        Self { op, x, scales: None, bias: None, weights: &[] }
    }

    /// Whether there are no results.
    fn is_empty(&self) -> bool {
        self.x.dims()[..self.x.rank() - 1].contains(&0)
            || self.weights.iter().all(|weight| weight.facts.dims[1] == 0)
    }

    fn run<const N: usize>(&self, lhs: Lhs, epilogue: Epilogue) -> Result<[Tensor; N]> {
        let (project, inputs) = self.project(lhs, epilogue);
        activated(project, &inputs, self.is_empty())
    }

    /// The op and its inputs.
    fn project(&self, lhs: Lhs, epilogue: Epilogue) -> (Project, Vec<&'a Tensor>) {
        let Self { op, x, scales, bias, weights } = *self;
        let project = Project {
            name: op,
            lhs,
            scales: scales.is_some(),
            bias: bias.is_some(),
            weights: weights.iter().map(|weight| weight.facts).collect(),
            epilogue,
        };
        let own = [Some(x), scales, bias].into_iter().flatten();
        let inputs = own.chain(weights.iter().flat_map(|weight| &weight.tensors)).collect();
        (project, inputs)
    }
}

/// The largest K whose sum of int8 products cannot leave i32: `K · 128 · 128 < 2³¹`, and, where codes of activations stand
/// for their distance from a zero point, `K · 255 · 128 < 2³¹`.
fn int8_max_k(zero_point: i32) -> usize {
    let farthest = if zero_point == 0 { 128 } else { 255 };
    (i32::MAX / (farthest * 128)) as usize
}

fn int8_depth(op: &'static str, (arg, k): (&'static str, usize), zero_point: i32) -> Result<()> {
    let most = int8_max_k(zero_point);
    if k <= most {
        return Ok(());
    }
    Err(Error::Dimension {
        op,
        arg,
        dim: "K",
        got: k,
        want: format!("at most {most}, so that the i32 sum cannot overflow"),
        fix: "split K and add the products".into(),
    }
    .into())
}

fn operands<'a>(forms: impl IntoIterator<Item = &'a Form>) -> Result<Vec<Operands>> {
    forms.into_iter().map(Form::operands).collect()
}

/// A result of `n` columns can exist.
fn check_result(op: &'static str, x: &Tensor, n: usize) -> Result<()> {
    let mut dims = x.dims().to_vec();
    dims[x.rank() - 1] = n;
    Ok(check::size(op, RESULT, &dims, DType::F32)?)
}

/// A weight of int8 bytes, as it is.
fn int8_planes(codes: &Tensor, scales: Tensor, per: Per) -> Result<Planes> {
    let (scheme, dims) = (QuantScheme::Int8 { per }, codes.dims2()?.into());
    let (codes, zeros, order, far) = (codes.clone(), None, None, false);
    Ok(Planes { scheme, dims, codes, scales, zeros, order, far })
}

fn check_bias(op: &'static str, bias: &Tensor, dtypes: &[DType], n: usize) -> Result<()> {
    check::dtype(op, ("bias", bias), dtypes)?;
    check::rank(op, ("bias", bias), 1..=1, "[N]", "flatten it with `.flatten_all()?`")?;
    let fix = "give it one element for each column";
    Ok(check::dim(op, "bias", ("N", bias.dims()[0]), (n, "the N of the weight"), fix)?)
}

/// Checks activations beside tensors of weights and gives K.
fn check_x(op: &'static str, x: &Tensor, dtypes: &[DType], weights: &[Arg]) -> Result<usize> {
    let mut args = vec![("x", x)];
    args.extend(weights);
    check::tensors(op, &args)?;
    check::dtype(op, ("x", x), dtypes)?;
    Ok(check::activations(op, ("x", x))?)
}
