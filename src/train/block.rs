//! Blocks.

use candle_core::{Result, Tensor};

use super::Outputs;

/// `f(inputs)`, between whose ops gradients are moved rather than added to zeros.
///
/// candle's backward pass allocates zeros for each gradient and adds to them: four passes over the memory of every activation.
/// Within a block, what this crate's ops hand to each other's gradients is the first gradient that arrives, as it is, to which
/// only further ones are added, where a tensor is used several times. This holds too across `reshape`, `squeeze`, `transpose`,
/// `permute` and `narrow`; narrows of one tensor that do not overlap are written next to each other. Other ops of candle's are
/// differentiated by candle.
///
/// | argument | |
/// |---|---|
/// | `f` | from tensors like `inputs`, in their order, to a tensor, a `Vec` or an array of them |
/// | `inputs` | any number of tensors, of any shapes and dtypes, on one device |
/// | result | what `f` returns |
///
/// Of what its ops compute a block keeps what their gradients read: not what only a sum, a rotation or a frozen weight's product read,
/// for example. [`backward`](super::backward) frees that on the way, as soon as it has been used.
///
/// `f` runs once, and is given copies of those inputs that are computed from `Var`s, and the others as they are; results that
/// track a gradient are copies too. So the best block is a large one: from `Var`s to the loss nothing of size is copied.
///
/// What `f` computes with candle's ops from their own results is differentiated once for each op of this crate that reads it:
/// in a model of many layers that are added with `+` (and not by [`kaio_add`](crate::KaioTensorExt::kaio_add) or
/// [`kaio_add_rms_norm`](crate::KaioTensorExt::kaio_add_rms_norm)), make each layer a block. A block in a block is a part of
/// that. A [`checkpoint`](super::checkpoint) may be in a block, and the other way round.
///
/// # Gradient
///
/// Of the inputs, and of all that `f` captures and that tracks one, such as the `Var`s of its layers: that of `f` itself, to the
/// bit where the sums are made in the same order. A captured tensor that was computed from a `Var` is differentiated back to that
/// in the block's backward pass: better make it an input. A `Var` that only a result depends on of which nothing else does, has a
/// gradient of zeros.
///
/// # Errors
///
/// Those of `f`; inputs, results or captured `Var`s on several devices; a backward pass from a tensor that `f` computed and did
/// not return, or within `f` itself, for gradients go through the block as a whole.
///
/// # Example
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use kaio_candle::{prelude::*, train};
///
/// let var = || Var::randn(0f32, 0.1, (64, 64), &Device::Cpu);
/// let (gate, up, down) = (var()?, var()?, var()?);
/// let x = Tensor::randn(0f32, 1., (8, 64), &Device::Cpu)?;
/// let opts = MatmulOptions::default().compute_dtype(DType::BF16);
/// let loss = train::block(
///     |x| {
///         let [gate, up] = [x[0].kaio_matmul_with(&gate, &opts)?, x[0].kaio_matmul_with(&up, &opts)?];
///         gate.kaio_swiglu(&up)?.kaio_matmul_with(&down, &opts)?.sqr()?.mean_all()
///     },
///     &[&x],
/// )?;
/// let grads = loss.backward()?;
/// assert!([&gate, &up, &down].iter().all(|var| grads.get(var).is_some()));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn block<O: Outputs>(f: impl FnOnce(&[Tensor]) -> Result<O>, inputs: &[&Tensor]) -> Result<O> {
    O::from_tensors(crate::op::block(|inputs| f(inputs).map(O::into_tensors), inputs)?)
}
