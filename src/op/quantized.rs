//! Products with quantised weights: what the methods take.

use candle_core::{DType, Result, Tensor};

use super::activation::activated;
use super::casts::check_compute_dtype;
use super::matmul::{CASTABLE, RESULT, check_out_dtype};
use super::project::{Gated, Lhs, Project, Rounding};
use super::{Epilogue, cast, eval, glu};
use crate::check::{self, Arg, INT4_GROUP};
use crate::error::Error;
use crate::options::Gate;
use crate::quant::planes::{Form, Operands, Planes, is_far};
use crate::quant::scheme::BLOCK;
use crate::quant::{Per, QuantScheme, QuantWeight, scales_of};
use crate::{Activation, Activations, Engine, Fp8Options, Int8Options, MatmulOptions, cuda};

/// The largest K whose sum of int8 products cannot leave i32: `K · 128 · 128 < 2³¹`, and, where codes of activations stand
/// for their distance from a zero point, `K · 255 · 128 < 2³¹`.
fn int8_max_k(zero_point: i32) -> usize {
    let farthest = if zero_point == 0 { 128 } else { 255 };
    (i32::MAX / (farthest * 128)) as usize
}

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
    // candle differentiates the cast.
    let x = &match check_compute_dtype(op, opts.compute_dtype)? {
        Some(dtype) if x.dtype() != dtype => {
            check::dtype(op, ("x", x), &CASTABLE)?;
            cast(x, dtype)?
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
    let x = gather(x, form)?;
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
        let x = gather(x, form)?;
        let weights = [form.operands()?];
        let [out] = Call { weights: &weights, ..Call::new(op, &x) }.run(Lhs::Float, epilogue)?;
        Ok(out)
    };
    let all = forms.iter().map(|form| one(form)).collect::<Result<Vec<_>>>()?;
    all.try_into().map_err(|_| candle_core::Error::msg("a result for each weight"))
}

fn operands<'a>(forms: impl IntoIterator<Item = &'a Form>) -> Result<Vec<Operands>> {
    forms.into_iter().map(Form::operands).collect()
}

