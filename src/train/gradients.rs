//! What a backward pass gave: whether it is all, and whether it fits.

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, Var};

use crate::check;
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
pub(super) fn complete(op: &'static str, names: Vec<String>) -> Result<()> {
    if names.is_empty() {
        return Ok(());
    }
    Err(Error::MissingGradients { op, names }.into())
}

/// A gradient as the passes over all of them read it: without gaps, in f32, f16 or bf16, of the variable's shape and on
/// its device.
pub(super) fn fit_gradient(op: &'static str, var: &Var, grad: &Tensor) -> Result<Tensor> {
    let args @ [arg, like] = [("gradient", grad), ("variable", var.as_tensor())];
    check::tensors(op, &args)?;
    check::dtype(op, arg, &check::FLOATS)?;
    check::same_shape(op, arg, like)?;
    // A graph must not live as long as what is kept of a gradient.
    grad.detach().contiguous()
}
