//! AdamW.

use std::collections::{HashMap, HashSet};
use std::fmt;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Storage, Tensor, Var};

use super::clip::{clip_of, one_device};
use super::gradients::{complete, fit_gradient};
use super::state::{accumulate_on_cpu, saved, step_on_cpu};
use super::{AdamWCall, AdamWConfig, AdamWTables, Moments, Sum, Update, options};
use crate::error::Error;
use crate::kernel::optimizer::Betas;
use crate::train::state::{Kept, Moment};
use crate::{check, cuda};

/// Variables of fewer elements keep their moments in f32: bitsandbytes' `min_8bit_size`.
const LEAST_FOR_CODES: usize = 4096;

/// AdamW ([Loshchilov and Hutter, 2017](https://arxiv.org/abs/1711.05101)): Adam with decoupled weight decay, as PyTorch
/// computes it, in place, on the CPU or in one launch on a GPU.
///
/// In step t, with the gradient g times the clipping factor, learning rate γ and weight decay λ:
///
/// ```text
/// m ← β₁·m + (1 − β₁)·g
/// v ← β₂·v + (1 − β₂)·g²
/// θ ← (1 − γ·λ)·θ − γ / (1 − β₁ᵗ) · m / (√v / √(1 − β₂ᵗ) + ε)
/// ```
///
/// | variable | its dtype | kept here |
/// |---|---|---|
/// | θ | f32 | m, v: 8 bytes an element |
/// | θ | f16, bf16 | m, v and θ in f32: 12 bytes; the variable holds θ rounded |
/// | θ of 4096 elements or more, with [`Moments::Bits8`] | any of them | 2 bytes for m and v, and θ as above |
///
/// Everything is computed in f32, each operation rounded once and in the same order on the CPU and on a GPU: of the same
/// gradients both make the same bits (with the factor of a norm they differ, for that is another sum). Gradients may be of
/// any strides, in f32, f16 or bf16; those with gaps are copied. t counts the steps in which a variable had a gradient.
///
/// It has the methods of candle-nn's trait `Optimizer`, which a program that depends on candle-nn can implement for a
/// type of its own:
///
/// ```
/// use candle_core::{Result, Var, backprop::GradStore};
/// use kaio_candle::train::{AdamW, AdamWConfig};
///
/// struct Fused(AdamW);
///
/// impl candle_nn::Optimizer for Fused {
///     type Config = AdamWConfig;
///     fn new(vars: Vec<Var>, config: AdamWConfig) -> Result<Self> {
///         AdamW::new(vars, config).map(Self)
///     }
///     fn step(&mut self, grads: &GradStore) -> Result<()> {
///         self.0.step(grads)
///     }
///     fn learning_rate(&self) -> f64 {
///         self.0.learning_rate()
///     }
///     fn set_learning_rate(&mut self, lr: f64) {
///         self.0.set_learning_rate(lr);
///     }
/// }
/// # let var = Var::zeros(2, candle_core::DType::F32, &candle_core::Device::Cpu)?;
/// # let loss = var.sum_all()?;
/// # let mut fused = <Fused as candle_nn::Optimizer>::new(vec![var], AdamWConfig::default())?;
/// # candle_nn::Optimizer::backward_step(&mut fused, &loss)?;
/// # Ok::<(), candle_core::Error>(())
/// ```
pub struct AdamW {
    config: AdamWConfig,
    slots: Vec<Slot>,
    device: Device,
    steps: u64,
    /// Calls of `accumulate` since the last step.
    pending: u64,
    clip: Option<Tensor>,
    /// Of moments in f32, and of those in codes.
    tables: [AdamWTables; 2],
}

/// A variable.
struct Slot {
    name: String,
    var: Var,
    kept: Kept,
    /// Steps in which it had a gradient.
    steps: u64,
    /// Whether its weights decay.
    decays: bool,
    /// What the learning rate is multiplied with.
    rate: f64,
    /// The sum of gradients, once there was one.
    sum: Option<Tensor>,
    /// Whether the sum has gradients since the last step.
    summed: bool,
}

impl fmt::Debug for AdamW {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let Self { config, slots, device, steps, pending, .. } = self;
        let mut show = f.debug_struct("AdamW");
        show.field("config", config).field("variables", &slots.len());
        show.field("device", &device.location()).field("steps", steps).field("pending", pending);
        show.finish()
    }
}

