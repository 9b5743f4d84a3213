//! candle-nn's AdamW, its schedule, and a state that a checkpoint can hold.
//!
//! [`AdamW`] keeps its moments to itself: they can be neither read nor set. Resuming without them
//! would repeat the rough first steps of a run, so this wrapper reaches them through what is public:
//!
//! * *Read*: the moments are running averages of gradients that pass through here as well, so a
//!   second copy is kept beside them.
//! * *Set*: a step whose betas are 0 or 1 and whose gradient is chosen writes what is wanted into one
//!   moment and leaves the other; see [`Optimizer::set_state`].

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var, bail};
use candle_nn::{AdamW, Optimizer as _, ParamsAdamW};

const MAX_GRADIENT_NORM: f64 = 1.0;
const WARM_UP_STEPS: f64 = 20.0;
/// The learning rate ends at this part of its peak.
const FINAL_RATE: f64 = 0.1;

pub struct Optimizer {
    inner: AdamW,
    params: ParamsAdamW,
    device: Device,
    moments: Vec<Moments>,
    steps_done: usize,
}

struct Moments {
    name: String,
    var: Var,
    first: Tensor,
    second: Tensor,
}

impl Optimizer {
    pub fn new(parameters: &[(String, Var)], peak_rate: f64, device: &Device) -> Result<Self> {
        let params =
            ParamsAdamW { lr: peak_rate, beta2: 0.98, weight_decay: 0.1, ..ParamsAdamW::default() };
        let vars = parameters.iter().map(|(_, var)| var.clone()).collect();
        let moments = parameters.iter().map(|(name, var)| {
            let zeros = var.zeros_like()?;
            Ok(Moments {
                name: name.clone(),
                var: var.clone(),
                first: zeros.clone(),
                second: zeros,
            })
        });
        Ok(Self {
            inner: AdamW::new(vars, params.clone())?,
            moments: moments.collect::<Result<_>>()?,
            params,
            device: device.clone(),
            steps_done: 0,
        })
    }

    /// One step of AdamW against `loss`, with the norm of the whole gradient clipped.
    pub fn backward_step(&mut self, loss: &Tensor, total_steps: usize) -> Result<()> {
        let mut grads = loss.backward()?;
        self.clip(&mut grads)?;
        for Moments { var, first, second, .. } in &mut self.moments {
            // A gradient can hold on to the graph that it was computed from; the moments must not.
            let grad = gradient(&grads, var)?.detach();
            // Written as candle-nn writes it, so that both copies round alike.
            let (beta1, beta2) = (self.params.beta1, self.params.beta2);
            *first = ((&*first * beta1)? + (&grad * (1.0 - beta1))?)?;
            *second = ((&*second * beta2)? + (grad.sqr()? * (1.0 - beta2))?)?;
        }
        self.inner.set_learning_rate(self.params.lr * schedule(self.steps_done, total_steps));
        self.inner.step(&grads)?;
        self.steps_done += 1;
        Ok(())
    }

    /// The moments by name, the second one as its square root: see [`Optimizer::set_state`].
    pub fn state(&self) -> Result<HashMap<String, Tensor>> {
        let mut state = HashMap::new();
        for Moments { name, first, second, .. } in &self.moments {
            state.insert(format!("{name}.adam_first"), first.clone());
            state.insert(format!("{name}.adam_second_root"), second.sqrt()?);
        }
        Ok(state)
    }

    /// Goes on as the optimizer did whose [`Optimizer::state`] this is.
    ///
    /// A gradient enters the second moment as a square, hence the root in the state. Squaring the
    /// root rounds; a run that saves its state therefore sets it as well, so that it and a run
    /// resumed from it stay equal to the last bit.
    pub fn set_state(&mut self, state: &HashMap<String, Tensor>, steps_done: usize) -> Result<()> {
        if steps_done < 2 {
            bail!(
                "AdamW's moments are set by two steps, but the state is that of step {steps_done}"
            )
        }
        let mut roots = self.no_gradients()?;
        let mut firsts = self.no_gradients()?;
        for moments in &mut self.moments {
            let Moments { name, var, .. } = moments;
            let root = saved(state, &format!("{name}.adam_second_root"), var)?;
            moments.first = saved(state, &format!("{name}.adam_first"), var)?.clone();
            moments.second = root.sqr()?;
            roots.insert(var, root.clone());
            firsts.insert(var, moments.first.clone());
        }
        // The first step writes both moments, the second one overwrites the first moment alone: its
        // beta2 rounds to 1 in f32, where 1 itself would make the bias correction divide by zero.
        // A learning rate of zero keeps the weights.
        let vars = self.moments.iter().map(|moments| moments.var.clone()).collect();
        self.inner = AdamW::new(vars, self.params.clone())?;
        for (beta2, grads) in [(0.0, roots), (1.0 - f64::EPSILON, firsts)] {
            self.inner.set_params(ParamsAdamW {
                lr: 0.0,
                beta1: 0.0,
                beta2,
                ..self.params.clone()
            });
            self.inner.step(&grads)?;
        }
        self.inner.set_params(self.params.clone());
        // The bias correction goes by the number of steps; one without gradients only counts.
        let none = self.no_gradients()?;
        for _ in 2..steps_done {
            self.inner.step(&none)?;
        }
        self.steps_done = steps_done;
        Ok(())
    }

    fn no_gradients(&self) -> Result<GradStore> {
        Tensor::zeros((), DType::F32, &self.device)?.backward()
    }

    fn clip(&self, grads: &mut GradStore) -> Result<()> {
        let squares = self.moments.iter().map(|m| gradient(grads, &m.var)?.sqr()?.sum_all());
        let squares = squares.collect::<Result<Vec<_>>>()?;
        let norm = Tensor::stack(&squares, 0)?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
        let scale = MAX_GRADIENT_NORM / f64::from(norm);
        if scale < 1.0 {
            for Moments { var, .. } in &self.moments {
                let clipped = (gradient(grads, var)? * scale)?;
                grads.insert(var, clipped);
            }
        }
        Ok(())
    }
}

fn gradient<'a>(grads: &'a GradStore, var: &Var) -> Result<&'a Tensor> {
    match grads.get(var) {
        Some(grad) => Ok(grad),
        None => bail!("a parameter of shape {:?} got no gradient", var.shape()),
    }
}

fn saved<'a>(state: &'a HashMap<String, Tensor>, name: &str, like: &Var) -> Result<&'a Tensor> {
    match state.get(name) {
        Some(tensor) if tensor.shape() == like.shape() => Ok(tensor),
        _ => bail!("the checkpoint has no {name} of shape {:?}", like.shape()),
    }
}

/// The learning rate at `step` as a part of its peak: a linear warm-up, then half a cosine.
fn schedule(step: usize, total_steps: usize) -> f64 {
    let (step, total) = (step as f64, total_steps as f64);
    if step < WARM_UP_STEPS {
        return (step + 1.0) / WARM_UP_STEPS;
    }
    let progress = (step - WARM_UP_STEPS) / (total - WARM_UP_STEPS).max(1.0);
    FINAL_RATE + (1.0 - FINAL_RATE) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
}
