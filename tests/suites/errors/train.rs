//! The optimizer's and the clipping's.

use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var, bail};
use kaio_candle::Error;
use kaio_candle::train::{AdamW, AdamWConfig, Schedule, clip_grad_norm, grads_complete};

use super::On;
use crate::suites::Tally;

pub fn train(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("training errors", device);
    let var = |dims: &[usize]| Var::zeros(dims, DType::F32, device).expect("zeros");
    let (a, b) = (var(&[2, 3]), var(&[4]));
    let named = || [("layer.a", a.clone()), ("layer.b", b.clone())];
    let new = |config| AdamW::named(named(), config).map(drop);
    let config = AdamWConfig::default;
    let fix = "the defaults are those of `AdamWConfig`";
    let twice = [("w", a.clone()), ("w", b.clone())];
    let shared = [("v", a.clone()), ("w", a.clone())];
    let words = vec![Var::zeros(3, DType::U32, device).expect("zeros")];
    refused! { tally;
        new(config().lr(-1.0)) => Value, "AdamW::new: `lr` is -1, wanted a finite number of at least 0; {fix}";
        new(config().eps(f64::NAN)) => Value, "AdamW::new: `eps` is NaN, wanted a finite number of at least 0; {fix}";
        new(config().betas(0.9, 1.0)) => Value, "AdamW::new: `beta2` is 1, wanted at least 0 and less than 1; {fix}";
        new(config().clip_norm(0.0)) => Value,
            "AdamW::new: `clip_norm` is 0, wanted a finite number greater than 0; {fix}";
        new(config().schedule(Schedule::cosine(9).floor(f64::NAN))) => Value,
            "AdamW::new: `floor` is NaN, wanted a finite number of at least 0; {fix}";
        AdamW::named(twice, config()) => Value,
            "AdamW::new: `vars` is `w` a second time, wanted each once; a variable that layers share is listed once";
        AdamW::named(shared, config()) => Value,
            "AdamW::new: `vars` is `w` a second time, wanted each once; a variable that layers share is listed once";
        AdamW::new(words, config()) => DType,
            "AdamW::new: `vars` is u32, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        AdamW::named(named(), config()).and_then(|adamw| adamw.scale_lr(|_, _| f64::INFINITY)) => Value,
            "AdamW::scale_lr: `factor` is inf, wanted a finite number of at least 0; {fix}";
        clip_grad_norm(&[], &mut GradStore::default(), -1.0) => Value,
            "clip_grad_norm: `max_norm` is -1, wanted a finite number greater than 0; {fix}";
    }

    let mut of_a = GradStore::default();
    of_a.insert(&a, on.f32([2, 3]));
    let mut wrong = GradStore::default();
    wrong.insert(&a, on.f32([2, 3]));
    wrong.insert(&b, on.f32([5]));
    let mut bytes = GradStore::default();
    bytes.insert(&a, on.u8([2, 3]));
    let why = "nothing with a gradient leads from there to the loss: look for `.detach()`, for ops without a backward \
               pass (candle-nn's `LayerNorm`, `RmsNorm` and `softmax_last_dim` are), and for layers that were not used";
    let mut adamw = AdamW::named(named(), config()).expect("an optimizer");
    refused! { tally;
        adamw.step(&of_a) => MissingGradients, "AdamW::step: no gradient for `layer.b`; {why}";
        adamw.accumulate(&GradStore::default()) => MissingGradients,
            "AdamW::accumulate: no gradient for `layer.a`, `layer.b`; {why}";
        grads_complete(named().iter().map(|(name, var)| (name, var)), &of_a) => MissingGradients,
            "grads_complete: no gradient for `layer.b`; {why}";
        adamw.step(&wrong) => Dimension,
            "AdamW::step: `gradient` has a dimension = 5, wanted 4, in [5], as `variable` [4]; expand one with \
             `.broadcast_as(..)?`";
        clip_grad_norm(std::slice::from_ref(&a), &mut bytes, 1.0) => DType,
            "clip_grad_norm: `gradient` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
    }
    tally.case("a refused step changes nothing", || {
        let refused = adamw.step(&of_a).is_err();
        let values = a.flatten_all()?.to_vec1::<f32>()?;
        match refused && adamw.steps() == 0 && values.iter().all(|&x| x == 0.0) {
            true => Ok(()),
            false => bail!("{adamw:?}, {values:?}"),
        }
    });

    let rate = adamw.learning_rate();
    adamw.set_learning_rate(f64::NAN);
    refused! { tally;
        adamw.step(&of_a) => Value, "AdamW::step: `lr` is NaN, wanted a finite number of at least 0; {fix}";
    }
    adamw.set_learning_rate(rate);

    let state = adamw.state().expect("a state");
    let without = |name: &str| {
        let mut state = state.clone();
        state.remove(name).expect("it is there");
        state
    };
    let with = |name: &str, tensor: Tensor| {
        let mut state = state.clone();
        state.insert(name.into(), tensor).expect("it is there");
        state
    };
    let other = "the state is that of another model or of other options";
    let cpu = On(&Device::Cpu);
    let mut set = |state: &HashMap<String, Tensor>| adamw.set_state(state);
    refused! { tally;
        set(&without("layer.b.exp_avg_sq")) => State,
            "AdamW::set_state: `layer.b.exp_avg_sq` is missing, wanted f32 [4]; {other}";
        set(&with("layer.a.exp_avg", cpu.f32([3, 2]))) => State,
            "AdamW::set_state: `layer.a.exp_avg` is f32 [3, 2], wanted f32 [2, 3]; {other}";
        set(&with("layer.a.exp_avg", cpu.f16([2, 3]))) => State,
            "AdamW::set_state: `layer.a.exp_avg` is f16 [2, 3], wanted f32 [2, 3]; {other}";
        set(&with("adamw.steps", Tensor::new(-1i64, &Device::Cpu).expect("a number"))) => State,
            "AdamW::set_state: `adamw.steps` is -1, wanted at least 0; {other}";
    }
    let mut both = GradStore::default();
    both.insert(&a, on.f32([2, 3]));
    both.insert(&b, on.f32([4]));
    adamw.accumulate(&both).expect("gradients");
    refused! { tally;
        adamw.state() => Value,
            "AdamW::state: `sum of gradients` is that of 1 calls of `accumulate`, wanted none; save after a step";
    }
    tally.finish();
}