impl AdamW {
    /// An optimizer of variables that are called by their numbers, `0`, `1` and so on.
    ///
    /// # Errors
    ///
    /// Those of [`named`](Self::named).
    pub fn new(vars: Vec<Var>, config: AdamWConfig) -> Result<Self> {
        Self::named(vars.into_iter().enumerate().map(|(i, var)| (i.to_string(), var)), config)
    }

    /// An optimizer of variables by their names, which its state and its errors use.
    ///
    /// Variables in 16 bits are read here: load weights before, or call [`reread`](Self::reread) after it.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] for a number out of range, and for a name or a variable that comes twice; [`Error::DType`] for a
    /// variable that is not in f32, f16 or bf16; [`Error::Device`] for variables on several devices (each takes an
    /// optimizer of its own).
    pub fn named<N: Into<String>>(
        vars: impl IntoIterator<Item = (N, Var)>,
        config: AdamWConfig,
    ) -> Result<Self> {
        const OP: &str = "AdamW::new";
        config.check(OP)?;
        let vars: Vec<(String, Var)> = vars.into_iter().map(|(n, var)| (n.into(), var)).collect();
        one_device(OP, vars.iter().map(|(_, var)| ("vars", var.as_tensor())))?;
        let (mut names, mut ids) = (HashSet::new(), HashSet::new());
        for (name, var) in &vars {
            check::dtype(OP, ("vars", var), &check::FLOATS)?;
            if !names.insert(name) || !ids.insert(var.id()) {
                let (got, want) = (format!("`{name}` a second time"), "each once".to_owned());
                let fix = "a variable that layers share is listed once";
                return Err(Error::Value { op: OP, name: "vars", got, want, fix }.into());
            }
        }
        let device = vars.first().map_or(Device::Cpu, |(_, var)| var.device().clone());
        let slot = |(name, var): (String, Var)| {
            let codes = config.moments == Moments::Bits8 && var.elem_count() >= LEAST_FOR_CODES;
            let kept = Kept::new(&var, codes)?;
            let (sum, summed) = (None, false);
            Ok(Slot { name, var, kept, steps: 0, decays: true, rate: 1.0, sum, summed })
        };
        let slots = vars.into_iter().map(slot).collect::<Result<_>>()?;
        let tables = Default::default();
        Ok(Self { config, slots, device, steps: 0, pending: 0, clip: None, tables })
    }

    /// Lets the weights of those variables decay of which `decays` is true, by name and variable, and no others. Usually
    /// matrices do, and biases and the weights of norms do not: `|_, var| var.rank() >= 2`.
    pub fn decay_where(mut self, decays: impl Fn(&str, &Var) -> bool) -> Self {
        self.slots.iter_mut().for_each(|slot| slot.decays = decays(&slot.name, &slot.var));
        self
    }

    /// Multiplies the learning rate of each variable with a factor, by name and variable: smaller for what was trained
    /// before, say. With 0 a variable stays as it is.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] for a factor that is not a finite number of at least 0.
    pub fn scale_lr(mut self, factor: impl Fn(&str, &Var) -> f64) -> Result<Self> {
        for slot in &mut self.slots {
            slot.rate = factor(&slot.name, &slot.var);
            options::at_least_0("AdamW::scale_lr", "factor", slot.rate)?;
        }
        Ok(self)
    }

    /// The options.
    pub fn config(&self) -> &AdamWConfig {
        &self.config
    }

    /// The learning rate of the next step.
    pub fn learning_rate(&self) -> f64 {
        self.config.lr * self.config.schedule.factor(self.steps)
    }

    /// Sets the learning rate or, with a schedule, its peak: a finite number of at least 0, without which the next
    /// [`step`](Self::step) is an error.
    pub fn set_learning_rate(&mut self, lr: f64) {
        self.config.lr = lr;
    }

    /// Steps done.
    pub fn steps(&self) -> u64 {
        self.steps
    }

    /// The norm of all gradients in the last step, before it was clipped: f32 `[]`, on the device. `None` without
    /// [`clip_norm`](AdamWConfig::clip_norm) and before the first step.
    pub fn grad_norm(&self) -> Option<Tensor> {
        self.clip.as_ref().and_then(|clip| clip.get(0).ok())
    }

