//! How near results are to the formula, beside FlashAttention's, which is simulated.

use candle_core::DType::{BF16, F16};
use candle_core::{Device, Result, bail};

use super::loops::nds;
use super::options::Options;
use super::problem::Problem;
use crate::suites::{Nd, Source, Tally, round};

/// FlashAttention's keys in a block, of heads of 128 and more.
const BLOCK: usize = 64;

/// Our errors are 0.89 to 0.981 of FlashAttention's; 0.999 and more where the largest exponential of
/// a block is rounded.
const LESS: f64 = 0.99;

/// The root mean square error of results is less than FlashAttention's, whose exponentials are of
/// differences to the largest score so far. Results are in f32, so that there is no other error.
/// Keys are too few to be split, so that there are blocks after the first.
pub fn accuracy(device: &Device) {
    let mut tally = Tally::new("attention accuracy", device);
    for (dtype, dim) in [BF16, F16].into_iter().flat_map(|t| [64, 128, 256].map(|d| (t, d))) {
        for causal in [false, true] {
            // Inputs are uniform from -1 to 1: scores have a standard deviation of 1.
            let scale = Some(3.0 / (dim as f32).sqrt());
            let options = Options { causal, scale, wide: true, ..Options::default() };
            let problem = Problem::new(dtype, (&[1, 2], 2, [300, 500, dim, dim])).untracked();
            let problem = Problem { options, ..problem };
            let case = format!("{problem:?}");
            let mut source = Source::new(&case, device);
            tally.case(case, || compare(&problem, &mut source));
        }
    }
    tally.finish();
}

fn compare(problem: &Problem, source: &mut Source) -> Result<()> {
    let inputs = problem.inputs(source)?;
    let views = problem.views(&inputs)?;
    let loops = problem.loops(&nds(&views)?);
    let want = loops.forward();
    let theirs = loops.flash(BLOCK, |x| round(problem.dtype, x));
    let ours = Nd::of(&problem.call(&views)?.0)?;
    let [ours, theirs] = [ours, theirs].map(|got| {
        let errors = got.data.iter().zip(&want.data).map(|(got, want)| got - want);
        (errors.map(|e| e * e).sum::<f64>() / want.data.len() as f64).sqrt()
    });
    match ours < LESS * theirs {
        true => Ok(()),
        false => bail!("an error of {ours:.3e}, where FlashAttention's is {theirs:.3e}"),
    }
}
