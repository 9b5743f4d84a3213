//! Every way a call can be wrong, as a type.

use std::io::ErrorKind;

use candle_core::{DType, Shape};

/// What went wrong in a call to this crate.
///
/// All methods return [`candle_core::Result`], so that `?` works in candle code. The error inside is
/// this type; [`Error::of`] finds it again:
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kaio_candle::{Error, prelude::*};
///
/// let a = Tensor::zeros((4, 8), DType::F16, &Device::Cpu)?;
/// let b = Tensor::zeros((9, 4), DType::F16, &Device::Cpu)?;
/// let error = a.kaio_matmul_tc(&b).unwrap_err();
/// assert!(matches!(Error::of(&error), Some(Error::Dimension { got: 9, .. })));
/// # Ok::<(), candle_core::Error>(())
/// ```
///
/// The candle error is `Cuda` if a driver refused or a GPU is missing, and for a wrong call `Io` of kind
/// `InvalidInput`, `Unsupported` or `OutOfMemory`.
///
/// Messages name the op, the argument, what came, what was wanted and what to do. They are the same
/// for CPU and CUDA tensors and come before any allocation or launch, but for the limits of an engine
/// and the quantisers' search for NaN.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// An argument has too few or too many dimensions.
    #[error("{op}: `{arg}` has shape {got:?} (rank {}), wanted {want}; {fix}", got.rank())]
    Rank {
        /// The method that was called.
        op: &'static str,
        /// The argument's name.
        arg: &'static str,
        /// Its shape.
        got: Shape,
        /// The shapes that the op takes.
        want: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// An argument has a dtype that the op does not take.
    #[error("{op}: `{arg}` is {}, wanted {want}; {fix}", got.as_str())]
    DType {
        /// The method that was called.
        op: &'static str,
        /// The argument's name.
        arg: &'static str,
        /// Its dtype.
        got: DType,
        /// The dtypes that the op takes.
        want: String,
        /// What to do.
        fix: String,
    },
    /// One dimension of an argument does not fit the other arguments or the format.
    #[error("{op}: `{arg}` has {dim} = {got}, wanted {want}; {fix}")]
    Dimension {
        /// The method that was called.
        op: &'static str,
        /// The argument's name.
        arg: &'static str,
        /// The dimension's name in the op's documentation.
        dim: &'static str,
        /// Its size.
        got: usize,
        /// The sizes that fit.
        want: String,
        /// What to do.
        fix: String,
    },
    /// The batch dimensions of two arguments cannot be broadcast together.
    #[error(
        "{op}: batch dimensions {got:?} of `{arg}` do not broadcast with {want:?} of `{with}`; make them equal or 1"
    )]
    Batch {
        /// The method that was called.
        op: &'static str,
        /// The argument's name.
        arg: &'static str,
        /// Its batch dimensions.
        got: Vec<usize>,
        /// The argument that it was to be combined with.
        with: &'static str,
        /// That argument's batch dimensions.
        want: Vec<usize>,
    },
    /// A tensor is too large for memory: the result, an argument as a broadcast view shows it, or what
    /// the CPU path keeps of one.
    #[error("{op}: {what} {got:?} in {} {limit}; check its sizes, or work in parts", dtype.as_str())]
    TooLarge {
        /// The method that was called.
        op: &'static str,
        /// What is too large: `the result`, or an argument's name in backticks.
        what: String,
        /// Its shape.
        got: Vec<usize>,
        /// Its dtype.
        dtype: DType,
        /// What is in the way, as a predicate.
        limit: String,
    },
    /// Two arguments live on different devices.
    #[error(
        "{op}: `{arg}` is on {got}, but `{with}` is on {want}; move one with `.to_device(..)?`"
    )]
    Device {
        /// The method that was called.
        op: &'static str,
        /// The argument's name.
        arg: &'static str,
        /// Its device, with the CUDA ordinal.
        got: String,
        /// The argument that it was to be combined with.
        with: &'static str,
        /// That argument's device.
        want: String,
    },
    /// An input tracks a gradient, and the op has none for it.
    #[error(
        "{op}: `{arg}` tracks a gradient, but this op has none for it; `.detach()` makes it a constant, and what it was computed from (the layers below) then gets no gradient through it"
    )]
    Tracked {
        /// The method that was called.
        op: &'static str,
        /// The argument's name.
        arg: &'static str,
    },
    /// An option, a number passed by value or an element of a tensor is out of range.
    #[error("{op}: `{name}` is {got}, wanted {want}; {fix}")]
    Value {
        /// The method that was called.
        op: &'static str,
        /// The option's or argument's name.
        name: &'static str,
        /// What came.
        got: String,
        /// What was wanted.
        want: String,
        /// What to do.
        fix: &'static str,
    },
    /// Two options exclude each other.
    #[error("{op}: `{name}` and `{with}` exclude each other; {fix}")]
    Conflict {
        /// The method that was called.
        op: &'static str,
        /// One option's name.
        name: &'static str,
        /// The other's.
        with: &'static str,
        /// What to do.
        fix: &'static str,
    },
    /// Variables got no gradient: training would leave them as they are.
    #[error(
        "{op}: no gradient for {}; nothing with a gradient leads from there to the loss: look for `.detach()`, for ops without a backward pass (candle-nn's `LayerNorm`, `RmsNorm` and `softmax_last_dim` are), and for layers that were not used",
        names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
    )]
    MissingGradients {
        /// The function that was called.
        op: &'static str,
        /// The variables' names, in their order.
        names: Vec<String>,
    },
    /// A saved state lacks a tensor, or has one that does not fit.
    #[error(
        "{op}: `{name}` is {got}, wanted {want}; the state is that of another model or of other options"
    )]
    State {
        /// The method that was called.
        op: &'static str,
        /// The tensor's name.
        name: String,
        /// What came: a dtype and a shape, or that there is none.
        got: String,
        /// What was wanted.
        want: String,
    },
    /// The engine, or this crate on the kind of device, cannot do this.
    #[error("{op}: {what} {limit}; {fix}")]
    Unsupported {
        /// The method that was called.
        op: &'static str,
        /// What has the limit: an engine (`Engine::KaioOps`) or `this crate`.
        what: String,
        /// What it cannot do, as a predicate, with the number that broke the limit
        /// (`cannot take a head dimension of 264 (at most 256)`).
        limit: String,
        /// What to do instead.
        fix: String,
    },
    /// There is no usable NVIDIA GPU at this ordinal.
    #[error(
        "no CUDA device at ordinal {ordinal}: {reason}; `nvidia-smi -L` lists what the driver sees"
    )]
    NoDevice {
        /// The ordinal that was asked for.
        ordinal: usize,
        /// The driver's own words.
        reason: String,
    },
    /// A CUDA tensor was wanted.
    #[error(
        "{op}: wanted a CUDA tensor, got one on {got}; move it with `.to_device(&Device::new_cuda(0)?)?`"
    )]
    NotCuda {
        /// The function that was called.
        op: &'static str,
        /// The device of the tensor that came.
        got: String,
    },
    /// The CUDA driver or a kernel library refused.
    #[error("{op}: the GPU call failed: {message}")]
    Driver {
        /// The method that was called.
        op: &'static str,
        /// The driver's or the library's own words.
        message: String,
    },
}

