//! The norm of gradients, and gradients scaled down to one.

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};

use super::gradients::fit_gradient;
use super::options;
use crate::kernel::optimizer::BESIDE_NORM;
use crate::{cpu, cuda};

/// Scales all gradients by `min(1, max_norm / (norm + 10⁻⁶))`, with `norm = √Σ g²` over all of them together, and gives
/// the norm: PyTorch's `clip_grad_norm_`.
///
/// | argument | shape | dtype |
/// |---|---|---|
/// | `vars` | any, on one device | f32, f16, bf16 |
/// | `grads` | theirs, of any strides; the scaled ones take their place | f32, f16, bf16 |
/// | result | `[]`, on their device | f32 |
///
/// The norm and the factor stay on the device. The sum is in f32 on a GPU, chunk by chunk in a fixed order, and in f64 on
/// the CPU. Variables without a gradient count as 0; [`grads_complete`](super::grads_complete) finds them. A norm that is
/// NaN makes all gradients NaN.
///
/// [`AdamWConfig::clip_norm`](super::AdamWConfig::clip_norm) does the same within AdamW's own pass: nothing is written for
/// it.
///
/// # Errors
///
/// [`Error::Value`](crate::Error::Value) for a `max_norm` that is not a finite number greater than 0;
/// [`Error::Device`](crate::Error::Device), [`Error::DType`](crate::Error::DType) and
/// [`Error::Dimension`](crate::Error::Dimension) for gradients that are not their variables'.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use kaio_candle::train::clip_grad_norm;
///
/// let var = Var::new(&[3f32, 4.], &Device::Cpu)?;
/// let mut grads = (var.sqr()?.sum_all()? * 0.5)?.backward()?; // the gradient is var
/// let norm = clip_grad_norm(&[var.clone()], &mut grads, 1.0)?;
/// assert_eq!(norm.to_scalar::<f32>()?, 5.0);
/// let clipped = grads.get(&var).expect("it has one").to_vec1::<f32>()?;
/// assert!((clipped[0] - 0.6).abs() < 1e-6 && (clipped[1] - 0.8).abs() < 1e-6);
/// # Ok::<(), candle_core::Error>(())
/// ```
pub fn clip_grad_norm(vars: &[Var], grads: &mut GradStore, max_norm: f64) -> Result<Tensor> {
    const OP: &str = "clip_grad_norm";
    options::norm(OP, "max_norm", max_norm)?;
    let mut held: Vec<(&Var, Tensor)> = Vec::new();
    for var in vars {
        // A variable that is listed twice has one gradient.
        let known = held.iter().any(|(other, _)| other.id() == var.id());
        if let (false, Some(grad)) = (known, grads.get(var)) {
            held.push((var, fit_gradient(OP, var, grad)?));
        }
    }
    one_device(OP, held.iter().map(|(var, _)| ("vars", var.as_tensor())))?;
    held.retain(|(_, grad)| grad.elem_count() > 0);
    let of_all: Vec<&Tensor> = held.iter().map(|(_, grad)| grad).collect();
    let device = vars.first().map_or(&Device::Cpu, |var| var.device());
    let clip = clip_of(OP, &of_all, device, 1.0, max_norm)?;
    if !of_all.is_empty() {
        let scaled = match device {
            Device::Cpu => {
                let factor = clip.get(1)?.to_scalar::<f32>()?;
                let scale = |grad: &&Tensor| {
                    let scaled = grad.to_dtype(DType::F32)?.affine(factor.into(), 0.0)?;
                    scaled.to_dtype(grad.dtype())
                };
                of_all.iter().map(scale).collect::<Result<Vec<_>>>()?
            }
            _ => cuda::scale_grads(OP, &of_all, &clip, None)?,
        };
        for ((var, _), scaled) in held.iter().zip(scaled) {
            grads.insert(var, scaled);
        }
    }
    clip.get(0)
}

/// The norm of all gradients times `scale`, and what gradients are multiplied with, the scale and the clipping together:
/// f32 `[2]` on their device. They are without gaps and not empty.
pub(super) fn clip_of(
    op: &'static str,
    grads: &[&Tensor],
    device: &Device,
    scale: f64,
    max_norm: f64,
) -> Result<Tensor> {
    match device {
        Device::Cuda(_) if !grads.is_empty() => {
            cuda::grad_norm(op, grads, scale as f32, max_norm as f32)
        }
        _ => {
            let mut squares = 0.0;
            for grad in grads {
                squares += cpu::with_floats(grad, cpu::squares)?;
            }
            let norm = squares.sqrt() * scale;
            let ratio = max_norm / (norm + BESIDE_NORM);
            // A norm that is NaN gives NaN.
            let factor = if ratio >= 1.0 { 1.0 } else { ratio };
            Tensor::new(&[norm as f32, (factor * scale) as f32], device)
        }
    }
}

/// That all tensors are on one device.
pub(super) fn one_device<'a>(
    op: &'static str,
    args: impl Iterator<Item = (&'static str, &'a Tensor)>,
) -> Result<()> {
    let args: Vec<_> = args.collect();
    if args.is_empty() {
        return Ok(());
    }
    Ok(crate::check::tensors(op, &args)?)
}
