//! Gradients against central differences.

use candle_core::{Device, bail};

use super::loops::{dot, nds};
use super::options::Lengths::{Packed, Padded};
use super::options::{Bias, Options, Slopes};
use super::problem::Problem;
use super::{Sizes, each, grid};
use crate::suites::{Nd, Source, Tally};

/// Gradients, and the closed form that the other suites compare with, against central differences.
pub fn finite_differences(device: &Device) {
    let sizes: [Sizes; 4] = [
        (&[], 1, [1, 3, 2, 2]),
        (&[], 1, [4, 3, 3, 1]),
        (&[4], 2, [3, 5, 2, 3]),
        (&[2, 2], 1, [2, 2, 3, 2]),
    ];
    differences("flash_attn finite differences", device, grid(&sizes));
}

/// Gradients of tiny problems, of which that of the bias too, against central differences.
pub fn option_differences(device: &Device) {
    let name = "flash_attn option differences";
    let bias = |own| Some(Bias { own, ..Bias::default() });
    let padded = Padded([Some(vec![2, 1]), Some(vec![3, 2])]);
    let options = [
        Options { softcap: Some(0.6), ..Options::default() },
        Options { slopes: Some(Slopes::ByBatch), left: Some(1), ..Options::default() },
        Options { bias: bias([true; 3]), softcap: Some(0.6), ..Options::default() },
        Options {
            bias: bias([false, true, false]),
            causal: true,
            bshd: true,
            ..Options::default()
        },
        Options { bias: bias([false; 3]), lengths: padded, ..Options::default() },
    ];
    let mut problems = each(&[(&[2, 2], 1, [2, 3, 3, 2])], &options);
    let packed = Options {
        lengths: Packed([vec![0, 2, 4], vec![0, 1, 5]]),
        causal: true,
        ..Options::default()
    };
    problems.extend(each(&[(&[2], 1, [5, 5, 2, 3])], &[packed]));
    differences(name, device, problems);
}

fn differences(suite: &'static str, device: &Device, problems: impl IntoIterator<Item = Problem>) {
    let mut tally = Tally::new(suite, device);
    for problem in problems {
        tally.case(format!("{problem:?}"), || {
            let mut source = Source::new(&format!("{problem:?}"), device);
            let inputs = problem.inputs(&mut source)?;
            let mut want = problem.reference(&inputs)?;
            let x = nds(&problem.views(&inputs[..inputs.len() - 1])?)?;
            let weights = Nd::of(&inputs[inputs.len() - 1])?.data;
            for leaf in 0..x.len() {
                for i in 0..x[leaf].data.len() {
                    let moved = |by: f64| {
                        let mut x = x.clone();
                        x[leaf].data[i] += by;
                        dot(&problem.loops(&x).forward().data, &weights)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let closed = std::mem::replace(&mut want[1 + leaf].value.data[i], slope);
                    if (slope - closed).abs() > 1e-9 {
                        bail!("the loops' gradient {leaf} at {i} is {closed}, wanted {slope}");
                    }
                }
            }
            problem.compare(&inputs, &want, &problem.allowed(&inputs, &want)?)
        });
    }
    tally.finish();
}
