//! Options of losses.

use candle_core::DType;

/// Options of [`kaio_cross_entropy`](crate::KaioTensorExt::kaio_cross_entropy) and of
/// [`kaio_linear_cross_entropy`](crate::KaioTensorExt::kaio_linear_cross_entropy).
///
/// With logits `z` (under the soft cap, if there is one), target `t` and `lse = log Σⱼ exp zⱼ`, the loss of a row is
///
/// `(1 − label_smoothing) · (lse − zₜ) + label_smoothing · mean(lse − zⱼ) + z_loss · lse²`.
///
/// ```
/// use kaio_candle::prelude::*;
///
/// let opts = CrossEntropyOptions::default().label_smoothing(0.1).z_loss(1e-4).ignore_index(0);
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct CrossEntropyOptions {
    /// The target of rows that do not count: −100, as in PyTorch. Their loss and their gradient are 0, whatever
    /// their logits are. A target of u32 is never negative.
    pub ignore_index: i64,
    /// How much of the target's probability is spread evenly over all classes, 0 to 1 (Szegedy et al., "Rethinking the
    /// Inception Architecture", 2015): 0.
    pub label_smoothing: f32,
    /// A factor of the squared log-sum-exp, which keeps logits from drifting (Chowdhery et al., "PaLM", 2022): 0.
    pub z_loss: f32,
    /// Logits become `softcap · tanh(logit / softcap)` first, as in Gemma 2. `None` leaves them as they are.
    pub softcap: Option<f32>,
    /// What becomes of the rows' losses.
    pub reduction: Reduction,
    /// Of [`kaio_linear_cross_entropy`](crate::KaioTensorExt::kaio_linear_cross_entropy), f16 or bf16: what hidden states and weight,
    /// f32, f16 or bf16 each, are cast to before they are multiplied. `None` takes both in one dtype, f16 or bf16, as they are.
    ///
    /// Gradients come back in the dtype of each, as with [`MatmulOptions::compute_dtype`](crate::MatmulOptions::compute_dtype).
    pub compute_dtype: Option<DType>,
}

/// What becomes of the losses of rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Reduction {
    /// Their mean over the rows that are not ignored. Of no such row it is NaN, with a gradient of 0, as in PyTorch.
    #[default]
    Mean,
    /// Their sum.
    Sum,
    /// All of them, in the shape of the targets.
    None,
}

impl Default for CrossEntropyOptions {
    fn default() -> Self {
        Self {
            ignore_index: -100,
            label_smoothing: 0.0,
            z_loss: 0.0,
            softcap: None,
            reduction: Reduction::Mean,
            compute_dtype: None,
        }
    }
}

impl CrossEntropyOptions {
    /// Sets the target of rows that do not count.
    pub fn ignore_index(mut self, target: i64) -> Self {
        self.ignore_index = target;
        self
    }

    /// Sets how much of the target's probability is spread over all classes.
    pub fn label_smoothing(mut self, share: f32) -> Self {
        self.label_smoothing = share;
        self
    }

    /// Sets the factor of the squared log-sum-exp.
    pub fn z_loss(mut self, factor: f32) -> Self {
        self.z_loss = factor;
        self
    }

    /// Sets the cap of the logits.
    pub fn softcap(mut self, cap: f32) -> Self {
        self.softcap = Some(cap);
        self
    }

    /// Sets what becomes of the rows' losses.
    pub fn reduction(mut self, reduction: Reduction) -> Self {
        self.reduction = reduction;
        self
    }

    /// Sets what hidden states and weight are cast to before they are multiplied.
    ///
    /// ```
    /// use candle_core::{DType, Device, Tensor, Var};
    /// use kaio_candle::prelude::*;
    ///
    /// let hidden = Tensor::randn(0f32, 1., (5, 16), &Device::Cpu)?;
    /// let weight = Var::randn(0f32, 1., (40, 16), &Device::Cpu)?;
    /// let targets = Tensor::new(&[3u32, 1, 4, 1, 5], &Device::Cpu)?;
    /// let opts = CrossEntropyOptions::default().compute_dtype(DType::BF16);
    /// let grads = hidden.kaio_linear_cross_entropy(&weight, &targets, &opts)?.backward()?;
    /// assert_eq!(grads.get(&weight).map(|grad| grad.dtype()), Some(DType::F32));
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn compute_dtype(mut self, dtype: DType) -> Self {
        self.compute_dtype = Some(dtype);
        self
    }
}
