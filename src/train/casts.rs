//! Casts of weights that do not change.

/// Runs `f`, and within it casts each weight for [`compute_dtype`](crate::MatmulOptions::compute_dtype) once, however often it is
/// used: by shared layers, by the batches over which gradients are accumulated, by
/// [`checkpoint`](crate::train::checkpoint) in the backward pass.
///
/// Weights are right-hand sides of rank 2, and views of them such as `weight.t()?`. **No weight may be set within `f`**: an
/// optimizer's step belongs after it. candle does not say when a `Var` was set, and a product would go on with what was cast
/// before. What was cast is forgotten at the end of `f`; of one call within another, of the outer one. Other threads have casts of
/// their own. (`torch.autocast` remembers casts of weights likewise, until its context is left.)
///
/// ```
/// use candle_core::{DType, Device, Result, Tensor, Var};
/// use kaio_candle::{prelude::*, train};
///
/// let w = Var::randn(0f32, 0.1, (16, 16), &Device::Cpu)?;
/// let batches = Tensor::randn(0f32, 1., (4, 2, 16), &Device::Cpu)?;
/// let opts = MatmulOptions::default().compute_dtype(DType::BF16);
/// // Eight products, one cast.
/// let grads = train::cast_once(|| -> Result<Vec<_>> {
///     let loss = |i| {
///         let x = batches.get(i)?.kaio_matmul_with(&w, &opts)?;
///         x.kaio_matmul_with(&w, &opts)?.sqr()?.mean_all()?.backward()
///     };
///     (0..4).map(loss).collect()
/// })?;
/// assert_eq!(grads[0].get(&w).map(|grad| grad.dtype()), Some(DType::F32));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn cast_once<T>(f: impl FnOnce() -> T) -> T {
    crate::op::cast_once(f)
}
