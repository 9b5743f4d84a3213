//! AdamW beside its formula in f64, beside candle-nn's, and the same on all devices.

use candle_core::DType::{self, BF16, F16, F32, F64};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var, bail};
use candle_nn::Optimizer;
use kaio_candle::train::{AdamW, AdamWConfig, Moments, Schedule};

use super::inputs::{all_on_cpu, gradients, on_cpu, store, vars};
use crate::suites::Layout::{Columns, Narrowed, Plain, Repeated, Transposed};
use crate::suites::{Nd, Source, Tally, close, identical, ulp};

const LR: f64 = 0.01;
const DECAY: f64 = 0.1;
const STEPS: usize = 100;

fn config() -> AdamWConfig {
    AdamWConfig::default().lr(LR).betas(0.9, 0.95).weight_decay(DECAY)
}

/// A variable under the formula in f64.
struct Reference {
    dims: Vec<usize>,
    weights: Vec<f64>,
    moments: [Vec<f64>; 2],
    steps: i32,
}

impl Reference {
    fn new(var: &Var) -> Result<Self> {
        let Nd { dims, data: weights } = Nd::of(var)?;
        let zeros = vec![0.0; weights.len()];
        Ok(Self { dims, weights, moments: [zeros.clone(), zeros], steps: 0 })
    }

    fn step(&mut self, grads: &[f64], lr: f64, decay: f64) {
        let (beta1, beta2, eps) = (0.9, 0.95, 1e-8);
        self.steps += 1;
        let [m, v] = &mut self.moments;
        for (i, g) in grads.iter().enumerate() {
            m[i] = beta1 * m[i] + (1.0 - beta1) * g;
            v[i] = beta2 * v[i] + (1.0 - beta2) * g * g;
            let m_hat = m[i] / (1.0 - f64::powi(beta1, self.steps));
            let v_hat = v[i] / (1.0 - f64::powi(beta2, self.steps));
            self.weights[i] -= lr * (m_hat / (v_hat.sqrt() + eps) + decay * self.weights[i]);
        }
    }

    fn nd(&self) -> Nd {
        Nd { dims: self.dims.clone(), data: self.weights.clone() }
    }
}

/// All steps beside the formula and candle-nn's optimizer, and the same bits as on the CPU.
pub fn formula(device: &Device) {
    let mut tally = Tally::new("adamw formula", device);
    tally.case("100 steps", || {
        let source = &mut Source::new("adamw formula", device);
        let ours = vars(source, F32)?;
        let (cpu, plain) = (on_cpu(&ours)?, on_cpu(&ours)?);
        let mut references =
            plain.iter().map(|(_, var)| Reference::new(var)).collect::<Result<Vec<_>>>()?;
        let mut adamw = AdamW::named(ours.clone(), config())?;
        let mut adamw_of_cpu = AdamW::named(cpu.clone(), config())?;
        let params = candle_nn::ParamsAdamW {
            lr: LR,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: DECAY,
        };
        // candle's optimizer fails on variables without elements.
        let filled = plain.iter().filter(|(_, var)| var.elem_count() > 0);
        let of_candle = filled.map(|(_, var)| var.clone()).collect();
        let mut of_candle = candle_nn::AdamW::new(of_candle, params)?;
        for _ in 0..STEPS {
            let grads = gradients(source, F32)?;
            adamw.step(&store(&ours, &grads))?;
            let grads = all_on_cpu(&grads)?;
            adamw_of_cpu.step(&store(&cpu, &grads))?;
            of_candle.step(&store(&plain, &grads))?;
            for (reference, grad) in references.iter_mut().zip(&grads) {
                reference.step(&Nd::of(grad)?.data, LR, DECAY);
            }
        }
        for (i, reference) in references.iter().enumerate() {
            let want = reference.nd();
            let allowed = 2.0 * want.max_error(&plain[i].1)? + ulp(F32, want.peak());
            close(&format!("variable {i}"), &ours[i].1, &want, |_| allowed)?;
            identical(&format!("variable {i}"), &ours[i].1, &Nd::of(&cpu[i].1)?)?;
        }
        if adamw.steps() != STEPS as u64 {
            bail!("{} steps", adamw.steps());
        }
        Ok(())
    });
    tally.finish();
}

