//! Products with weights that are tensors, of codes and of scales, in the layouts of
//! [`quantize_int8`](crate::quant::quantize_int8) and [`quantize_int4`](crate::quant::quantize_int4).

use candle_core::{DType, Result, Tensor};

use super::{Call, check_result, check_x, int8_planes, operands};
use crate::check::{self, Arg, INT4_GROUP};
use crate::cuda;
use crate::op::Epilogue;
use crate::op::project::Lhs;
use crate::quant::planes::{Form, Planes, is_far};
use crate::quant::{Per, QuantScheme};

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
