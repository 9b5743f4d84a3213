//! How long a training step takes.

use std::cell::Cell;
use std::time::{Duration, Instant};

use candle_core::{Result, Tensor};
use candle_nn::{Optimizer as _, ParamsAdamW};
use kaio_candle::train::{peak_memory, reset_peak_memory};

use crate::args::Args;
use crate::data::Corpus;
use crate::model::Gpt;
use crate::ops::Arithmetic;
use crate::train::{batch_rng, optimizer, utilisation};

/// Steps before the clock starts: the first ones compile kernels and fill the allocator's pool.
const WARM_UP: usize = 5;

/// Prints the speed of `--steps` steps of this crate's model and, with `--reference`, of candle's operations with
/// candle-nn's optimizer.
pub fn run(args: &Args, corpus: &Corpus) -> Result<()> {
    let reference = args.reference.then_some(Arithmetic::Reference);
    let arithmetics = [args.arithmetic].into_iter().chain(reference);
    let rates = arithmetics.map(|arithmetic| rate(args, arithmetic, corpus));
    if let [ours, candle] = rates.collect::<Result<Vec<_>>>()?[..] {
        println!("{:.2} times the tokens/s of candle alone", ours / candle);
    }
    Ok(())
}

/// From a loss to other weights.
type Update = Box<dyn FnMut(&Tensor) -> Result<()>>;

/// Tokens a second.
fn rate(args: &Args, arithmetic: Arithmetic, corpus: &Corpus) -> Result<f64> {
    reset_peak_memory(&args.device)?;
    let model =
        Gpt::new(args.model, arithmetic, args.seed, &args.device)?.recompute(args.recompute);
    let parameters: usize = model.parameters().iter().map(|(_, var)| var.elem_count()).sum();
    let mut update: Update = match arithmetic {
        Arithmetic::Kaio { .. } => {
            let mut optimizer = optimizer(args, &model)?;
            Box::new(move |loss| optimizer.backward_step(loss))
        }
        Arithmetic::Reference => {
            let vars = model.parameters().iter().map(|(_, var)| var.clone()).collect();
            let params = ParamsAdamW { lr: args.rate, ..ParamsAdamW::default() };
            let mut optimizer = candle_nn::AdamW::new(vars, params)?;
            Box::new(move |loss| optimizer.backward_step(loss))
        }
    };
    // The loss of a step comes to the host after the next one is on its way, as in a training loop that shows it.
    let mut shown: Option<Tensor> = None;
    let launching = Cell::new(Duration::ZERO);
    let mut step = |number| {
        let started = Instant::now();
        let mut rng = batch_rng(args.seed, number);
        let (tokens, targets) = corpus.training_batch(&mut rng, args.batch, &args.device)?;
        let loss = model.loss(&tokens, &targets)?;
        update(&loss)?;
        launching.set(launching.get() + started.elapsed());
        match shown.replace(loss.detach()) {
            Some(loss) => loss.to_scalar::<f32>().map(drop),
            None => Ok(()),
        }
    };
    (0..WARM_UP).try_for_each(&mut step)?;
    args.device.synchronize()?;
    launching.take();
    let started = Instant::now();
    (WARM_UP..WARM_UP + args.steps).try_for_each(&mut step)?;
    args.device.synchronize()?;
    let seconds = started.elapsed().as_secs_f64() / args.steps as f64;

    let rate = (args.batch * args.model.seq) as f64 / seconds;
    let (name, parameters) = (arithmetic.name(), parameters as f64 * 1e-6);
    let milliseconds = seconds * 1e3;
    print!("{name}, {parameters:.1} M parameters: {milliseconds:.1} ms a step, {rate:.0} tokens/s");
    if let Some((part, peak)) = utilisation(args, rate) {
        print!(", {:.1} % of {peak} TFLOP/s", part * 100.0);
    }
    if !args.device.is_cpu() {
        // Until the last launch of a step is on its way. A GPU that waits for it has nothing to do.
        let host = launching.get().as_secs_f64() / args.steps as f64;
        print!(", launched in {:.1} ms", host * 1e3);
    }
    if let Some(bytes) = peak_memory(&args.device)? {
        print!(", at most {:.1} GiB", bytes as f64 / f64::from(1 << 30));
    }
    println!();
    Ok(rate)
}