    /// Bytes of what is kept besides the variables: masters, moments, sums of gradients.
    pub fn bytes(&self) -> usize {
        let sums = self.slots.iter().flat_map(|slot| &slot.sum);
        let sums: usize = sums.map(|sum| sum.elem_count() * size_of::<f32>()).sum();
        sums + self.slots.iter().map(|slot| slot.kept.bytes()).sum::<usize>()
    }

    /// A backward pass, the last one through the blocks of the loss's graph as
    /// [`train::backward`](super::backward) makes it, and a step.
    ///
    /// # Errors
    ///
    /// Those of [`train::backward`](super::backward) and [`step`](Self::step).
    pub fn backward_step(&mut self, loss: &Tensor) -> Result<()> {
        self.step(&super::backward(loss)?)
    }

    /// A step against the gradients or, after calls of [`accumulate`](Self::accumulate), against the mean of theirs and
    /// these.
    ///
    /// # Errors
    ///
    /// [`Error::MissingGradients`] names the variables without a gradient, unless
    /// [`skip_missing`](AdamWConfig::skip_missing) leaves them as they are; [`Error::DType`], [`Error::Dimension`] and
    /// [`Error::Device`] for gradients that are not their variables'; [`Error::Value`] for a learning rate that was set
    /// out of range. Nothing has changed then.
    pub fn step(&mut self, grads: &GradStore) -> Result<()> {
        const OP: &str = "AdamW::step";
        options::at_least_0(OP, "lr", self.config.lr)?;
        let mut grads = self.gather(OP, grads)?;
        let mut scale = 1.0;
        if self.pending > 0 {
            self.add(OP, &grads)?;
            scale = 1.0 / self.pending as f64;
            grads =
                self.slots.iter().map(|slot| slot.sum.clone().filter(|_| slot.summed)).collect();
        }
        if let Some(max_norm) = self.config.clip_norm {
            let of_all = grads.iter().flatten().filter(|grad| grad.elem_count() > 0);
            let of_all: Vec<_> = of_all.collect();
            self.clip = Some(clip_of(OP, &of_all, &self.device, scale, max_norm)?);
        }
        let config = &self.config;
        let clip = self.clip.clone().filter(|_| config.clip_norm.is_some());
        let [first, second] =
            [config.beta1, config.beta2].map(|beta| [beta as f32, (1.0 - beta) as f32]);
        let betas = Betas { first, second, epsilon: config.eps as f32 };
        let call = AdamWCall { betas, scale: scale as f32, clip };

        let lr = self.learning_rate();
        let mut updates = [vec![], vec![]];
        for (slot, grad) in self.slots.iter().zip(&grads) {
            let Some(grad) = grad.clone().filter(|grad| grad.elem_count() > 0) else { continue };
            let bias = |beta: f64| 1.0 - beta.powf((slot.steps + 1) as f64);
            let decay = if slot.decays { config.weight_decay } else { 0.0 };
            let Slot { var, kept, .. } = slot;
            updates[usize::from(kept.moments[0].scales.is_some())].push(Update {
                var,
                grad,
                kept,
                rate: (lr * slot.rate / bias(config.beta1)) as f32,
                keep: (1.0 - lr * slot.rate * decay) as f32,
                unbias: bias(config.beta2).sqrt().recip() as f32,
            });
        }
        for (updates, tables) in updates.iter().zip(&mut self.tables) {
            match self.device {
                _ if updates.is_empty() => {}
                Device::Cpu => {
                    updates.iter().try_for_each(|update| step_on_cpu(update, &call))?;
                }
                _ => cuda::adamw(OP, updates, &call, tables)?,
            }
        }
        for (slot, grad) in self.slots.iter_mut().zip(&grads) {
            slot.steps += u64::from(grad.is_some());
            slot.summed = false;
        }
        (self.steps, self.pending) = (self.steps + 1, 0);
        Ok(())
    }

    /// Keeps gradients for the next [`step`](Self::step), which takes the mean of all that came since the last one: the
    /// gradient of the mean loss of as many micro-batches of one size. The sums are in f32, 4 bytes an element, from the
    /// first call on.
    ///
    /// With [`skip_missing`](AdamWConfig::skip_missing) a variable without a gradient in some of the calls has 0 in them.
    ///
    /// ```
    /// use candle_core::{DType, Device, Var};
    /// use kaio_candle::train::{AdamW, AdamWConfig};
    ///
    /// let var = Var::ones(3, DType::F32, &Device::Cpu)?;
    /// let mut adamw = AdamW::new(vec![var.clone()], AdamWConfig::default())?;
    /// for micro_batch in 0..4 {
    ///     let grads = var.sqr()?.sum_all()?.backward()?;
    ///     if micro_batch < 3 { adamw.accumulate(&grads)? } else { adamw.step(&grads)? }
    /// }
    /// assert_eq!(adamw.steps(), 1);
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// Those of [`step`](Self::step).
    pub fn accumulate(&mut self, grads: &GradStore) -> Result<()> {
        const OP: &str = "AdamW::accumulate";
        let grads = self.gather(OP, grads)?;
        self.add(OP, &grads)
    }

