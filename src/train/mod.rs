//! Training: an optimizer whose step is one launch for all variables, the clipping of gradients without the host, and
//! a check that no variable is forgotten.
//!
//! ```
//! use candle_core::{Device, Tensor, Var};
//! use kaio_candle::train::{AdamW, AdamWConfig, Schedule};
//!
//! let device = Device::Cpu; // or Device::new_cuda(0)?
//! let weight = Var::randn(0f32, 0.1, (8, 4), &device)?;
//! let bias = Var::zeros(4, candle_core::DType::F32, &device)?;
//!
//! let config = AdamWConfig::default().lr(0.01).clip_norm(1.0).schedule(Schedule::cosine(100).warm_up(10));
//! let named = [("weight", weight.clone()), ("bias", bias.clone())];
//! let mut adamw = AdamW::named(named, config)?.decay_where(|_, var| var.rank() >= 2);
//!
//! let (x, y) = (Tensor::randn(0f32, 1., (16, 8), &device)?, Tensor::randn(0f32, 1., (16, 4), &device)?);
//! for _ in 0..100 {
//!     let loss = (x.matmul(&weight)?.broadcast_add(&bias)? - &y)?.sqr()?.mean_all()?;
//!     adamw.backward_step(&loss)?;
//! }
//! # Ok::<(), candle_core::Error>(())
//! ```
//!
//! Everything here works on variables in f32, f16 and bf16, on the CPU and on GPUs, and waits for nothing: a norm is a
//! tensor on the device. Results do not depend on how often they are computed: sums have a fixed order.

mod adamw;
mod clip;
mod in_place;
mod memory;
mod options;
mod schedule;
mod state;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

pub use adamw::AdamW;
pub use clip::clip_grad_norm;
pub use memory::{peak_memory, reset_peak_memory};
pub use options::{AdamWConfig, Moments};
pub use schedule::Schedule;

#[cfg(feature = "cuda")]
pub(crate) use in_place::{StorageMut, write};
pub(crate) use state::{AdamWCall, AdamWTables, Sum, Update};

use crate::error::Error;

/// That every variable has a gradient.
///
/// candle drops what it cannot differentiate without a word: layers that `apply_op_no_bwd` stands between, and
/// what was detached. A model that trains in part looks like one that trains badly.
///
/// | argument | |
/// |---|---|
/// | `vars` | names and variables: of a slice of pairs, or of candle-nn's `VarMap` (`&*varmap.data().lock().unwrap()`) |
/// | `grads` | what `loss.backward()` gave |
///
/// # Errors
///
/// [`Error::MissingGradients`] with the names of those that have none, in alphabetical order.
///
/// ```
/// use candle_core::{DType, Device, Var};
/// use kaio_candle::train::grads_complete;
///
/// let vars = [("used", Var::ones(2, DType::F32, &Device::Cpu)?), ("idle", Var::ones(2, DType::F32, &Device::Cpu)?)];
/// let grads = vars[0].1.sqr()?.sum_all()?.backward()?;
/// let error = grads_complete(vars.iter().map(|(name, var)| (name, var)), &grads).unwrap_err();
/// assert!(error.to_string().starts_with("grads_complete: no gradient for `idle`;"));
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn grads_complete<'a, N: AsRef<str>>(
    vars: impl IntoIterator<Item = (N, &'a Var)>,
    grads: &GradStore,
) -> Result<()> {
    let without = vars.into_iter().filter(|(_, var)| grads.get(var).is_none());
    let mut names: Vec<_> = without.map(|(name, _)| name.as_ref().to_owned()).collect();
    names.sort();
    complete("grads_complete", names)
}

/// That no variable is without a gradient.
fn complete(op: &'static str, names: Vec<String>) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::MissingGradients { op, names }.into())
}

/// A gradient as the passes over all of them read it: without gaps, in f32, f16 or bf16, of the variable's shape and on
/// its device.
fn fit_gradient(op: &'static str, var: &Var, grad: &Tensor) -> Result<Tensor> {
    use crate::check;
    let args @ [arg, like] = [("gradient", grad), ("variable", var.as_tensor())];
    check::tensors(op, &args)?;
    check::dtype(op, arg, &clip::DTYPES)?;
    check::same_shape(op, arg, like)?;
    // A graph must not live as long as what is kept of a gradient.
    grad.detach().contiguous()
}
