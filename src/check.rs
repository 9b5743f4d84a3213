//! Argument checks shared by the ops. Each runs before any allocation or launch.

use candle_core::{DType, Device, DeviceLocation, Tensor};

use crate::{
    error::{Error, Result},
    stack::{batch_dims, broadcast_batch},
};

/// A named argument.
pub(crate) type Arg<'a> = (&'static str, &'a Tensor);

/// What ops compute with, and optimizers step.
pub(crate) const FLOATS: [DType; 3] = [DType::F16, DType::BF16, DType::F32];

/// A device as messages show it.
pub(crate) fn place(location: DeviceLocation) -> String {
    match location {
        DeviceLocation::Cpu => "the CPU".into(),
        DeviceLocation::Cuda { gpu_id } => format!("CUDA device {gpu_id}"),
        DeviceLocation::Metal { gpu_id } => format!("Metal device {gpu_id}"),
    }
}

/// What every op asks of its tensors first: one device, and sizes that nothing computed from them can
/// carry out of a `usize`.
pub(crate) fn tensors(op: &'static str, args: &[Arg]) -> Result<()> {
    one_device(op, args)?;
    args.iter().try_for_each(|&arg| tensor(op, arg))
}

/// The same of an op with one tensor.
pub(crate) fn tensor(op: &'static str, (arg, t): Arg) -> Result<()> {
    size(op, format_args!("`{arg}`"), t.dims(), t.dtype())
}

/// All arguments are on the CPU, or on the GPU of one ordinal.
fn one_device(op: &'static str, args: &[Arg]) -> Result<()> {
    let (with, first) = args[0];
    let want = first.device().location();
    if matches!(want, DeviceLocation::Metal { .. }) {
        return Err(Error::Unsupported {
            op,
            what: "this crate".into(),
            limit: format!("cannot take `{with}` on {}", place(want)),
            fix: "move it to the CPU or a CUDA device with `.to_device(..)?`".into(),
        });
    }
    args[1..]
        .iter()
        .try_for_each(|&(arg, t)| same_device(op, (arg, t.device()), (with, first.device())))
}

