//! How long a training step takes.

use std::time::Instant;

use candle_core::Result;

use crate::args::Args;
use crate::data::Corpus;
use crate::ops::Arithmetic;
use crate::train::{Run, utilisation};

/// Steps before the clock starts: the first ones compile kernels and fill the allocator's pool.
const WARM_UP: usize = 5;

/// Prints the speed of `--steps` steps of this crate's model and, with `--reference`, of candle's own.
pub fn run(args: &Args, corpus: &Corpus) -> Result<()> {
    let tokens = (args.batch * args.model.seq) as f64;
    let reference = args.reference.then_some(Arithmetic::Reference);
    let mut rates = Vec::new();
    for arithmetic in [args.arithmetic].into_iter().chain(reference) {
        kaio_candle::train::reset_peak_memory(&args.device)?;
        let mut run = Run::new(args, arithmetic)?;
        let parameters: usize =
            run.model.parameters().iter().map(|(_, var)| var.elem_count()).sum();
        // A step ends with its loss on the host, so that the clock sees all of it.
        (0..WARM_UP).try_for_each(|_| run.step(args, corpus).map(drop))?;
        let started = Instant::now();
        (0..args.steps).try_for_each(|_| run.step(args, corpus).map(drop))?;
        let seconds = started.elapsed().as_secs_f64() / args.steps as f64;
        let rate = tokens / seconds;
        let mut line = format!(
            "{}, {:.1} M parameters: {:.1} ms a step, {rate:.0} tokens/s",
            arithmetic.name(),
            parameters as f64 * 1e-6,
            seconds * 1e3,
        );
        if let Some(part) = utilisation(args, rate) {
            line += &format!(", {:.1} % of {} TFLOP/s", part * 100.0, args.peak.unwrap_or_default());
        }
        if let Some(bytes) = kaio_candle::train::peak_memory(&args.device)? {
            line += &format!(", at most {:.1} GiB", bytes as f64 / f64::from(1 << 30));
        }
        println!("{line}");
        rates.push(rate);
    }
    if let [ours, candle] = rates[..] {
        println!("{:.2} times the tokens/s of candle alone", ours / candle);
    }
    Ok(())
}
