//! How long a training step takes.

use std::time::Instant;

use candle_core::Result;

use crate::args::Args;
use crate::data::Corpus;
use crate::model::Gpt;
use crate::ops::{Arithmetic, Attention};
use crate::train::{optimizer, training_step};

/// Steps before the clock starts: the first ones compile kernels and fill the allocator's pool.
const WARM_UP: usize = 5;

/// Prints the speed of `--steps` steps of this crate's model, of the same with candle's attention, and of
/// candle's own: all of them with this crate's optimizer.
pub fn run(args: &Args, corpus: &Corpus) -> Result<()> {
    let tokens = (args.batch * args.model.seq) as f64;
    let mut rates = Vec::new();
    for arithmetic in [args.arithmetic, Arithmetic::Kaio(Attention::Candle), Arithmetic::Reference]
    {
        let model = Gpt::new(args.model, arithmetic, args.seed, &args.device)?;
        let parameters: usize = model.parameters().iter().map(|(_, var)| var.elem_count()).sum();
        let mut optimizer = optimizer(args, &model)?;
        // A step ends with its loss on the host, so that the clock sees all of it.
        let mut step = |step| training_step(args, &model, &mut optimizer, corpus, step).map(drop);
        (0..WARM_UP).try_for_each(&mut step)?;
        let started = Instant::now();
        (WARM_UP..WARM_UP + args.steps).try_for_each(&mut step)?;
        let seconds = started.elapsed().as_secs_f64() / args.steps as f64;
        println!(
            "{}, {:.1} M parameters: {:.1} ms a step, {:.0} tokens/s",
            arithmetic.name(),
            parameters as f64 * 1e-6,
            seconds * 1e3,
            tokens / seconds
        );
        rates.push(tokens / seconds);
    }
    println!(
        "{:.2} times the tokens/s with candle's attention, {:.2} times those of candle alone",
        rates[0] / rates[1],
        rates[0] / rates[2]
    );
    Ok(())
}
