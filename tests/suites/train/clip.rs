//! Norms of gradients, and gradients of no larger norm.

use candle_core::DType::{BF16, F16, F32};
use candle_core::backprop::GradStore;
use candle_core::{Device, Result, Tensor, Var, bail};
use kaio_candle::train::{AdamW, AdamWConfig, clip_grad_norm};

use super::inputs::{gradients, on_cpu, store, vars};
use crate::suites::Layout::{Plain, Transposed};
use crate::suites::{Nd, Source, Tally, close, identical, ulp};

fn norm_of(grads: &[Tensor]) -> Result<f64> {
    let mut squares = 0.0;
    for grad in grads {
        squares += Nd::of(grad)?.data.iter().map(|x| x * x).sum::<f64>();
    }
    Ok(squares.sqrt())
}

/// Called alone: the norm and all gradients beside f64.
pub fn clip(device: &Device) {
    let mut tally = Tally::new("clip_grad_norm", device);
    for dtype in [F32, BF16, F16] {
        // To less than the norm, and to more.
        for part in [0.25, 3.0] {
            let case = format!("{dtype:?}, to {part} of the norm");
            tally.case(&case, || {
                let source = &mut Source::new(&case, device);
                let named = vars(source, dtype)?;
                let list: Vec<Var> = named.iter().map(|(_, var)| var.clone()).collect();
                let grads = gradients(source, dtype)?;
                let norm = norm_of(&grads)?;
                let mut given = store(&named, &grads);
                let got = clip_grad_norm(&list, &mut given, part * norm)?;
                // Its squares are summed in f32, by threads, warps, blocks and chunks.
                close("norm", &got, &Nd::full(&[], norm), |_| 8.0 * ulp(F32, norm))?;
                let factor = (part * norm / (norm + 1e-6)).min(1.0);
                for ((name, var), grad) in named.iter().zip(&grads) {
                    let (want, got) = (Nd::of(grad)?.map(|x| x * factor), given.get(var));
                    let Some(got) = got else { bail!("{name} lost its gradient") };
                    let near = |i: usize| {
                        let x = want.data[i];
                        ulp(dtype, x) + 8.0 * ulp(F32, x)
                    };
                    close(name, got, &want, near)?;
                }
                Ok(())
            });
        }
    }
    tally.case("infinite and NaN", || {
        let var = Var::zeros(3, F32, device)?;
        let clipped = |values: [f32; 3]| {
            let mut grads = GradStore::default();
            grads.insert(&var, Tensor::new(&values, device)?);
            let norm = clip_grad_norm(std::slice::from_ref(&var), &mut grads, 1.0)?;
            let grad = grads.get(&var).expect("it was inserted").to_vec1::<f32>()?;
            Ok::<_, candle_core::Error>((norm.to_scalar::<f32>()?, grad))
        };
        let (norm, grad) = clipped([1.0, f32::INFINITY, -2.0])?;
        if !(norm == f32::INFINITY && grad[0] == 0.0 && grad[1].is_nan() && grad[2] == 0.0) {
            bail!("infinite: {norm} {grad:?}");
        }
        let (norm, grad) = clipped([1.0, f32::NAN, -2.0])?;
        if !(norm.is_nan() && grad.iter().all(|x| x.is_nan())) {
            bail!("NaN: {norm} {grad:?}");
        }
        Ok(())
    });
    tally.case("none, one twice, and views", || {
        let source = &mut Source::new("none", device);
        let var = Var::zeros((7, 9), F32, device)?;
        let both = [var.clone(), var.clone()];
        let mut grads = GradStore::default();
        identical("norm", &clip_grad_norm(&both, &mut grads, 1.0)?, &Nd::full(&[], 0.0))?;
        identical("norm", &clip_grad_norm(&[], &mut grads, 1.0)?, &Nd::full(&[], 0.0))?;
        let view = source.tensor(F32, &[7, 9], Transposed)?;
        grads.insert(&var, view.clone());
        let norm = norm_of(&[view])?;
        let got = clip_grad_norm(&both, &mut grads, 1e-3)?;
        close("norm", &got, &Nd::full(&[], norm), |_| 8.0 * ulp(F32, norm))
    });
    tally.finish();
}

/// Within AdamW: the norm, and the steps of gradients that were clipped before.
pub fn clipped_steps(device: &Device) {
    let mut tally = Tally::new("adamw clipped", device);
    for (dtype, accumulated) in [(F32, false), (F32, true), (BF16, false)] {
        let case = format!("{dtype:?}, accumulated: {accumulated}");
        tally.case(&case, || {
            let source = &mut Source::new(&case, device);
            let ours = vars(source, F32)?;
            let cpu = on_cpu(&ours)?;
            let config = AdamWConfig::default().lr(0.01);
            let mut adamw = AdamW::named(ours.clone(), config.clone().clip_norm(0.5))?;
            let mut plain = AdamW::named(cpu.clone(), config)?;
            for _ in 0..5 {
                let grads = gradients(source, dtype)?;
                let given = store(&ours, &grads);
                if accumulated {
                    adamw.accumulate(&given)?;
                }
                adamw.step(&given)?;
                let norm = norm_of(&grads)?;
                let Some(got) = adamw.grad_norm() else { bail!("no norm") };
                close("norm", &got, &Nd::full(&[], norm), |_| 8.0 * ulp(F32, norm))?;
                let factor = (0.5 / (norm + 1e-6)).min(1.0);
                let clipped = grads.iter().map(|g| Nd::of(g)?.map(|x| x * factor).tensor(F32));
                plain.step(&store(&cpu, &clipped.collect::<Result<Vec<_>>>()?))?;
            }
            for ((name, var), (_, plain)) in ours.iter().zip(&cpu) {
                let want = Nd::of(plain)?;
                // A gradient's last bits make those of a step of 0.01.
                close(name, var, &want, |_| 1e-7 + 5.0 * ulp(F32, want.peak()))?;
            }
            Ok(())
        });
    }
    tally.case("before and after the first step", || {
        let source = &mut Source::new("shape", device);
        let var = Var::from_tensor(&source.tensor(F32, &[2, 3], Plain)?)?;
        let mut grads = GradStore::default();
        grads.insert(&var, Tensor::full(3f32, (2, 3), device)?);
        let mut adamw = AdamW::new(vec![var], AdamWConfig::default().clip_norm(1.0))?;
        if adamw.grad_norm().is_some() {
            bail!("a norm before the first step");
        }
        adamw.step(&grads)?;
        let norm = 3.0 * 6f64.sqrt();
        let got = adamw.grad_norm().expect("there was a step");
        close("norm", &got, &Nd::full(&[], norm), |_| 8.0 * ulp(F32, norm))
    });
    tally.finish();
}