impl Error {
    /// The `kaio_candle` error inside a candle error, if that is what it carries.
    ///
    /// Looks through the context and backtrace layers that candle may have put around it.
    pub fn of(error: &candle_core::Error) -> Option<&Error> {
        use candle_core::Error as E;
        match error {
            E::Cuda(inner) => inner.downcast_ref(),
            E::Io(inner) => inner.get_ref()?.downcast_ref(),
            E::WithBacktrace { inner, .. } | E::Context { inner, .. } => Self::of(inner),
            E::WithPath { inner, .. } => Self::of(inner),
            E::WrappedContext { wrapped, .. } => {
                let wrapped: &(dyn std::error::Error + 'static) = wrapped.as_ref();
                match wrapped.downcast_ref::<candle_core::Error>() {
                    Some(inner) => Self::of(inner),
                    None => wrapped.downcast_ref(),
                }
            }
            _ => None,
        }
    }
}

/// A refusal by the driver is candle's `Cuda`. A wrong call is no matter of CUDA, and often of a CPU
/// tensor: it travels as `Io`, candle's other variant out of which an error can be downcast and that
/// shows its text as it is. (`Wrapped` holds a `dyn Display`, which gives nothing back, and
/// `WrappedContext` shows the `Debug` form.) The `ErrorKind` says what the variant's name does not.
impl From<Error> for candle_core::Error {
    fn from(error: Error) -> Self {
        let kind = match error {
            Error::NoDevice { .. } | Error::NotCuda { .. } | Error::Driver { .. } => {
                return candle_core::Error::Cuda(Box::new(error));
            }
            Error::Unsupported { .. } => ErrorKind::Unsupported,
            Error::TooLarge { .. } => ErrorKind::OutOfMemory,
            _ => ErrorKind::InvalidInput,
        };
        candle_core::Error::Io(std::io::Error::new(kind, error))
    }
}

/// The `Result` inside the crate; it becomes [`candle_core::Result`] with `?`.
pub type Result<T, E = Error> = std::result::Result<T, E>;