    fn add(&mut self, op: &'static str, grads: &[Option<Tensor>]) -> Result<()> {
        for (slot, grad) in self.slots.iter_mut().zip(grads) {
            if slot.sum.is_none() && grad.is_some() {
                slot.sum = Some(Tensor::zeros(slot.var.shape(), DType::F32, &self.device)?);
            }
        }
        let sums = self.slots.iter().zip(grads).filter_map(|(slot, grad)| {
            let sum = Sum { grad: grad.as_ref()?, sum: slot.sum.as_ref()?, begins: !slot.summed };
            Some(sum).filter(|sum| sum.grad.elem_count() > 0)
        });
        let sums: Vec<_> = sums.collect();
        match self.device {
            _ if sums.is_empty() => {}
            Device::Cpu => sums.iter().try_for_each(accumulate_on_cpu)?,
            _ => cuda::accumulate(op, &sums)?,
        }
        for (slot, grad) in self.slots.iter_mut().zip(grads) {
            slot.summed |= grad.is_some();
        }
        self.pending += 1;
        Ok(())
    }

    /// The variables' gradients, as the passes over them read these.
    fn gather(&self, op: &'static str, grads: &GradStore) -> Result<Vec<Option<Tensor>>> {
        let written: HashSet<_> = self.slots.iter().map(|slot| place(&slot.var)).collect();
        let of = |slot: &Slot| {
            let Some(grad) = grads.get(&slot.var) else { return Ok(None) };
            let grad = fit_gradient(op, &slot.var, grad)?;
            // One that is a view of a variable would change while it is read.
            let shared = written.contains(&place(&grad));
            if shared { grad.force_contiguous().map(Some) } else { Ok(Some(grad)) }
        };
        let found = self.slots.iter().map(of).collect::<Result<Vec<_>>>()?;
        if !self.config.skip_missing {
            let missing = self.slots.iter().zip(&found).filter(|(_, grad)| grad.is_none());
            complete(op, missing.map(|(slot, _)| slot.name.clone()).collect())?;
        }
        Ok(found)
    }

    /// Reads variables in 16 bits anew, after something else wrote to them: a step would undo that.
    ///
    /// # Errors
    ///
    /// candle's, where memory is short.
    pub fn reread(&mut self) -> Result<()> {
        for slot in &mut self.slots {
            slot.kept.reread(&slot.var)?;
        }
        Ok(())
    }

