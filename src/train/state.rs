//! What AdamW keeps of a variable, and a step of it.

use candle_core::{DType, Device, Result, Tensor, Var, bail};

use super::in_place::{StorageMut, write, write_f32, write_u8};
use crate::cpu::{self, AdamWFactors};
use crate::kernel::optimizer::Betas;
use crate::kernel::optimizer::dynamic::{BLOCK, Book};
use crate::op::cast;

/// A moment of a variable.
pub(crate) struct Moment {
    /// f32 of the variable's shape; or u8 codes, of which there are whole blocks.
    pub values: Tensor,
    /// The f32 scale of each block of codes.
    pub scales: Option<Tensor>,
}

/// What is kept of a variable. None of these tensors is handed out: steps write to them.
pub(crate) struct Kept {
    /// The f32 weights of a variable in 16 bits.
    pub master: Option<Tensor>,
    pub moments: [Moment; 2],
}

/// A step of a variable, which is not empty.
pub(crate) struct Update<'a> {
    pub var: &'a Var,
    /// Without gaps.
    pub grad: Tensor,
    pub kept: &'a Kept,
    /// The learning rate over the first moment's bias correction.
    pub rate: f32,
    /// What a weight is multiplied with.
    pub keep: f32,
    /// 1 over the root of the second moment's bias correction.
    pub unbias: f32,
}

/// What the variables of a step share.
pub(crate) struct AdamWCall {
    pub betas: Betas,
    /// What gradients are multiplied with, where no factor is on the device.
    pub scale: f32,
    /// A norm and, after it, the factor of the gradients.
    pub clip: Option<Tensor>,
}

/// Tables on a GPU that change seldom.
#[derive(Default)]
pub(crate) struct AdamWTables {
    /// The addresses of what is kept, as they were and where they are.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // For GPUs.
    pub states: Option<(Vec<u64>, Tensor)>,
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // As above.
    pub books: Option<Tensor>,
}

/// A gradient to be added to an f32 sum of its shape, or with which that `begins`.
#[derive(Clone, Copy)]
pub(crate) struct Sum<'a> {
    pub grad: &'a Tensor,
    pub sum: &'a Tensor,
    pub begins: bool,
}

impl Kept {
    /// Before the first step.
    pub fn new(var: &Var, codes: bool) -> Result<Self> {
        let moment = |signed| Moment::zeros(var, codes.then_some(signed));
        let mut kept = Self { master: None, moments: [moment(true)?, moment(false)?] };
        kept.reread(var)?;
        Ok(kept)
    }

    /// Takes the master of what the variable is now.
    pub fn reread(&mut self, var: &Var) -> Result<()> {
        self.master = match var.dtype() {
            DType::F32 => None,
            _ => Some(cast(&var.as_detached_tensor(), DType::F32)?),
        };
        Ok(())
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        let moments = self
            .moments
            .iter()
            .flat_map(|moment| std::iter::once(&moment.values).chain(moment.scales.as_ref()));
        let all = moments.chain(self.master.as_ref());
        all.map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum()
    }
}

impl Moment {
    /// In codes of a book, signed or not, or in f32.
    fn zeros(var: &Var, codes: Option<bool>) -> Result<Self> {
        let device = var.device();
        Ok(match codes {
            None => Self { values: Tensor::zeros(var.shape(), DType::F32, device)?, scales: None },
            Some(signed) => {
                let blocks = var.elem_count().div_ceil(BLOCK as usize);
                let zero = Book::new(signed).zero();
                let values = Tensor::full(zero, blocks * BLOCK as usize, device)?;
                Self { values, scales: Some(Tensor::zeros(blocks, DType::F32, device)?) }
            }
        })
    }
}

impl Moment {
    /// The same with other scales, and other codes up to the last block's end.
    pub fn with_codes(&self, codes: &Tensor, scales: Tensor) -> Result<Self> {
        let rest = self.values.elem_count() - codes.elem_count();
        // Codes past the variable's end mean nothing.
        let values = codes.pad_with_zeros(0, 0, rest)?.force_contiguous()?;
        Ok(Self { values, scales: Some(scales) })
    }
}

/// A step on the CPU.
pub(super) fn step_on_cpu(update: &Update, call: &AdamWCall) -> Result<()> {
    let scale = match &call.clip {
        None => call.scale,
        Some(clip) => clip.get(1)?.to_scalar::<f32>()?,
    };
    let &Update { rate, keep, unbias, .. } = update;
    let factors = AdamWFactors { betas: call.betas, scale, rate, keep, unbias };
    let weights = update.kept.master.as_ref().unwrap_or(update.var);
    cpu::with_floats(&update.grad, |grads| {
        write_f32(weights, |weights| {
            let [first, second] = &update.kept.moments;
            match (&first.scales, &second.scales) {
                (Some(first_scales), Some(second_scales)) => write_u8(&first.values, |first| {
                    write_u8(&second.values, |second| {
                        write_f32(first_scales, |first_scales| {
                            write_f32(second_scales, |second_scales| {
                                let scales = [first_scales, second_scales];
                                cpu::adamw_8bit(weights, grads, [first, second], scales, &factors);
                                Ok(())
                            })
                        })
                    })
                }),
                _ => write_f32(&first.values, |first| {
                    write_f32(&second.values, |second| {
                        cpu::adamw(weights, grads, [first, second], &factors);
                        Ok(())
                    })
                }),
            }
        })
    })??;
    match &update.kept.master {
        Some(master) => round_to(update.var, master),
        None => Ok(()),
    }
}

/// Writes f32 weights to their variable in 16 bits, on the CPU.
fn round_to(var: &Var, master: &Tensor) -> Result<()> {
    let rounded =
        cpu::with_floats(master, |weights| cpu::narrow_to(var.dtype(), weights.to_vec()))??;
    write(var, |storage| match storage {
        StorageMut::Cpu(storage) => {
            *storage = rounded;
            Ok(())
        }
        StorageMut::Cuda(_) => bail!("a CPU tensor was wanted"),
    })
}

/// Adds on the CPU.
pub(super) fn accumulate_on_cpu(&Sum { grad, sum, begins }: &Sum) -> Result<()> {
    cpu::with_floats(grad, |grads| {
        write_f32(sum, |sums| {
            match begins {
                true => sums.copy_from_slice(grads),
                false => cpu::add(sums, grads),
            }
            Ok(())
        })
    })?
}

/// A tensor's elements in memory of their own on the CPU.
pub(super) fn saved(tensor: &Tensor) -> Result<Tensor> {
    match tensor.device() {
        Device::Cpu => tensor.force_contiguous(),
        _ => tensor.to_device(&Device::Cpu),
    }
}
