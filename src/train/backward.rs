//! The last backward pass of a graph.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor};

/// The gradients of `loss.backward()`, in a pass that is the last one through the [blocks](super::block) of its graph: what a block
/// kept for it is freed on the way, each tensor as soon as it has been used.
///
/// A model's activations and the gradients of its weights are the largest part of what training keeps in memory. In
/// `loss.backward()`, which may be called again, both are there at the end; here the one goes as the other comes. Of a graph
/// without blocks candle keeps everything as long as there is a tensor of it. [`AdamW::backward_step`](super::AdamW::backward_step)
/// makes the pass of its step so.
///
/// | argument | shape | dtype |
/// |---|---|---|
/// | `loss` | any: the gradient of the sum of its elements is taken | f32, f16, bf16, f64 |
/// | result | the gradients of all `Var`s behind it | theirs |
///
/// # Errors
///
/// Those of `loss.backward()`; [`Error::Value`](crate::Error::Value) in any later backward pass through one of the blocks, also
/// after a pass that failed on its way.
///
/// ```
/// use candle_core::{Device, Var};
/// use kaio_candle::{prelude::*, train};
///
/// let w = Var::randn(0f32, 1., (4, 8), &Device::Cpu)?;
/// let loss = train::block(|_| w.kaio_softmax()?.kaio_swiglu(&w)?.sum_all(), &[])?;
/// let first = loss.backward()?;
/// let last = train::backward(&loss)?;
/// let [first, last] = [first, last].map(|grads| grads.get(&w).map(|grad| grad.to_vec2::<f32>()));
/// assert_eq!(first.transpose()?, last.transpose()?);
/// assert!(loss.backward().is_err());
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    crate::op::last_pass(|| loss.backward())
}