    /// All that a resumed run needs besides the variables and the options, on the CPU, as `safetensors::save` takes it:
    ///
    /// | name | shape | dtype | |
    /// |---|---|---|---|
    /// | `adamw.steps` | `[]` | i64 | steps done |
    /// | `{name}.step` | `[]` | i64 | those in which the variable had a gradient |
    /// | `{name}.exp_avg` | the variable's | f32, u8 | the first moment |
    /// | `{name}.exp_avg_sq` | the variable's | f32 | the second moment |
    /// | `{name}.exp_avg_sq_root` | the variable's | u8 | or the codes of its root |
    /// | `{name}.exp_avg.scales`, `{name}.exp_avg_sq_root.scales` | `[⌈elements / 256⌉]` | f32 | the scales of codes |
    /// | `{name}.master` | the variable's | f32 | the weights of a variable in 16 bits |
    ///
    /// A run that goes on from it has the same bits as one that was not interrupted.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] between [`accumulate`](Self::accumulate) and [`step`](Self::step): sums are no part of it.
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        const OP: &str = "AdamW::state";
        if self.pending > 0 {
            let got = format!("that of {} calls of `accumulate`", self.pending);
            let (want, fix) = ("none".to_owned(), "save after a step");
            return Err(Error::Value { op: OP, name: "sum of gradients", got, want, fix }.into());
        }
        let count = |steps: u64| Tensor::new(steps as i64, &Device::Cpu);
        let mut state = HashMap::from([(STEPS.to_owned(), count(self.steps)?)]);
        for Slot { name, var, kept, steps, .. } in &self.slots {
            state.insert(format!("{name}.step"), count(*steps)?);
            if let Some(master) = &kept.master {
                state.insert(format!("{name}.master"), saved(master)?);
            }
            for (moment, of) in kept.moments.iter().zip(moment_names(kept)) {
                let values = moment.values.flatten_all()?.narrow(0, 0, var.elem_count())?;
                state.insert(format!("{name}.{of}"), saved(&values)?.reshape(var.shape())?);
                if let Some(scales) = &moment.scales {
                    state.insert(format!("{name}.{of}.scales"), saved(scales)?);
                }
            }
        }
        Ok(state)
    }

    /// Goes on as the optimizer did whose [`state`](Self::state) this is; tensors of other names are ignored. Load the
    /// variables as well.
    ///
    /// # Errors
    ///
    /// [`Error::State`] names the first tensor that is missing or of another dtype or shape. Nothing has changed then.
    pub fn set_state(&mut self, state: &HashMap<String, Tensor>) -> Result<()> {
        let steps = steps_of(state, STEPS)?;
        let read = |slot: &Slot| {
            let Slot { name, var, kept, .. } = slot;
            let like = |of: &str, like: &Tensor, shape: &[usize]| {
                tensor_of(state, &format!("{name}.{of}"), like.dtype(), shape)?
                    .to_device(&self.device)
            };
            let moment = |moment: &Moment, of: &str| {
                let flat = like(of, &moment.values, var.dims())?.flatten_all()?;
                Ok::<_, candle_core::Error>(match &moment.scales {
                    None => Moment {
                        values: flat.reshape(var.shape())?.force_contiguous()?,
                        scales: None,
                    },
                    Some(scales) => {
                        let loaded = like(&format!("{of}.scales"), scales, scales.dims())?;
                        moment.with_codes(&flat, loaded.force_contiguous()?)?
                    }
                })
            };
            let [first, second] = moment_names(kept);
            let moments = [moment(&kept.moments[0], first)?, moment(&kept.moments[1], second)?];
            let master = kept.master.as_ref();
            let master =
                master.map(|master| like("master", master, var.dims())?.force_contiguous());
            let kept = Kept { master: master.transpose()?, moments };
            Ok((kept, steps_of(state, &format!("{name}.step"))?))
        };
        let read = self.slots.iter().map(read).collect::<Result<Vec<_>>>()?;
        for (slot, (kept, steps)) in self.slots.iter_mut().zip(read) {
            (slot.kept, slot.steps, slot.summed) = (kept, steps, false);
        }
        (self.steps, self.pending) = (steps, 0);
        Ok(())
    }
}

/// Where a tensor's storage is: one place for all tensors that share it.
fn place(tensor: &Tensor) -> *const Storage {
    &raw const *tensor.storage_and_layout().0
}

/// The name of the number of steps in a state.
const STEPS: &str = "adamw.steps";

/// What the moments are called in a state.
fn moment_names(kept: &Kept) -> [&'static str; 2] {
    match kept.moments[1].scales {
        None => ["exp_avg", "exp_avg_sq"],
        Some(_) => ["exp_avg", "exp_avg_sq_root"],
    }
}

fn tensor_of<'a>(
    state: &'a HashMap<String, Tensor>,
    name: &str,
    dtype: DType,
    shape: &[usize],
) -> Result<&'a Tensor> {
    let show = |dtype: DType, shape: &[usize]| format!("{} {shape:?}", dtype.as_str());
    let got = match state.get(name) {
        Some(tensor) if tensor.dtype() == dtype && tensor.dims() == shape => return Ok(tensor),
        Some(tensor) => show(tensor.dtype(), tensor.dims()),
        None => "missing".into(),
    };
    let (name, want) = (name.to_owned(), show(dtype, shape));
    Err(Error::State { op: "AdamW::set_state", name, got, want }.into())
}

fn steps_of(state: &HashMap<String, Tensor>, name: &str) -> Result<u64> {
    let steps = tensor_of(state, name, DType::I64, &[])?.to_scalar::<i64>()?;
    u64::try_from(steps).map_err(|_| {
        let (name, got, want) = (name.to_owned(), steps.to_string(), "at least 0".to_owned());
        Error::State { op: "AdamW::set_state", name, got, want }.into()
    })
}
