//! int4 in groups: eight values a `u32`, one f16 step for 128 rows and a column.

use candle_core::{D, DType, Device, Result, Tensor};

use crate::check::{self, INT4_GROUP};
use crate::error::Error;

/// Values of one word.
const NIBBLES: usize = 8;

/// The smallest step. f16 rounds a step from here on to within 3 %, which keeps every rounded element
/// of its group inside −8..7 and so within half a step.
const MIN_STEP: f32 = 1.0 / (1 << 20) as f32;

/// Rounds a weight to int4 and packs it.
///
/// `scale = max|w| / 7` of each group of 128 rows in a column, at least 2⁻²⁰, rounded to f16;
/// `q = round(w / scale)`.
///
/// | argument | shape | dtype |
/// |---|---|---|
/// | `weight` | `[K, N]`, K a multiple of 128 | f32, f16 or bf16 |
/// | packed | `[K/8, N]`, lowest nibble = lowest k | u32 |
/// | scales | `[K/128, N]` | f16 |
///
/// [`dequantize_int4`] gives back every element to within half its group's step. The packed tensor is
/// column-major, as `kaio-ops` reads it.
///
/// # Errors
///
/// Another dtype or rank, K not a multiple of 128, a tracked input, a step that f16 cannot hold
/// (`max|w|` over 458528, infinite or NaN).
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use kaio_candle::quant;
///
/// let w = Tensor::randn(0f32, 1., (256, 16), &Device::Cpu)?;
/// let (packed, scales) = quant::quantize_int4(&w)?;
/// assert_eq!((packed.dims(), scales.dims()), ([32, 16].as_slice(), [2, 16].as_slice()));
/// let error = (quant::dequantize_int4(&packed, &scales)? - w)?.abs()?;
/// assert!(error.max_all()?.to_scalar::<f32>()? < 0.5);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn quantize_int4(weight: &Tensor) -> Result<(Tensor, Tensor)> {
    const OP: &str = "quantize_int4";
    let arg = ("weight", weight);
    check::dtype(OP, arg, &[DType::F32, DType::F16, DType::BF16])?;
    check::rank(OP, arg, 2..=2, "[K, N]", "quantise one matrix at a time")?;
    let (k, n) = weight.dims2()?;
    let why = "the rows that share a scale";
    multiple(OP, "weight", ("K", k), (INT4_GROUP, why), "pad K with zeros")?;
    check::untracked(OP, &[arg])?;
    super::sizes(OP, arg, weight.dims())?;
    if weight.elem_count() == 0 {
        let packed = Tensor::zeros((k / NIBBLES, n), DType::U32, weight.device())?;
        return Ok((packed, Tensor::zeros((k / INT4_GROUP, n), DType::F16, weight.device())?));
    }
    let groups = weight.to_dtype(DType::F32)?.reshape((k / INT4_GROUP, INT4_GROUP, n))?;
    let peak = groups.abs()?.max_keepdim(1)?;
    let scales = (peak / 7.0)?.maximum(MIN_STEP)?.to_dtype(DType::F16)?;
    let steps = scales.to_dtype(DType::F32)?;
    // A sum of w·0 and step·0 is 0, or NaN if any of them is infinite or NaN.
    let poison = ((&groups * 0.0)?.sum_all()? + (&steps * 0.0)?.sum_all()?)?;
    if poison.to_scalar::<f32>()? != 0.0 {
        return Err(Error::Value {
            op: OP,
            name: "weight",
            got: "a tensor with an element that is NaN or over 458528 in magnitude".into(),
            want: "at most 458528, a seventh of which f16 can hold as the scale".into(),
            fix: "check how it was computed, or scale it down and the products up",
        }
        .into());
    }
    let rounded = groups.broadcast_div(&steps)?.round()?.clamp(-8f32, 7f32)?.reshape((k, n))?;
    Ok((pack_int4(&super::wrap(&rounded, 16.0)?.to_dtype(DType::U8)?)?, scales.squeeze(1)?))
}

/// Packs int4 values along the first dimension: `[K, N]` u8 (the low nibble counts) to `[K/8, N]` u32.
///
/// # Errors
///
/// Another dtype or rank, K not a multiple of 8.
pub fn pack_int4(values: &Tensor) -> Result<Tensor> {
    const OP: &str = "pack_int4";
    if values.dtype() != DType::U8 {
        return Err(Error::DType {
            op: OP,
            arg: "values",
            got: values.dtype(),
            want: "u8".into(),
            fix: "cast integers with `.to_dtype(DType::U8)?`; `quant::quantize_int4` takes floats"
                .into(),
        }
        .into());
    }
    check::rank(OP, ("values", values), 2..=2, "[K, N]", "pack one matrix at a time")?;
    let (k, n) = values.dims2()?;
    multiple(OP, "values", ("K", k), (NIBBLES, "the values in a u32"), "pad K with zeros")?;
    super::sizes(OP, ("values", values), values.dims())?;
    if values.elem_count() == 0 {
        return Tensor::zeros((k / NIBBLES, n), DType::U32, values.device());
    }
    // Column-major words: [N, K/8, 8] with the nibbles of a word side by side.
    let values = values.to_dtype(DType::U32)?.t()?.contiguous()?;
    let nibbles = low_nibble(&values.reshape((n, k / NIBBLES, NIBBLES))?)?;
    nibbles.broadcast_mul(&places(values.device())?)?.sum(D::Minus1)?.t()
}