/// Decay, learning rates and schedules of each variable, and variables without a gradient.
pub fn options(device: &Device) {
    let mut tally = Tally::new("adamw options", device);
    let schedule = Schedule::cosine(8).warm_up(3).floor(0.1);
    for skipped in [None, Some(2)] {
        tally.case(format!("without a gradient: {skipped:?}"), || {
            let source = &mut Source::new("adamw options", device);
            let vars = vars(source, F32)?;
            let mut references =
                vars.iter().map(|(_, var)| Reference::new(var)).collect::<Result<Vec<_>>>()?;
            let config = config().schedule(schedule).skip_missing(skipped.is_some());
            let mut adamw = AdamW::named(vars.clone(), config)?
                .decay_where(|_, var| var.rank() >= 2)
                .scale_lr(|name, _| if name == "3" { 0.25 } else { 1.0 })?;
            for step in 0..10 {
                let rate = LR * schedule.factor(step as u64);
                if adamw.learning_rate() != rate {
                    bail!("{} in step {step}, wanted {rate}", adamw.learning_rate());
                }
                let grads = gradients(source, F32)?;
                let mut given = store(&vars, &grads);
                // In every third step.
                let left_out = skipped.filter(|_| step % 3 == 1);
                if let Some(i) = left_out {
                    given.remove(&vars[i].1);
                }
                adamw.step(&given)?;
                for (i, (reference, grad)) in references.iter_mut().zip(&grads).enumerate() {
                    let rate = if i == 3 { rate * 0.25 } else { rate };
                    let decay = if reference.dims.len() >= 2 { DECAY } else { 0.0 };
                    if left_out != Some(i) {
                        reference.step(&Nd::of(grad)?.data, rate, decay);
                    }
                }
            }
            for ((name, var), reference) in vars.iter().zip(&references) {
                // Ten steps of a rate of at most 0.01: of what a step subtracts a few ulps are lost.
                let want = reference.nd();
                close(name, var, &want, |_| 10.0 * ulp(F32, want.peak()))?;
            }
            Ok(())
        });
    }
    tally.finish();
}

/// Variables and gradients in 16 bits: the f32 weights behind them are those of f32 variables, and they their roundings.
pub fn sixteen_bits(device: &Device) {
    let mut tally = Tally::new("adamw in 16 bits", device);
    for (dtype, of_grads) in [(BF16, BF16), (F16, F16), (BF16, F32), (F32, F16)] {
        let case = format!("{dtype:?}, gradients {of_grads:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let narrow = vars(source, dtype)?;
            let widen = |(name, var): &(String, Var)| {
                let wide = var.as_detached_tensor().to_device(&Device::Cpu)?.to_dtype(F32)?;
                Ok((name.clone(), Var::from_tensor(&wide)?))
            };
            let wide = narrow.iter().map(widen).collect::<Result<Vec<_>>>()?;
            let mut of_narrow = AdamW::named(narrow.clone(), config())?;
            let mut of_wide = AdamW::named(wide.clone(), config())?;
            for _ in 0..5 {
                let grads = gradients(source, of_grads)?;
                of_narrow.step(&store(&narrow, &grads))?;
                let grads = all_on_cpu(&grads)?;
                let grads = grads.iter().map(|g| g.to_dtype(F32)).collect::<Result<Vec<_>>>()?;
                of_wide.step(&store(&wide, &grads))?;
            }
            let state = of_narrow.state()?;
            for ((name, narrow), (_, wide)) in narrow.iter().zip(&wide) {
                let want = Nd::of(wide)?;
                if let Some(master) = state.get(&format!("{name}.master")) {
                    identical(&format!("master of {name}"), master, &want)?;
                }
                identical(
                    name,
                    narrow,
                    &Nd::of(&want.tensor(F64)?.to_dtype(F32)?.to_dtype(dtype)?)?,
                )?;
            }
            Ok(())
        });
    }
    tally.case("what was written by others", || {
        let var = Var::zeros(5000, BF16, device)?;
        let mut adamw = AdamW::new(vec![var.clone()], config().weight_decay(0.0))?;
        var.set(&Tensor::full(2f32, 5000, &Device::Cpu)?.to_dtype(BF16)?.to_device(device)?)?;
        adamw.reread()?;
        let mut grads = GradStore::default();
        grads.insert(&var, Tensor::full(1f32, 5000, &Device::Cpu)?.to_device(device)?);
        adamw.step(&grads)?;
        // A first step is as long as the learning rate: 1.99, which is not one of bf16.
        identical("weights", &var, &Nd::full(&[5000], 1.9921875))
    });
    tally.finish();
}

/// Gradients that are views: of any strides, at any address, of the variable itself.
pub fn layouts(device: &Device) {
    let mut tally = Tally::new("adamw layouts", device);
    for layout in [Transposed, Narrowed, Columns, Repeated] {
        for dtype in [F32, BF16] {
            let case = format!("{layout:?} {dtype:?}");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let dims = [130, 131];
                let var = Var::from_tensor(&source.tensor(F32, &dims, Plain)?)?;
                let view = source.tensor(dtype, &dims, layout)?;
                same_as_plain(&var, &view, device)
            });
        }
    }
    for offset in [1, 4] {
        tally.case(format!("from element {offset} on"), || {
            let source = &mut Source::new("offset", device);
            let var = Var::from_tensor(&source.tensor(F32, &[16_400], Plain)?)?;
            let view = source.tensor(F32, &[16_410], Plain)?.narrow(0, offset, 16_400)?;
            same_as_plain(&var, &view, device)
        });
    }
    tally.case("the variable itself", || {
        let source = &mut Source::new("itself", device);
        let var = Var::from_tensor(&source.tensor(F32, &[40, 30], Plain)?)?;
        same_as_plain(&var, &var.as_detached_tensor(), device)
    });
    tally.finish();
}

