//! Products of two tensors of codes, int8 or e4m3.

use candle_core::{DType, Result, Tensor};

use super::{Call, check_bias, int8_depth, int8_planes};
use crate::check::{self, Arg};
use crate::error::Error;
use crate::op::Epilogue;
use crate::op::matmul::check_out_dtype;
use crate::op::project::Lhs;
use crate::quant::planes::{Form, Operands, Planes};
use crate::quant::scheme::BLOCK;
use crate::quant::{Per, QuantScheme, scales_of};
use crate::{Activation, Fp8Options, Int8Options};

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
        check::copies(op, &[("lhs_scales", scales)])?;
        match row_groups(lhs, scales) {
            Some(1) => scales.reshape((each, 1)),
            _ => Err(lhs_scales(op, scales, "[.., M] or [.., M, 1] of `lhs`")),
        }
    });
    let rows = rows.transpose()?;
    check_codes_out_dtype(op, opts.out_dtype)?;
    let weight = match &opts.rhs_scales {
        None => Operands::of_codes(QuantScheme::Int8 { per: Per::Tensor }, rhs)?,
        Some(scales) => {
            let (per, cols) = scales_of(op, b, ("rhs_scales", scales), false)?;
            Form::Plain(int8_planes(rhs, cols, per)?).operands()?
        }
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
    if let Some(scales) = &opts.lhs_scales {
        check::copies(OP, &[("lhs_scales", scales)])?;
    }
    let (width, rows) = match &opts.lhs_scales {
        None => (k, None),
        Some(one) if one.elem_count() == 1 => (k, Some(one.reshape((1, 1))?)),
        Some(scales) => match row_groups(lhs, scales) {
            Some(1) => (k, Some(scales.reshape((each, 1))?)),
            Some(groups) => (BLOCK, Some(scales.reshape((each, groups))?)),
            None => {
                let want = "one element, [.., M], [.., M, 1] or [.., M, K/128 rounded up] of `lhs`";
                return Err(lhs_scales(OP, scales, want));
            }
        },
    };
    let weight = match &opts.rhs_scales {
        None => Operands::of_codes(QuantScheme::Fp8 { per: Per::Tensor }, rhs)?,
        Some(scales) => {
            let (per, scales) = scales_of(OP, b, ("rhs_scales", scales), true)?;
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
    if whole {
        check::made(OP, a, lhs.dims())?;
    }
    let x = if whole { lhs.contiguous()? } else { lhs.clone() };
    let call = Call {
        scales: rows.as_ref(),
        bias: opts.bias.as_ref(),
        weights: &[weight],
        ..Call::new(OP, &x)
    };
    call.finish(Lhs::Fp8 { width: width.max(1) }, opts.out_dtype, opts.activation)
}

impl Call<'_> {
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

fn lhs_scales(op: &'static str, scales: &Tensor, want: &str) -> candle_core::Error {
    check::another_shape(op, ("lhs_scales", scales), want, "reshape it").into()
}

/// The dtype that a product of codes is asked for is one of floats.
fn check_codes_out_dtype(op: &'static str, dtype: Option<DType>) -> Result<()> {
    check_out_dtype(op, "out_dtype", dtype.unwrap_or(DType::F32), "leave it out for f32")
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
