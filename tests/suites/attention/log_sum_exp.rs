//! The log-sum-exp that comes with a result.

use candle_core::DType::{BF16, F16, F32};
use candle_core::{Device, Error, Result, Var, bail};
use kaio_candle::prelude::*;
use proptest::prelude::*;

use super::loops::nds;
use super::options::{Bias, Lengths, Options, Slopes};
use super::problem::{Leaves, Problem};
use super::random::problems;
use crate::suites::Layout::Plain;
use crate::suites::{Nd, Source, Tally, close, pairs, property, random_cases, results_alone, ulp};

/// The log-sum-exp puts results over parts of the keys together.
pub fn log_sum_exp(device: &Device) {
    let name = "flash_attn log-sum-exp";
    let mut tally = Tally::new(name, device);
    for (dtype, causal) in pairs([F32, F16, BF16], [false, true]) {
        tally.case(format!("{dtype:?} causal {causal}"), || {
            let mut source = Source::new(name, device);
            let q = source.tensor(dtype, &[2, 4, 70, 16], Plain)?;
            let [k, v] = [0; 2].map(|_| source.tensor(dtype, &[2, 2, 90, 16], Plain));
            let (k, v) = (k?, v?);
            let opts = FlashAttnOptions::default().out_dtype(F32);
            let part = |from: usize, len: usize, causal: bool| {
                let (k, v) = (k.narrow(2, from, len)?, v.narrow(2, from, len)?);
                q.kaio_flash_attn_with_lse(&k, &v, &opts.clone().causal(causal))
            };
            // All queries see the first 20 keys; the others are a square and a row.
            let parts = [part(0, 20, false)?, part(20, 70, causal)?];
            let (out, lse) = part(0, 90, causal)?;
            let mut sum = out.zeros_like()?;
            for (part, part_lse) in parts {
                let weight = (part_lse - &lse)?.exp()?.unsqueeze(3)?;
                sum = (sum + part.broadcast_mul(&weight)?)?;
            }
            // Tensor cores round exponentials to the operands' dtype.
            let bound = match dtype {
                _ if device.is_cpu() => 1e-5,
                F16 => 5e-4,
                BF16 => 4e-3,
                _ => 1e-5,
            };
            close("sum of parts", &sum, &Nd::of(&out)?, |_| bound)
        });
    }
    tally.finish();
}

/// The gradient through the log-sum-exp, alone and beside that through the result.
pub fn log_sum_exp_gradients(device: &Device) {
    let mut tally = Tally::new("flash_attn log-sum-exp gradients", device);
    if results_alone() {
        return tally.inapplicable("results alone are computed");
    }
    let bias = || Some(Bias { hides: true, own: [false, true, true], ..Bias::default() });
    let padded = Lengths::Padded([Some(vec![50, 0]), Some(vec![7, 90])]);
    let packed = Lengths::Packed([vec![0, 20, 20, 61], vec![0, 30, 44, 80]]);
    let options = [
        Options { wide: true, ..Options::default() },
        Options { bshd: true, scale: Some(-0.4), ..Options::causal() },
        Options { softcap: Some(0.8), left: Some(30), ..Options::default() },
        Options { bias: bias(), slopes: Some(Slopes::ByBatch), ..Options::default() },
        Options { lengths: padded, ..Options::causal() },
        Options { lengths: packed, wide: true, ..Options::causal() },
    ];
    for (options, dtype) in options.into_iter().flat_map(|o| [F32, BF16].map(|d| (o.clone(), d))) {
        let heads: &[usize] =
            if matches!(options.lengths, Lengths::Packed(_)) { &[4] } else { &[2, 4] };
        let problem = Problem { options, ..Problem::new(dtype, (heads, 2, [70, 90, 16, 24])) };
        for alone in [true, false] {
            tally.case(format!("alone {alone}, {problem:?}"), || both(&problem, alone, device));
        }
    }
    // Values without columns have scores all the same.
    for bias in [None, bias()] {
        let options = Options { softcap: Some(0.8), bias, ..Options::causal() };
        let problem = Problem { options, ..Problem::new(F32, (&[2, 4], 2, [20, 30, 16, 0])) };
        tally.case(format!("no columns, {problem:?}"), || both(&problem, true, device));
    }
    tally.finish();
}

/// The same of random problems.
pub fn random_log_sum_exp_gradients(device: &Device) {
    let mut tally = Tally::new("flash_attn random log-sum-exp gradients", device);
    if results_alone() {
        return tally.inapplicable("results alone are computed");
    }
    let problems = problems(device).prop_filter("there is something", |problem| {
        problem.dims.iter().flatten().all(|&len| len > 0)
    });
    // Gradients are those of q, k, v and the bias as the op has them.
    let problems = problems.prop_map(|mut problem| {
        problem.options.scale = Some(0.3);
        problem.options.bias.iter_mut().for_each(|bias| bias.layout = Plain);
        Problem { leaves: Leaves::Each([Plain; 3]), ..problem }
    });
    let cases = random_cases(device, 64, 1000);
    property(&mut tally, cases, (any::<bool>(), problems), |(alone, problem)| {
        both(&problem, alone, device).map_err(|e| Error::msg(format!("{problem:?}: {e}")))
    });
    tally.finish();
}

/// Of a sum over the log-sum-exp, and over the result unless `alone`, each element by its own factor.
fn both(problem: &Problem, alone: bool, device: &Device) -> Result<()> {
    let mut source = Source::new(&format!("lse {problem:?}"), device);
    let mut inputs = problem.inputs(&mut source)?;
    let weights = inputs.pop().expect("the weights come last");
    let vars = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
    let tensors: Vec<_> = vars.iter().map(|var| var.as_tensor().clone()).collect();
    let (out, lse) = problem.call(&problem.views(&tensors)?)?;
    let lse = lse.expect("asked for by an option");
    let factors = source.tensor(F32, lse.dims(), Plain)?;
    let mut loss = (&lse * &factors)?.sum_all()?;
    if !alone {
        loss = (loss + (out.to_dtype(F32)? * weights.to_dtype(F32)?)?.sum_all()?)?;
    }
    let grads = loss.backward()?;

    let loops = problem.loops(&nds(&problem.views(&inputs)?)?);
    let weights = Nd::of(&weights)?.map(|x| if alone { 0.0 } else { x });
    let want = loops.backward_of_both(&weights, &loops.forward(), &Nd::of(&factors)?, -1.0);
    let sizes = [weights.map(f64::abs), Nd::of(&factors)?.map(f64::abs)];
    let sizes = loops.sizes(true).backward_of_both(
        &sizes[0],
        &loops.forward().map(f64::abs),
        &sizes[1],
        1.0,
    );
    for (i, var) in vars.iter().enumerate() {
        let Some(grad) = grads.get(var) else { bail!("input {i} has no gradient") };
        // The gradient starts from a result that is rounded to its dtype, as probabilities are to the operands' where
        // tensor cores multiply them, and is rounded itself.
        let kept = if device.is_cpu() { out.dtype() } else { problem.dtype };
        let exact = grad.dtype() == F32 && kept == F32;
        let steps = if exact { 32.0 * ulp(F32, 1.0) } else { 2.0 * ulp(BF16, 1.0) };
        close(&format!("gradient {i}"), grad, &want[i], |at| steps * (sizes[i].data[at] + 1e-3))?;
    }
    Ok(())
}