/// A step with a view gives the bits of one with its elements.
fn same_as_plain(var: &Var, view: &Tensor, device: &Device) -> Result<()> {
    let packed = Nd::of(view)?.tensor(F32)?.to_device(device)?;
    let copy = Var::from_tensor(&Nd::of(var)?.tensor(F32)?.to_device(device)?)?;
    for (var, grad) in [(var, view), (&copy, &packed)] {
        let mut grads = GradStore::default();
        grads.insert(var, grad.clone());
        AdamW::new(vec![var.clone()], config())?.step(&grads)?;
    }
    identical("weights", var, &Nd::of(&copy)?)
}

/// Gradients of micro-batches: their mean, in f32.
pub fn accumulation(device: &Device) {
    let mut tally = Tally::new("adamw accumulation", device);
    for dtype in [F32, BF16] {
        let case = format!("{dtype:?}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let vars = vars(source, F32)?;
            let mut references =
                vars.iter().map(|(_, var)| Reference::new(var)).collect::<Result<Vec<_>>>()?;
            let mut adamw = AdamW::named(vars.clone(), config().skip_missing(true))?;
            // Steps of 3, 1 and 2 micro-batches.
            for calls in [3, 1, 2] {
                let mut sums: Vec<_> =
                    references.iter().map(|r| vec![0.0; r.weights.len()]).collect();
                for call in 0..calls {
                    let grads = gradients(source, dtype)?;
                    let mut given = store(&vars, &grads);
                    // Not in the first call, but in a later one.
                    let absent = calls == 2 && call == 0;
                    if absent {
                        given.remove(&vars[2].1);
                    }
                    match call + 1 < calls {
                        true => adamw.accumulate(&given)?,
                        false => adamw.step(&given)?,
                    }
                    for (i, (sums, grad)) in sums.iter_mut().zip(&grads).enumerate() {
                        if !(absent && i == 2) {
                            let grad = Nd::of(grad)?.data;
                            sums.iter_mut()
                                .zip(grad)
                                .for_each(|(sum, x)| *sum += x / f64::from(calls));
                        }
                    }
                }
                for (reference, sums) in references.iter_mut().zip(&sums) {
                    reference.step(sums, LR, DECAY);
                }
            }
            if adamw.steps() != 3 {
                bail!("{} steps", adamw.steps());
            }
            for ((name, var), reference) in vars.iter().zip(&references) {
                // A sum may cancel to a few of its digits, of which a step of the rate's length is made.
                let want = reference.nd();
                close(name, var, &want, |_| LR * 1e-3 + 3.0 * ulp(F32, want.peak()))?;
            }
            Ok(())
        });
    }
    tally.finish();
}