/// The weights of three projections in the layouts of their own.
pub(crate) enum QkvWeights<'a> {
    Int8 { weights: [&'a Tensor; 3], scales: [f32; 3] },
    Int4 { packed: [&'a Tensor; 3], scales: [&'a Tensor; 3] },
}

const SCALES: [&str; 3] = ["scales[0]", "scales[1]", "scales[2]"];
const WEIGHTS: [&str; 3] = ["weights[0]", "weights[1]", "weights[2]"];

/// Three f16 `[.., M, N]`.
pub(crate) fn qkv_project_of(x: &Tensor, weights: QkvWeights) -> Result<(Tensor, Tensor, Tensor)> {
    let (op, forms) = match weights {
        QkvWeights::Int8 { weights, scales } => {
            let op = "kaio_qkv_project_int8";
            let args: Vec<_> = WEIGHTS.into_iter().zip(weights).collect();
            let k = check_x(op, x, &[DType::F16], &args)?;
            for (i, &arg) in args.iter().enumerate() {
                check::dtype(op, arg, &[DType::U8])?;
                check::int8_weight(op, ("x", x, k), arg)?;
                check_result(op, x, arg.1.dims()[1])?;
                check::finite(op, SCALES[i], scales[i])?;
                check::untracked(op, &[arg])?;
            }
            let form = |(weight, scale): (&Tensor, f32)| {
                let scales = Tensor::full(scale, (1, 1), x.device())?;
                let planes = int8_planes(weight, scales, Per::Tensor)?;
                let far = is_far(planes.scheme, scale.abs());
                Result::Ok(Form::Plain(Planes { far, ..planes }))
            };
            (op, weights.into_iter().zip(scales).map(form).collect::<Result<Vec<_>>>()?)
        }
        QkvWeights::Int4 { packed, scales } => {
            let op = "kaio_qkv_project_int4";
            let packed = WEIGHTS.into_iter().zip(packed);
            let pairs: Vec<_> = packed.zip(SCALES.into_iter().zip(scales)).collect();
            let (packed, scales): (Vec<_>, Vec<_>) = pairs.iter().copied().unzip();
            let k = check_x(op, x, &[DType::F16], &[packed, scales].concat())?;
            for &(packed, scales) in &pairs {
                check_int4(op, ("x", x, k), packed, scales)?;
            }
            let form = |((_, packed), (_, scales))| int4_form(op, k, packed, scales);
            (op, pairs.into_iter().map(form).collect::<Result<Vec<_>>>()?)
        }
    };
    let weights = operands(&forms)?;
    let call = Call { weights: &weights, ..Call::new(op, x) };
    let [q, k, v] = call.run(Lhs::Float, Epilogue::round(DType::F16))?;
    Ok((q, k, v))
}

/// f32 `[.., M, N]` = `a · dequantised weight`, of the layout of [`quantize_int4`](crate::quant::quantize_int4).
pub(crate) fn matmul_int4(lhs: &Tensor, packed: &Tensor, scales: &Tensor) -> Result<Tensor> {
    const OP: &str = "kaio_matmul_int4";
    let (a, b, s) = (("lhs", lhs), ("packed", packed), ("scales", scales));
    check::tensors(OP, &[a, b, s])?;
    check::dtype(OP, a, &[DType::F16])?;
    let k = check::activations(OP, a)?;
    check_int4(OP, ("lhs", lhs, k), b, s)?;
    let weights = [int4_form(OP, k, packed, scales)?.operands()?];
    let call = Call { weights: &weights, ..Call::new(OP, lhs) };
    let [out] = call.run(Lhs::Float, Epilogue::round(DType::F32))?;
    Ok(out)
}

/// A weight in the layout of `quantize_int4`, and its product with activations of width `k`.
fn check_int4(
    op: &'static str,
    (name, x, k): (&'static str, &Tensor, usize),
    packed: Arg,
    scales: Arg,
) -> Result<()> {
    check::int4_words(op, packed)?;
    check::dtype(op, scales, &[DType::F16])?;
    check::int4_weight(op, (name, k), packed, scales)?;
    check_result(op, x, packed.1.dims()[1])?;
    Ok(check::untracked(op, &[packed, scales])?)
}

/// A result of `n` columns can exist.
fn check_result(op: &'static str, x: &Tensor, n: usize) -> Result<()> {
    let mut dims = x.dims().to_vec();
    dims[x.rank() - 1] = n;
    Ok(check::size(op, RESULT, &dims, DType::F32)?)
}

/// The same as products read it: on a GPU packed for this call alone.
fn int4_form(op: &'static str, k: usize, packed: &Tensor, scales: &Tensor) -> Result<Form> {
    let planes = Planes {
        scheme: QuantScheme::Int4 { group: INT4_GROUP as i32, zero_points: false },
        dims: [k, packed.dims()[1]],
        codes: packed.clone(),
        scales: scales.clone(),
        zeros: None,
        order: None,
        // Nobody has looked.
        far: true,
    };
    match packed.device().is_cuda() && packed.elem_count() > 0 {
        true => cuda::pack_signed(op, &planes),
        false => Ok(Form::Signed(planes)),
    }
}

/// A weight of int8 bytes, as it is.
fn int8_planes(codes: &Tensor, scales: Tensor, per: Per) -> Result<Planes> {
    let (scheme, dims) = (QuantScheme::Int8 { per }, codes.dims2()?.into());
    let (codes, zeros, order, far) = (codes.clone(), None, None, false);
    Ok(Planes { scheme, dims, codes, scales, zeros, order, far })
}

/// f32 `[.., M, N]` = `scale · Σ a·b`.
pub(crate) fn matmul_int8(lhs: &Tensor, rhs: &Tensor, scale: f32) -> Result<Tensor> {
    int8_product("kaio_matmul_int8", lhs, rhs, &Int8Options::default().scale(scale))
}

/// `act(scale · rows · columns · Σ (a − zero_point)·b + bias)`.
pub(crate) fn matmul_int8_with(lhs: &Tensor, rhs: &Tensor, opts: &Int8Options) -> Result<Tensor> {
    int8_product("kaio_matmul_int8_with", lhs, rhs, opts)
}

fn int8_product(
    op: &'static str,
    lhs: &Tensor,
    rhs: &Tensor,
    opts: &Int8Options,
) -> Result<Tensor> {
    let Int8Options { scale, zero_point, .. } = *opts;
    let scales = [("lhs_scales", &opts.lhs_scales), ("rhs_scales", &opts.rhs_scales)];
    let (a, b) = (("lhs", lhs), ("rhs", rhs));
    check_operands(op, [a, b], DType::U8, scales, opts.bias.as_ref())?;
    let k = check::activations(op, a)?;
    check::int8_weight(op, ("lhs", lhs, k), b)?;
    check::finite(op, "scale", scale)?;
    if !(-128..=127).contains(&zero_point) {
        let (got, want) = (zero_point.to_string(), "-128 to 127".into());
        let fix = "it is one of the values that the activations can have";
        return Err(Error::Value { op, name: "zero_point", got, want, fix }.into());
    }
    int8_depth(op, ("lhs", k), zero_point)?;
    let rows = opts.lhs_scales.as_ref().map(|scales| {
        let each = scales.elem_count();
        match row_groups(lhs, scales) {
            Some(1) => scales.reshape((each, 1)),
            _ => Err(scales_shape(op, "lhs_scales", scales, "[.., M] or [.., M, 1] of `lhs`")),
        }
    });
    let rows = rows.transpose()?;
    check_codes_out_dtype(op, opts.out_dtype)?;
    let weight = match &opts.rhs_scales {
        None => Operands::of_codes(QuantScheme::Int8 { per: Per::Tensor }, rhs)?,
        Some(scales) => match scales_of(op, b, scales)? {
            (Per::Block, _) => {
                return Err(scales_shape(op, "rhs_scales", scales, "[N] or [1, N] of `rhs`"));
            }
            (per, cols) => Form::Plain(int8_planes(rhs, cols, per)?).operands()?,
        },
    };
    let call = Call {
        scales: rows.as_ref(),
        bias: opts.bias.as_ref(),
        weights: &[weight],
        ..Call::new(op, lhs)
    };
    call.finish(Lhs::Int8 { scale, zero_point }, opts.out_dtype, opts.activation)
}

/// `act(Σ (a · scale of a) · (b · scale of b) + bias)` of e4m3.
pub(crate) fn matmul_fp8(lhs: &Tensor, rhs: &Tensor, opts: &Fp8Options) -> Result<Tensor> {
    const OP: &str = "kaio_matmul_fp8";
    let scales = [("lhs_scales", &opts.lhs_scales), ("rhs_scales", &opts.rhs_scales)];
    let (a, b) = (("lhs", lhs), ("rhs", rhs));
    check_operands(OP, [a, b], DType::F8E4M3, scales, opts.bias.as_ref())?;
    let k = check::activations(OP, a)?;
    check::int8_weight(OP, ("lhs", lhs, k), b)?;
    check_codes_out_dtype(OP, opts.out_dtype)?;
    let each = lhs.dims()[..lhs.rank() - 1].iter().product::<usize>();
    let (width, rows) = match &opts.lhs_scales {
        None => (k, None),
        Some(one) if one.elem_count() == 1 => (k, Some(one.reshape((1, 1))?)),
        Some(scales) => match row_groups(lhs, scales) {
            Some(1) => (k, Some(scales.reshape((each, 1))?)),
            Some(groups) => (BLOCK, Some(scales.reshape((each, groups))?)),
            None => {
                let want = "one element, [.., M], [.., M, 1] or [.., M, K/128 rounded up] of `lhs`";
                return Err(scales_shape(OP, "lhs_scales", scales, want));
            }
        },
    };
    let weight = match &opts.rhs_scales {
        None => Operands::of_codes(QuantScheme::Fp8 { per: Per::Tensor }, rhs)?,
        Some(scales) => {
            let (per, scales) = scales_of(OP, b, scales)?;
            let (scheme, dims, codes) =
                (QuantScheme::Fp8 { per }, rhs.dims2()?.into(), rhs.clone());
            let planes =
                Planes { scheme, dims, codes, scales, zeros: None, order: None, far: false };
            planes.check(OP)?;
            Form::Plain(planes).operands()?
        }
    };
    // Scales of rows are those of one matrix, which a GPU makes itself.
    let whole = lhs.elem_count() > 0 && lhs.device().is_cpu();
    let x = if whole { lhs.contiguous()? } else { lhs.clone() };
    let call = Call {
        scales: rows.as_ref(),
        bias: opts.bias.as_ref(),
        weights: &[weight],
        ..Call::new(OP, &x)
    };
    call.finish(Lhs::Fp8 { width: width.max(1) }, opts.out_dtype, opts.activation)
}

/// How many scales each row of `x` has, if they are `[.., M]`, `[.., M, 1]` or `[.., M, ⌈K/128⌉]`.
fn row_groups(x: &Tensor, scales: &Tensor) -> Option<usize> {
    let (rows, k) = (&x.dims()[..x.rank() - 1], x.dims()[x.rank() - 1]);
    match scales.dims() {
        dims if dims == rows => Some(1),
        [dims @ .., 1] if dims == rows => Some(1),
        [dims @ .., groups] if dims == rows && *groups == k.div_ceil(BLOCK) => Some(*groups),
        _ => None,
    }
}

/// The dtype that a product of codes is asked for is one of floats.
fn check_codes_out_dtype(op: &'static str, dtype: Option<DType>) -> Result<()> {
    check_out_dtype(op, "out_dtype", dtype.unwrap_or(DType::F32), "leave it out for f32")
}

fn scales_shape(
    op: &'static str,
    name: &'static str,
    scales: &Tensor,
    want: &'static str,
) -> candle_core::Error {
    let got = format!("of shape {:?}", scales.dims());
    Error::Value { op, name, got, want: want.into(), fix: "reshape it" }.into()
}

/// Codes of one dtype, floats as scales, and perhaps a bias.
fn check_operands(
    op: &'static str,
    operands: [Arg; 2],
    dtype: DType,
    scales: [(&'static str, &Option<Tensor>); 2],
    bias: Option<&Tensor>,
) -> Result<()> {
    let given = scales.into_iter().filter_map(|(name, t)| Some((name, t.as_ref()?)));
    let mut args: Vec<_> = operands.into_iter().chain(given).collect();
    check::untracked(op, &args)?;
    args.extend(bias.map(|bias| ("bias", bias)));
    check::tensors(op, &args)?;
    for arg in operands {
        check::dtype(op, arg, &[dtype])?;
    }
    let [(rows, of_rows), (cols, of_cols)] = scales;
    if let Some(scales) = of_rows {
        check::dtype(op, (rows, scales), &[DType::F32])?;
    }
    if let Some(scales) = of_cols {
        check::dtype(op, (cols, scales), &[DType::F32, DType::F16, DType::BF16])?;
    }
    let Some(bias) = bias else { return Ok(()) };
    check::rank(op, operands[1], 2..=2, "[K, N]", "a weight is one matrix")?;
    check_bias(op, bias, &[DType::F32], operands[1].1.dims()[1])
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

/// kaio-ops has no such weights.
fn engine(op: &'static str, x: &Tensor, engine: Engine) -> Result<()> {
    if engine != Engine::KaioOps || x.device().is_cpu() {
        return Ok(());
    }
    let (what, limit) = ("Engine::KaioOps".into(), "cannot take a `QuantWeight`".into());
    Err(Error::Unsupported { op, what, limit, fix: "leave it to `Engine::Auto`".into() }.into())
}

/// The columns of x in the order of the rows of a weight's codes. candle differentiates it.
fn gather(x: &Tensor, form: &Form) -> Result<Tensor> {
    match &form.planes().order {
        Some(order) if x.elem_count() > 0 => {
            x.contiguous()?.index_select(&order.rows, x.rank() - 1)
        }
        _ => Ok(x.clone()),
    }
}

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

    /// A product of codes, of whose inputs the bias alone has a gradient.
    fn finish(
        &self,
        lhs: Lhs,
        out_dtype: Option<DType>,
        activation: Option<Activation>,
    ) -> Result<Tensor> {
        let out_dtype = out_dtype.unwrap_or(DType::F32);
        let [out] = self.run(lhs, Epilogue { out_dtype, activation })?;
        Ok(out)
    }
}