/// The values of packed words, `[K/8, N]` u32 to `[K, N]` f32 from −8 to 7.
///
/// # Errors
///
/// Another dtype or rank.
pub fn unpack_int4(packed: &Tensor) -> Result<Tensor> {
    const OP: &str = "unpack_int4";
    check::int4_words(OP, ("packed", packed))?;
    check::rank(OP, ("packed", packed), 2..=2, "[K/8, N]", "unpack one matrix at a time")?;
    super::sizes(OP, ("packed", packed), &unpacked(packed))?;
    values(packed, DType::F32)
}

/// The shape of a packed matrix's values. Words of a matrix so high that this saturates are refused.
fn unpacked(packed: &Tensor) -> [usize; 2] {
    let dims = packed.dims();
    [dims[0].saturating_mul(NIBBLES), dims[1]]
}

/// The values of packed words in a float dtype.
fn values(packed: &Tensor, dtype: DType) -> Result<Tensor> {
    let (words, n) = packed.dims2()?;
    if packed.elem_count() == 0 {
        return Tensor::zeros((words * NIBBLES, n), dtype, packed.device());
    }
    let places = places(packed.device())?.reshape((1, NIBBLES, 1))?;
    let nibbles = low_nibble(&packed.contiguous()?.unsqueeze(1)?.broadcast_div(&places)?)?;
    let signed = [0f32, 1., 2., 3., 4., 5., 6., 7., -8., -7., -6., -5., -4., -3., -2., -1.];
    let signed = Tensor::new(&signed, packed.device())?.to_dtype(dtype)?;
    signed.index_select(&nibbles.flatten_all()?, 0)?.reshape((words * NIBBLES, n))
}

/// The f32 weight `[K, N]` of packed words `[K/8, N]` and f16 scales `[K/128, N]`.
///
/// # Errors
///
/// Other dtypes or ranks, rows or columns that do not belong together.
pub fn dequantize_int4(packed: &Tensor, scales: &Tensor) -> Result<Tensor> {
    const OP: &str = "dequantize_int4";
    let args = [("packed", packed), ("scales", scales)];
    check::tensors(OP, &args)?;
    check::int4_words(OP, args[0])?;
    check::dtype(OP, args[1], &[DType::F16])?;
    check::rank(OP, args[0], 2..=2, "[K/8, N]", "unpack one matrix at a time")?;
    let k = unpacked(packed)[0];
    let of = (INT4_GROUP / NIBBLES, "the words of 128 values that share a scale");
    multiple(OP, "packed", ("rows", packed.dims()[0]), of, "pad K with zeros before packing")?;
    check::int4_weight(OP, ("packed", k), args[0], args[1])?;
    super::sizes(OP, args[0], &unpacked(packed))?;
    dequantize(packed, scales, DType::F32)
}

/// [`dequantize_int4`] of checked arguments, multiplied in and returned in a float dtype.
pub(crate) fn dequantize(packed: &Tensor, scales: &Tensor, dtype: DType) -> Result<Tensor> {
    let (k, n) = (packed.dims()[0] * NIBBLES, packed.dims()[1]);
    let values = values(packed, dtype)?;
    if values.elem_count() == 0 {
        return Ok(values);
    }
    let groups = values.reshape((k / INT4_GROUP, INT4_GROUP, n))?;
    groups.broadcast_mul(&scales.to_dtype(dtype)?.unsqueeze(1)?)?.reshape((k, n))
}

/// 1, 16, 256, ... 16⁷: the worth of each nibble of a word.
fn places(device: &Device) -> Result<Tensor> {
    Tensor::new(&[0u32, 1, 2, 3, 4, 5, 6, 7].map(|i| 1u32 << (4 * i)), device)
}

/// `words mod 16`; candle has no bit operations.
fn low_nibble(words: &Tensor) -> Result<Tensor> {
    let sixteen = Tensor::new(16u32, words.device())?;
    words - words.broadcast_div(&sixteen)?.broadcast_mul(&sixteen)?
}

fn multiple(
    op: &'static str,
    arg: &'static str,
    (dim, got): (&'static str, usize),
    (of, why): (usize, &str),
    fix: &str,
) -> Result<()> {
    if got.is_multiple_of(of) {
        return Ok(());
    }
    let (want, fix) = (format!("a multiple of {of}, {why}"), fix.into());
    Err(Error::Dimension { op, arg, dim, got, want, fix }.into())
}