/// Moments in codes: each is near what it stands for, runs end where those in f32 do, and all devices make the same bits.
pub fn moments_in_8_bits(device: &Device) {
    let mut tally = Tally::new("adamw in 8 bits", device);
    let config = config().moments(Moments::Bits8);
    tally.case("a step", || {
        let source = &mut Source::new("8 bits", device);
        let vars = vars(source, F32)?;
        let mut adamw = AdamW::named(vars.clone(), config.clone())?;
        let grads = gradients(source, F32)?;
        adamw.step(&store(&vars, &grads))?;
        let state = adamw.state()?;
        let mut coded = 0;
        for ((name, _), grad) in vars.iter().zip(&grads) {
            let grad = Nd::of(grad)?.data;
            for (moment, signed, part) in
                [("exp_avg", true, 0.1), ("exp_avg_sq_root", false, 0.05f64.sqrt())]
            {
                let Some(codes) = state.get(&format!("{name}.{moment}")) else { continue };
                if codes.dtype() != DType::U8 {
                    continue;
                }
                let codes = codes.flatten_all()?.to_vec1::<u8>()?;
                let scales = state[&format!("{name}.{moment}.scales")].to_vec1::<f32>()?;
                coded += 1;
                for (i, g) in grad.iter().enumerate() {
                    let value = if signed { g * part } else { g.abs() * part };
                    let scale = f64::from(scales[i / 256]);
                    let got = scale * map(signed)[usize::from(codes[i])];
                    // A decade's steps are at most 0.9 of it over as many as there are in it; half of one, and what a
                    // decade's end adds.
                    let worst = if signed { 0.0071 } else { 0.0036 };
                    let near = worst * scale + 1e-6 * scale;
                    let relative = 0.5 * value.abs();
                    if (got - value).abs() > near || (got - value).abs() > relative + 1e-6 * scale {
                        bail!("{moment} {i} of {name} is {got}, wanted {value} of {scale}");
                    }
                }
            }
        }
        if coded != 4 {
            bail!("{coded} moments in codes");
        }
        Ok(())
    });
    for dtype in [F32, BF16] {
        tally.case(format!("{dtype:?}: the same bits as on the CPU"), || {
            let source = &mut Source::new("8 bits on the CPU", device);
            let ours = vars(source, dtype)?;
            let cpu = on_cpu(&ours)?;
            let mut adamw = AdamW::named(ours.clone(), config.clone())?;
            let mut of_cpu = AdamW::named(cpu.clone(), config.clone())?;
            for _ in 0..4 {
                let grads = gradients(source, dtype)?;
                adamw.step(&store(&ours, &grads))?;
                of_cpu.step(&store(&cpu, &all_on_cpu(&grads)?))?;
            }
            let (state, of_cpu) = (adamw.state()?, of_cpu.state()?);
            for (name, want) in &of_cpu {
                identical(name, &state[name], &Nd::of(want)?)?;
            }
            for ((name, var), (_, cpu)) in ours.iter().zip(&cpu) {
                identical(name, var, &Nd::of(cpu)?)?;
            }
            Ok(())
        });
    }
    tally.case("moments below the smallest normal number", || {
        let source = &mut Source::new("8 bits of little", device);
        let var = Var::from_tensor(&source.tensor(F32, &[5000], Plain)?)?;
        let grad = source.tensor_of(F32, &[5000], Plain, |s| 1e-38 * s.unit())?;
        let ours = vec![("0".to_owned(), var)];
        let cpu = on_cpu(&ours)?;
        let states = [(ours, grad.clone()), (cpu, grad.to_device(&Device::Cpu)?)];
        let [state, of_cpu] = states.map(|(vars, grad)| {
            let mut adamw = AdamW::named(vars.clone(), config.clone())?;
            adamw.step(&store(&vars, &[grad]))?;
            adamw.state()
        });
        let (state, of_cpu) = (state?, of_cpu?);
        for (name, want) in &of_cpu {
            identical(name, &state[name], &Nd::of(want)?)?;
        }
        let scales = state["0.exp_avg.scales"].to_vec1::<f32>()?;
        let codes = state["0.exp_avg"].to_vec1::<u8>()?;
        match scales.iter().all(|&scale| scale == f32::MIN_POSITIVE) {
            true if codes.iter().any(|&code| code > 128) => Ok(()),
            _ => bail!("scales {scales:?}"),
        }
    });
    tally.case("60 steps down a bowl", || {
        let source = &mut Source::new("bowl", device);
        let start = source.tensor(F32, &[64, 80], Plain)?;
        let distance = |moments| {
            let var = Var::from_tensor(&start)?;
            let config = config.clone().weight_decay(0.0).lr(0.03).moments(moments);
            let mut adamw = AdamW::new(vec![var.clone()], config)?;
            for _ in 0..60 {
                let mut grads = GradStore::default();
                // Steeper in some directions than in others.
                let here = Nd::of(&var)?;
                let slope = |(i, x): (usize, &f64)| x * 10f64.powi(i as i32 % 5 - 3);
                let data = here.data.iter().enumerate().map(slope).collect();
                grads.insert(&var, Nd { data, dims: here.dims }.tensor(F32)?.to_device(device)?);
                adamw.step(&grads)?;
            }
            Ok::<_, candle_core::Error>(
                Nd::of(&var)?.data.iter().map(|x| x * x).sum::<f64>().sqrt(),
            )
        };
        let (codes, floats) = (distance(Moments::Bits8)?, distance(Moments::F32)?);
        let begin = Nd::of(&start)?.data.iter().map(|x| x * x).sum::<f64>().sqrt();
        match codes < 1.25 * floats + 0.01 * begin && floats < 0.2 * begin {
            true => Ok(()),
            false => bail!("{codes} with codes, {floats} without, {begin} before"),
        }
    });
    tally.finish();
}

/// What codes stand for, as bitsandbytes' `create_dynamic_map` makes it.
fn map(signed: bool) -> Vec<f64> {
    let mut data = vec![0.0, 1.0];
    for i in 0..7 {
        let parts = 1 << if signed { i } else { i + 1 };
        let edge = |j: i32| 0.1 + 0.9 * f64::from(j) / f64::from(parts);
        for j in 0..parts {
            let mean = (edge(j) + edge(j + 1)) / 2.0 * 10f64.powi(i - 6);
            data.push(mean);
            if signed {
                data.push(-mean);
            }
        }
    }
    data.sort_by(f64::total_cmp);
    data
}
