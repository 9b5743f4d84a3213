//! Products with weights of a type of their own, [`QuantWeight`].

use candle_core::{DType, Result, Tensor};

use super::{Call, check_bias, check_result, check_x, int8_depth, operands};
use crate::check::{self, Arg};
use crate::error::Error;
use crate::op::casts::{self, check_castable, check_compute_dtype};
use crate::op::matmul::check_out_dtype;
use crate::op::project::{Gated, Lhs, Rounding};
use crate::op::{Epilogue, eval, glu};
use crate::options::Gate;
use crate::quant::planes::Form;
use crate::quant::scheme::BLOCK;
use crate::quant::{Per, QuantScheme, QuantWeight};
use crate::{Activations, Engine, MatmulOptions};

const HALVES: [DType; 2] = [DType::F16, DType::BF16];

/// `act(x·W + bias)`.
pub(crate) fn matmul_quant(
    op: &'static str,
    x: &Tensor,
    weight: &QuantWeight,
    opts: &MatmulOptions,
) -> Result<Tensor> {
    let bias = opts.bias.as_ref();
    let out_dtype = opts.out_dtype.unwrap_or(x.dtype());
    let x = &match check_compute_dtype(op, opts.compute_dtype)? {
        Some(dtype) if x.dtype() != dtype => {
            check::tensor(op, ("x", x))?;
            check_castable(op, ("x", x), dtype)?;
            casts::inside(op, x, dtype)?
        }
        _ => x.clone(),
    };
    check_weights(op, x, &[("weight", weight)], bias)?;
    engine(op, x, opts.engine)?;
    check_out_dtype(op, "out_dtype", out_dtype, "leave it out for the dtype of `x`")?;
    let lhs = match (opts.activations, weight.scheme()) {
        (Activations::Float, _) => Lhs::Float,
        (Activations::Int8, QuantScheme::Int8 { .. }) => {
            let k = weight.dims2().0;
            int8_depth(op, ("x", k), 0)?;
            Lhs::Rounded(Rounding { dtype: DType::U8, width: k.max(1) })
        }
        (Activations::Fp8, QuantScheme::Fp8 { per }) => {
            let width = width(per, weight.dims2().0);
            Lhs::Rounded(Rounding { dtype: DType::F8E4M3, width })
        }
        (activations, scheme) => {
            return Err(Error::Value {
                op,
                name: "activations",
                got: format!("Activations::{activations:?} with a weight in {scheme:?}"),
                want: "those of the weight's scheme, Int8 or Fp8, or Activations::Float".into(),
                fix: "quantise the weight to the same",
            }
            .into());
        }
    };
    let form = weight.prepared(op)?;
    let x = gather(op, x, form)?;
    let weights = [form.operands()?];
    let call = Call { bias, weights: &weights, ..Call::new(op, &x) };
    let [out] = call.run(lhs, Epilogue { out_dtype, activation: opts.activation })?;
    Ok(out)
}

/// Elements of a row of activations that share a scale.
fn width(per: Per, k: usize) -> usize {
    match per {
        Per::Block => BLOCK,
        Per::Tensor | Per::Channel => k.max(1),
    }
}

/// Three projections of x, in its dtype, each of its own width.
pub(crate) fn qkv_project(x: &Tensor, weights: [&QuantWeight; 3]) -> Result<[Tensor; 3]> {
    projections("kaio_qkv_project", x, weights, ["weights[0]", "weights[1]", "weights[2]"])
}

