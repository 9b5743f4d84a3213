//! Symmetric int8: one step for a whole tensor.

use candle_core::{DType, Result, Tensor};

use crate::{check, error::Error, op::cast};

/// Rounds a tensor to int8: `q = round(t / scale)`, `scale = max|t| / 127`.
///
/// | argument | shape | dtype |
/// |---|---|---|
/// | `t` | any | f32, f16 or bf16 |
/// | result | the same, and the step | u8 holding int8 bytes, −127 to 127; f32 |
///
/// [`dequantize_int8`] gives back every element to within half a step. A tensor of zeros has step 1.
///
/// # Errors
///
/// Another dtype, a tracked input, an infinite or NaN element.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use kaio_candle::quant;
///
/// let t = Tensor::new(&[1f32, -0.5, 0.25], &Device::Cpu)?;
/// let (q, scale) = quant::quantize_int8(&t)?;
/// assert_eq!(q.to_vec1::<u8>()?, [127, 192, 32]); // 192 is −64
/// let error = (quant::dequantize_int8(&q, scale)? - t)?.abs()?.max(0)?.to_scalar::<f32>()?;
/// assert!(error <= scale / 2.);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn quantize_int8(t: &Tensor) -> Result<(Tensor, f32)> {
    const OP: &str = "quantize_int8";
    check::dtype(OP, ("t", t), &[DType::F32, DType::F16, DType::BF16])?;
    super::sizes(OP, ("t", t), t.dims())?;
    check::untracked(OP, &[("t", t)])?;
    if t.elem_count() == 0 {
        return Ok((cast(t, DType::U8)?, 1.0));
    }
    let t = t.to_dtype(DType::F32)?;
    // A sum of |t|·0 is 0, or NaN if any element is infinite or NaN, which a maximum may pass over.
    let magnitude = t.abs()?.flatten_all()?;
    let poison = (&magnitude * 0.0)?.sum_all()?.to_scalar::<f32>()?;
    if poison != 0.0 {
        return Err(Error::Value {
            op: OP,
            name: "t",
            got: "a tensor with an infinite or NaN element".into(),
            want: "finite elements".into(),
            fix: "check how it was computed",
        }
        .into());
    }
    let peak = magnitude.max(0)?.to_scalar::<f32>()?;
    let scale = if peak > 0.0 { (peak / 127.0).max(f32::MIN_POSITIVE) } else { 1.0 };
    let rounded = t.affine(1.0 / f64::from(scale), 0.0)?.round()?.clamp(-127f32, 127f32)?;
    Ok((super::wrap(&rounded, 256.0)?.to_dtype(DType::U8)?, scale))
}

/// `scale · q`, f32, of a u8 tensor that holds int8 bytes.
///
/// # Errors
///
/// Another dtype.
pub fn dequantize_int8(q: &Tensor, scale: f32) -> Result<Tensor> {
    const OP: &str = "dequantize_int8";
    check::dtype(OP, ("q", q), &[DType::U8])?;
    super::sizes(OP, ("q", q), q.dims())?;
    if q.elem_count() == 0 {
        return cast(q, DType::F32);
    }
    let bytes = q.to_dtype(DType::F32)?;
    let negative = bytes.ge(128f32)?.to_dtype(DType::F32)?;
    (bytes - (negative * 256.0)?)?.affine(f64::from(scale), 0.0)
}