/// Both arguments are on the CPU, or on the GPU of one ordinal.
pub(crate) fn same_device(
    op: &'static str,
    (arg, got): (&'static str, &Device),
    (with, want): (&'static str, &Device),
) -> Result<()> {
    let [got, want] = [got, want].map(Device::location);
    if got == want {
        return Ok(());
    }
    let (got, want) = (place(got), place(want));
    Err(Error::Device { op, arg, got, with, want })
}

/// The argument has one of the dtypes `want`.
pub(crate) fn dtype(op: &'static str, (arg, t): Arg, want: &[DType]) -> Result<()> {
    if want.contains(&t.dtype()) {
        return Ok(());
    }
    Err(Error::DType { op, arg, got: t.dtype(), want: one_of(want), fix: cast_to_one_of(want) })
}

/// `f16`, `f16 or bf16`, `f16, bf16 or f32`.
pub(crate) fn one_of(dtypes: &[DType]) -> String {
    let names: Vec<_> = dtypes.iter().map(DType::as_str).collect();
    match names.as_slice() {
        [first @ .., last] if !first.is_empty() => format!("{} or {last}", first.join(", ")),
        _ => names.concat(),
    }
}

/// Both arguments have the same dtype.
pub(crate) fn same_dtype(op: &'static str, (arg, t): Arg, (with, first): Arg) -> Result<()> {
    if t.dtype() == first.dtype() {
        return Ok(());
    }
    Err(Error::DType {
        op,
        arg,
        got: t.dtype(),
        want: format!("{}, the dtype of `{with}`", first.dtype().as_str()),
        fix: cast_to(first.dtype()),
    })
}

/// The cast that loses least.
fn cast_to_one_of(dtypes: &[DType]) -> String {
    let both = [DType::F16, DType::BF16].iter().all(|half| dtypes.contains(half));
    if dtypes.contains(&DType::F32) {
        cast_to(DType::F32)
    } else if both {
        "cast it with `.to_dtype(DType::BF16)?`, which keeps the range of f32, or \
         `.to_dtype(DType::F16)?`, which keeps three more bits but ends at 65504"
            .into()
    } else {
        cast_to(dtypes[0])
    }
}

fn cast_to(dtype: DType) -> String {
    match dtype {
        DType::U8 => "quantise it with `quant::quantize_int8`".into(),
        _ => format!("cast it with `.to_dtype(DType::{dtype:?})?`"),
    }
}

/// The dtype of packed int4 words.
pub(crate) fn int4_words(op: &'static str, (arg, t): Arg) -> Result<()> {
    let got = t.dtype();
    let fix = match got {
        DType::U32 => return Ok(()),
        // What checkpoints hold.
        DType::I32 => {
            "a cast does not convert GPTQ's words (unsigned nibbles with zero points) nor AWQ's \
             (packed along N): here nibbles are two's complement, along K, the lowest first, with no \
             zero points; `QuantWeight::from_gptq` and `from_awq` take those"
        }
        _ => "quantise it with `quant::quantize_int4`",
    };
    Err(Error::DType { op, arg, got, want: "u32".into(), fix: fix.into() })
}

/// Both arguments have the same shape.
pub(crate) fn same_shape(op: &'static str, (arg, t): Arg, (with, first): Arg) -> Result<()> {
    let fix = "expand one with `.broadcast_as(..)?`";
    let why = format_args!("the rank of `{with}` {:?}", first.dims());
    dim(op, arg, ("rank", t.rank()), (first.rank(), why), fix)?;
    let mut pairs = std::iter::zip(t.dims(), first.dims());
    match pairs.find(|(got, want)| got != want) {
        None => Ok(()),
        Some((&got, &want)) => {
            let why = format_args!("in {:?}, as `{with}` {:?}", t.dims(), first.dims());
            dim(op, arg, ("a dimension", got), (want, why), fix)
        }
    }
}

/// The argument's rank lies in `ranks`.
pub(crate) fn rank(
    op: &'static str,
    (arg, t): Arg,
    ranks: std::ops::RangeInclusive<usize>,
    want: &'static str,
    fix: &'static str,
) -> Result<()> {
    if ranks.contains(&t.rank()) {
        return Ok(());
    }
    Err(Error::Rank { op, arg, got: t.shape().clone(), want, fix })
}

/// One dimension has the size that the others demand. Words are put together only for an error.
pub(crate) fn dim(
    op: &'static str,
    arg: &'static str,
    (name, got): (&'static str, usize),
    (want, why): (usize, impl std::fmt::Display),
    fix: impl std::fmt::Display,
) -> Result<()> {
    if got == want {
        return Ok(());
    }
    Err(Error::Dimension {
        op,
        arg,
        dim: name,
        got,
        want: format!("{want}, {why}"),
        fix: fix.to_string(),
    })
}

/// The argument's shape is none of those that the op takes.
pub(crate) fn another_shape(
    op: &'static str,
    (name, t): Arg,
    want: impl Into<String>,
    fix: &'static str,
) -> Error {
    Error::Value { op, name, got: format!("of shape {:?}", t.dims()), want: want.into(), fix }
}

/// No argument tracks a gradient: neither a `Var` nor anything computed from one.
pub(crate) fn untracked(op: &'static str, args: &[Arg]) -> Result<()> {
    match args.iter().find(|(_, t)| t.track_op()) {
        Some(&(arg, _)) => Err(Error::Tracked { op, arg }),
        None => Ok(()),
    }
}

/// The batch dimensions of two arguments broadcast together.
pub(crate) fn batch(op: &'static str, (arg, t): Arg, (with, first): Arg) -> Result<()> {
    let (got, want) = (batch_dims(t.dims()), batch_dims(first.dims()));
    if broadcast_batch(want, got).is_some() {
        return Ok(());
    }
    Err(Error::Batch { op, arg, got: got.to_vec(), with, want: want.to_vec() })
}

/// The most bytes that a tensor may have, or seem to have as a broadcast view.
///
/// No process can have more on x86-64 or AArch64, and what is computed from sizes under it (padded
/// rows, parts of a result, bytes) stays far from the end of a `usize`, so that it need not be checked.
const MOST_BYTES: usize = isize::MAX as usize >> (if usize::BITS == 64 { 15 } else { 0 });

/// Memory that is asked for at once without a look whether it is there.
const SMALL_BYTES: usize = 1 << 24;

/// The bytes of a tensor. Dimensions of 0 count as 1, as they do in strides.
fn bytes(dims: &[usize], dtype: DType) -> Option<usize> {
    let bytes = dims.iter().try_fold(dtype.size_in_bytes(), |n, &d| n.checked_mul(d.max(1)));
    bytes.filter(|&bytes| bytes <= MOST_BYTES)
}

/// A tensor of this shape can exist.
pub(crate) fn size(
    op: &'static str,
    what: impl std::fmt::Display,
    dims: &[usize],
    dtype: DType,
) -> Result<()> {
    match bytes(dims, dtype) {
        Some(_) => Ok(()),
        None => {
            let limit = format!("would be over {MOST_BYTES} bytes, more than any memory");
            Err(too_large(op, what, dims, dtype, limit))
        }
    }
}

/// A tensor of this shape can be allocated on the CPU. Whoever allocates it then may use `vec!`.
pub(crate) fn memory(
    op: &'static str,
    what: impl std::fmt::Display,
    dims: &[usize],
    dtype: DType,
) -> Result<()> {
    size(op, &what, dims, dtype)?;
    let bytes = if dims.contains(&0) { 0 } else { bytes(dims, dtype).unwrap_or(usize::MAX) };
    if bytes <= SMALL_BYTES || Vec::<u8>::new().try_reserve_exact(bytes).is_ok() {
        return Ok(());
    }
    let limit = format!("needs {bytes} bytes, which cannot be allocated");
    Err(too_large(op, what, dims, dtype, limit))
}

fn too_large(
    op: &'static str,
    what: impl std::fmt::Display,
    dims: &[usize],
    dtype: DType,
    limit: String,
) -> Error {
    Error::TooLarge { op, what: what.to_string(), got: dims.to_vec(), dtype, limit }
}

/// candle's own CUDA kernels count elements in u32: past that they would copy a part, or never end.
pub(crate) fn copyable(op: &'static str, elements: usize) -> Result<()> {
    if u32::try_from(elements).is_ok() {
        return Ok(());
    }
    Err(Error::Unsupported {
        op,
        what: "this crate".into(),
        limit: format!("cannot copy or convert {elements} elements at once (at most {})", u32::MAX),
        fix: "split the batch and join the results with `Tensor::cat`".into(),
    })
}

/// candle's ops can make something of an argument: of this shape, in its dtype or one of up to four bytes.
pub(crate) fn made(op: &'static str, (arg, t): Arg, dims: &[usize]) -> Result<()> {
    let what = format_args!("what is made of `{arg}`,");
    let dtype = if t.dtype().size_in_bytes() > 4 { t.dtype() } else { DType::F32 };
    size(op, what, dims, dtype)?;
    match t.device().is_cpu() {
        true => memory(op, what, dims, dtype),
        false => copyable(op, dims.iter().product()),
    }
}

/// Copies without gaps can be made of views on the CPU.
pub(crate) fn copies(op: &'static str, args: &[Arg]) -> Result<()> {
    let mut views = args.iter().filter(|(_, t)| t.device().is_cpu() && !t.is_contiguous());
    views.try_for_each(|&arg| made(op, arg, arg.1.dims()))
}

const ONE_MATRIX: &str = "a weight is one matrix";

/// Rows of an int4 weight that share one scale.
pub(crate) const INT4_GROUP: usize = 128;

/// Checks `[.., M, K]` and gives K.
pub(crate) fn activations(op: &'static str, (arg, t): Arg) -> Result<usize> {
    let fix = "add a dimension with `.unsqueeze(0)?`";
    rank(op, (arg, t), 2..=usize::MAX, "[.., M, K]", fix)?;
    Ok(t.dims()[t.rank() - 1])
}

/// Checks an int8 weight `[K, N]` against the K of the activations.
pub(crate) fn int8_weight(
    op: &'static str,
    (x_arg, x, k): (&'static str, &Tensor, usize),
    (arg, t): Arg,
) -> Result<()> {
    rank(op, (arg, t), 2..=2, "[K, N]", ONE_MATRIX)?;
    let why = format_args!("the K of `{x_arg}` {:?}", x.dims());
    dim(op, arg, ("K", t.dims()[0]), (k, why), "transpose the weight with `.t()?`")
}

/// Checks a packed int4 weight `[K/8, N]` and its scales `[K/128, N]` against the K of an argument.
pub(crate) fn int4_weight(
    op: &'static str,
    (k_arg, k): (&'static str, usize),
    (arg, packed): Arg,
    (s_arg, scales): Arg,
) -> Result<()> {
    rank(op, (arg, packed), 2..=2, "[K/8, N]", ONE_MATRIX)?;
    let each = "one scale for each group of 128 rows and each column";
    rank(op, (s_arg, scales), 2..=2, "[K/128, N]", each)?;
    if !k.is_multiple_of(INT4_GROUP) {
        return Err(Error::Dimension {
            op,
            arg: k_arg,
            dim: "K",
            got: k,
            want: format!("a multiple of {INT4_GROUP}, the rows that share a scale"),
            fix: "pad it with zeros, and the weight too before it is quantised".into(),
        });
    }
    let fix = "eight nibbles along K make a u32; see `quant::quantize_int4`";
    let why = format_args!("K/8 for the K = {k} of `{k_arg}`");
    dim(op, arg, ("rows", packed.dims()[0]), (k / 8, why), fix)?;
    let fix = format_args!("{each}; see `quant::quantize_int4`");
    let why = format_args!("K/{INT4_GROUP} for the K = {k} of `{k_arg}`");
    dim(op, s_arg, ("rows", scales.dims()[0]), (k / INT4_GROUP, why), fix)?;
    let why = format_args!("the N of `{arg}`");
    dim(op, s_arg, ("N", scales.dims()[1]), (packed.dims()[1], why), fix)
}

/// A number passed by value is finite.
pub(crate) fn finite(op: &'static str, name: &'static str, value: f32) -> Result<()> {
    if value.is_finite() {
        return Ok(());
    }
    let (got, want) = (value.to_string(), "a finite number".into());
    Err(Error::Value { op, name, got, want, fix: "check how it was computed" })
}
