//! AdamW, and candle-nn's, beside what PyTorch's makes of the same weights and gradients (scripts/adamw_fixture.py).

use std::collections::HashMap;
use std::path::Path;

use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var, bail, safetensors};
use candle_nn::Optimizer;
use kaio_candle::train::{AdamW, AdamWConfig, Schedule};

use super::inputs::store;
use crate::suites::{Nd, Tally, close};

// As in the script.
const SHAPES: [&[usize]; 4] = [&[], &[3], &[7, 5], &[13, 9]];
const QUARTERED: usize = 2;
const STEPS: u32 = 100;
const RATE: f64 = 0.01;
const BETAS: [f64; 2] = [0.9, 0.95];
const EPS: f64 = 1e-8;
const DECAY: f64 = 0.1;
const CLIP: f64 = 2.0;
const WARM_UP: u64 = 10;

/// lowbias32 (Wellons 2018).
fn mixed(mut x: u32) -> u32 {
    x ^= x >> 16;
    x = x.wrapping_mul(0x7feb_352d);
    x ^= x >> 15;
    x = x.wrapping_mul(0x846c_a68b);
    x ^ (x >> 16)
}

/// The gradient of a variable in a step, or in step 0 its values: numbers that f32 holds.
fn values(step: u32, number: usize) -> Vec<f32> {
    let scale = 0.5f32.powi((step % 4) as i32);
    let hash = |i: usize| mixed((step << 16) | (number << 12 | i) as u32);
    let value = |i| ((hash(i) >> 8) as f32 / (1 << 24) as f32 - 0.25) * scale;
    (0..SHAPES[number].iter().product()).map(value).collect()
}

fn tensors(step: u32, device: &Device) -> Result<Vec<Tensor>> {
    let shapes = SHAPES.iter().enumerate();
    shapes.map(|(i, &shape)| Tensor::from_vec(values(step, i), shape, device)).collect()
}

fn vars(device: &Device) -> Result<Vec<Var>> {
    tensors(0, device)?.iter().map(Var::from_tensor).collect()
}

fn quartered(number: usize) -> f64 {
    if number == QUARTERED { 0.25 } else { 1.0 }
}

/// What PyTorch has after some of the steps.
struct Fixture(HashMap<String, Tensor>);

impl Fixture {
    fn load() -> Result<Self> {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/train");
        safetensors::load(path.join("adamw.safetensors"), &Device::Cpu).map(Self)
    }

    fn has(&self, step: u32) -> bool {
        self.0.contains_key(&format!("{step}.weights.0"))
    }

    /// As far apart as rounding brings two implementations of one formula, whatever the order of their operations: in every
    /// step either rounds what it keeps so many times, and what was `memory` steps ago has no weight any more.
    fn check(
        &self,
        [step, roundings, memory]: [u32; 3],
        what: &str,
        number: usize,
        got: &Tensor,
    ) -> Result<()> {
        let name = format!("{step}.{what}.{number}");
        let Some(want) = self.0.get(&name) else { bail!("no `{name}`") };
        let want = Nd::of(want)?;
        // Half an ulp of the largest value in each, of both.
        let each = want.peak() * f64::from(f32::EPSILON);
        let allowed = f64::from(roundings * step.min(memory)) * each;
        close(&name, got, &want, |_| allowed)
    }
}

/// A weight is rounded after its decay and after its update, which is a small part of it; a moment after each product (of the
/// second one there are three) and the sum, and forgets by its decay.
const WEIGHTS: [u32; 2] = [2, u32::MAX];
const MOMENTS: [(&str, [u32; 2]); 2] = [("exp_avg", [3, 10]), ("exp_avg_sq", [4, 20])];

/// Weights and moments after 1, 10 and 100 steps, with a schedule, groups and clipping.
pub fn beside_torch(device: &Device) {
    let mut tally = Tally::new("adamw beside PyTorch's", device);
    tally.case("ours", || {
        let (fixture, vars) = (Fixture::load()?, vars(device)?);
        let config = AdamWConfig::default()
            .lr(RATE)
            .betas(BETAS[0], BETAS[1])
            .eps(EPS)
            .weight_decay(DECAY)
            .clip_norm(CLIP)
            .schedule(Schedule::cosine(STEPS.into()).warm_up(WARM_UP));
        let named: Vec<_> = (0..).map(|i: usize| i.to_string()).zip(vars.clone()).collect();
        let mut adamw = AdamW::named(named.clone(), config)?
            .decay_where(|_, var| var.rank() >= 2)
            .scale_lr(|name, _| quartered(name.parse().expect("a number")))?;
        for step in 1..=STEPS {
            adamw.step(&store(&named, &tensors(step, device)?))?;
            if !fixture.has(step) {
                continue;
            }
            let state = adamw.state()?;
            for (i, var) in vars.iter().enumerate() {
                fixture.check([step, WEIGHTS[0], WEIGHTS[1]], "weights", i, var)?;
                for (moment, [roundings, memory]) in MOMENTS {
                    let kept = &state[&format!("{i}.{moment}")];
                    fixture.check([step, roundings, memory], moment, i, kept)?;
                }
            }
        }
        Ok(())
    });
    // On the CPU: its operations on a GPU are candle's to test.
    tally.case("candle-nn's", || {
        let (fixture, vars) = (Fixture::load()?, vars(&Device::Cpu)?);
        let schedule = Schedule::cosine(STEPS.into()).warm_up(WARM_UP);
        let adamw = |var: &Var| {
            let params = candle_nn::ParamsAdamW {
                lr: RATE,
                beta1: BETAS[0],
                beta2: BETAS[1],
                eps: EPS,
                weight_decay: if var.rank() >= 2 { DECAY } else { 0.0 },
            };
            candle_nn::AdamW::new(vec![var.clone()], params)
        };
        // One for each: candle's has no groups. It does not clip.
        let mut all = vars.iter().map(adamw).collect::<Result<Vec<_>>>()?;
        for step in 1..=STEPS {
            let grads: Vec<_> = (0..SHAPES.len()).map(|i| values(step, i)).collect();
            let squares = grads.iter().flatten().map(|&x| f64::from(x).powi(2));
            let factor = (CLIP / (squares.sum::<f64>().sqrt() + 1e-6)).min(1.0) as f32;
            for (i, (adamw, grad)) in all.iter_mut().zip(grads).enumerate() {
                let clipped = grad.into_iter().map(|x| x * factor).collect();
                let mut store = GradStore::default();
                store.insert(&vars[i], Tensor::from_vec(clipped, SHAPES[i], &Device::Cpu)?);
                adamw.set_learning_rate(RATE * schedule.factor(step as u64 - 1) * quartered(i));
                adamw.step(&store)?;
                if fixture.has(step) {
                    fixture.check([step, WEIGHTS[0], WEIGHTS[1]], "weights", i, &vars[i])?;
                }
            }
        }
        Ok(())
    });
    tally.finish();
}
