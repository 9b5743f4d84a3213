//! Activation checkpointing.

use candle_core::{Result, Tensor};

/// What a function that is [checkpointed](checkpoint) or a [block](super::block) returns: a tensor, a `Vec` or an array of them.
pub trait Outputs: private::Sealed {
    #[doc(hidden)]
    fn into_tensors(self) -> Vec<Tensor>;

    /// From as many as there were.
    #[doc(hidden)]
    fn from_tensors(tensors: Vec<Tensor>) -> Result<Self>
    where
        Self: Sized;
}

mod private {
    pub trait Sealed {}
    impl Sealed for candle_core::Tensor {}
    impl Sealed for Vec<candle_core::Tensor> {}
    impl<const N: usize> Sealed for [candle_core::Tensor; N] {}
}

impl Outputs for Tensor {
    fn into_tensors(self) -> Vec<Tensor> {
        vec![self]
    }

    fn from_tensors(tensors: Vec<Tensor>) -> Result<Self> {
        let [tensor] = Outputs::from_tensors(tensors)?;
        Ok(tensor)
    }
}

impl Outputs for Vec<Tensor> {
    fn into_tensors(self) -> Vec<Tensor> {
        self
    }

    fn from_tensors(tensors: Vec<Tensor>) -> Result<Self> {
        Ok(tensors)
    }
}

impl<const N: usize> Outputs for [Tensor; N] {
    fn into_tensors(self) -> Vec<Tensor> {
        self.into()
    }

    fn from_tensors(tensors: Vec<Tensor>) -> Result<Self> {
        tensors.try_into().map_err(|_| candle_core::Error::msg("as many results as there were"))
    }
}

/// `f(inputs)`, of which the graph keeps the inputs and the results alone: in the backward pass `f` runs again, and what it
/// computes on its way is there for that time only (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016).
///
/// A model of L equal blocks, each of them checkpointed, keeps L inputs of blocks and, at a time, what one block computes on its
/// way, for one more forward pass in all.
///
/// | argument | |
/// |---|---|
/// | `f` | from tensors like `inputs`, in their order, to a tensor, a `Vec` or an array of them |
/// | `inputs` | any number of tensors, of any shapes and dtypes, on one device |
/// | result | what `f` returns |
///
/// `f` is given copies of those inputs that track a gradient, contiguous, and the others as they are. It lives as long as the
/// graph: layers are moved or cloned into it, which copies no weights.
///
/// `f` must compute the same each time: no random numbers (candle's dropout draws others when `f` runs again; draw a mask before,
/// and make it an input), and no weight that is set between the forward and the backward pass. `f` may checkpoint parts of itself. Where it is a
/// [`block`](super::block) of its inputs, it is differentiated on a tape when it runs again, too.
///
/// # Gradient
///
/// Of the inputs, and of all that `f` captures and that tracks one, such as the `Var`s of its layers: that of `f` itself, to the
/// bit where the sums are made in the same order. A captured tensor that was computed from a `Var` is differentiated back to
/// that, each time that `f` is: better make it an input. A `Var` that only a result depends on of which nothing else does, has a
/// gradient of zeros.
///
/// # Errors
///
/// Those of `f`; inputs or results on several devices; in the backward pass also if `f` returns other shapes or dtypes than
/// before, or depends on a `Var` on which it did not.
///
/// # Example
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kaio_candle::{prelude::*, train};
///
/// let w = Var::randn(0f32, 0.1, (64, 64), &Device::Cpu)?;
/// let mut x = Tensor::randn(0f32, 1., (8, 64), &Device::Cpu)?;
/// for _ in 0..4 {
///     let w = w.as_tensor().clone();
///     // What `silu` reads of the product is computed again in the backward pass.
///     x = train::checkpoint(move |x| x[0].matmul(&w)?.silu(), &[&x])?;
/// }
/// assert!(x.sqr()?.mean_all()?.backward()?.get(&w).is_some());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn checkpoint<O: Outputs>(
    f: impl Fn(&[Tensor]) -> Result<O> + Send + Sync + 'static,
    inputs: &[&Tensor],
) -> Result<O> {
    let f = move |inputs: &[Tensor]| f(inputs).map(O::into_tensors);
    O::from_tensors(crate::op::checkpoint(f, inputs)?)
}