/// `silu(x·G) · (x·U)`.
pub(crate) fn swiglu_project(x: &Tensor, gate: &QuantWeight, up: &QuantWeight) -> Result<Tensor> {
    const OP: &str = "kaio_swiglu_project";
    let why = format_args!("the N of `gate` {:?}", gate.dims2());
    let fix = "gate and up have the same width";
    check::dim(OP, "up", ("N", up.dims2().1), (gate.dims2().1, why), fix)?;
    let (weights, names) = ([gate, up], ["gate", "up"]);
    let forms = check_projections(OP, x, weights, names)?;
    // Gradients are those of three ops, and a permutation is of one product.
    if x.track_op() || forms.iter().any(|form| form.planes().order.is_some()) {
        let [gate, up] = projections(OP, x, weights, names)?;
        return glu(OP, Gate::Silu, &gate, &up);
    }
    let weights = operands(forms)?;
    let call = Call { weights: &weights, ..Call::new(OP, x) };
    let (project, inputs) = call.project(Lhs::Float, Epilogue::round(x.dtype()));
    let [out] = eval(&Gated(project), &inputs)?;
    Ok(out)
}

/// The weights as products read them.
fn check_projections<'a, const N: usize>(
    op: &'static str,
    x: &Tensor,
    weights: [&'a QuantWeight; N],
    names: [&'static str; N],
) -> Result<Vec<&'a Form>> {
    check_weights(op, x, &names.into_iter().zip(weights).collect::<Vec<_>>(), None)?;
    weights.into_iter().map(|w| w.prepared(op)).collect()
}

fn projections<const N: usize>(
    op: &'static str,
    x: &Tensor,
    weights: [&QuantWeight; N],
    names: [&'static str; N],
) -> Result<[Tensor; N]> {
    let forms = check_projections(op, x, weights, names)?;
    let epilogue = Epilogue::round(x.dtype());
    if forms.iter().all(|form| form.planes().order.is_none()) {
        let weights = operands(forms)?;
        return Call { weights: &weights, ..Call::new(op, x) }.run(Lhs::Float, epilogue);
    }
    // Each has its own order of the columns of x.
    let one = |form: &Form| -> Result<Tensor> {
        let x = gather(op, x, form)?;
        let weights = [form.operands()?];
        let [out] = Call { weights: &weights, ..Call::new(op, &x) }.run(Lhs::Float, epilogue)?;
        Ok(out)
    };
    let all = forms.iter().map(|form| one(form)).collect::<Result<Vec<_>>>()?;
    all.try_into().map_err(|_| candle_core::Error::msg("a result for each weight"))
}

/// Checks activations beside weights that they fit.
fn check_weights(
    op: &'static str,
    x: &Tensor,
    weights: &[(&'static str, &QuantWeight)],
    bias: Option<&Tensor>,
) -> Result<()> {
    let device = ("x", x.device());
    weights.iter().try_for_each(|(name, w)| check::same_device(op, (*name, w.device()), device))?;
    let bias_arg: Vec<Arg> = bias.into_iter().map(|bias| ("bias", bias)).collect();
    let k = check_x(op, x, &HALVES, &bias_arg)?;
    for (name, weight) in weights {
        let why = format_args!("the K of `x` {:?}", x.dims());
        let fix = "a weight is [K, N]; quantise it transposed";
        let (depth, n) = weight.dims2();
        check::dim(op, name, ("K", depth), (k, why), fix)?;
        check_result(op, x, n)?;
    }
    match bias {
        Some(bias) => check_bias(op, bias, &[DType::F32, x.dtype()], weights[0].1.dims2().1),
        None => Ok(()),
    }
}

/// kaio-ops has no such weights.
fn engine(op: &'static str, x: &Tensor, engine: Engine) -> Result<()> {
    if engine != Engine::KaioOps || x.device().is_cpu() {
        return Ok(());
    }
    let (what, limit) = ("Engine::KaioOps".into(), "cannot take a `QuantWeight`".into());
    Err(Error::Unsupported { op, what, limit, fix: "leave it to `Engine::Auto`".into() }.into())
}

/// The columns of x in the order of the rows of a weight's codes. candle differentiates it.
fn gather(op: &'static str, x: &Tensor, form: &Form) -> Result<Tensor> {
    match &form.planes().order {
        Some(order) if x.elem_count() > 0 => {
            check::made(op, ("x", x), x.dims())?;
            x.contiguous()?.index_select(&order.rows, x.rank() - 1)
        }
        _ => Ok(x.clone()),
    }
}
