//! Trains a GPT or a Llama through this crate's operations and its optimizer: a small model of bytes, which learns on
//! a laptop, or one of the sizes that people compare.
//!
//! ```text
//! cargo run --release --example train_gpt
//! cargo run --release --example train_gpt -- --reference
//! cargo run --release --example train_gpt -- --help
//! cargo run --release --features cuda --example train_gpt -- \
//!     --device cuda:0 --dim 512 --layers 8 --heads 8 --seq 512 --steps 3000 --rate 0.001
//! cargo run --release --features cuda --example train_gpt -- --device cuda:0 --benchmark --preset gpt2-124m
//! ```
//!
//! The text is this crate's own source and documentation. The run ends with the loss on text that it
//! has not seen beside the entropy of single tokens, a sample, a picture of the loss, and a checkpoint.
//! With `--reference` the same model (weights, batches, schedule) is trained on candle's own f32
//! operations as well, and the two curves are compared. `--benchmark` times steps instead.

mod args;
mod benchmark;
#[path = "../common/chart.rs"]
mod chart;
mod checkpoint;
#[path = "../common/command.rs"]
mod command;
#[path = "../common/data.rs"]
mod data;
mod model;
mod ops;
#[path = "../common/rng.rs"]
mod rng;
mod sample;
mod train;

use std::error::Error;
use std::fs;
use std::path::Path;
use std::process::ExitCode;

use args::Args;
use chart::Series;
use data::{Alphabet, Corpus};
use model::Config;
use ops::Arithmetic;
use train::{SMOOTHING, Trained, train};

fn main() -> ExitCode {
    command::exit(run())
}

fn run() -> Result<(), Box<dyn Error>> {
    let Some(args) = Args::parse()? else {
        return Ok(());
    };
    let alphabet = Alphabet::new(args.tokenizer.as_deref(), args.model.vocabulary)?;
    let Config { vocabulary, seq, .. } = args.model;
    let corpus = Corpus::load(args.text.as_deref(), &alphabet, vocabulary, seq)?;
    if args.benchmark {
        return Ok(benchmark::run(&args, &corpus)?);
    }
    // Now, so that a path that cannot be written does not cost a whole run.
    for directory in [Some(args.out.as_path()), args.checkpoint.parent()].into_iter().flatten() {
        fs::create_dir_all(directory)
            .map_err(|e| format!("cannot make the directory {}: {e}", directory.display()))?;
    }

    if let Some(path) = &args.export {
        checkpoint::export(path, &args, &corpus)?;
    }
    let trained = train(&args, args.arithmetic, &corpus)?;
    let reference =
        args.reference.then(|| train(&args, Arithmetic::Reference, &corpus)).transpose()?;

    let entropy = corpus.unigram_entropy();
    println!("text: {} tokens; the entropy of single tokens is {entropy:.3} nats", corpus.len());
    let mut runs = vec![(args.arithmetic, &trained)];
    runs.extend(reference.as_ref().map(|run| (Arithmetic::Reference, run)));
    for (arithmetic, run) in &runs {
        let value = |tokens: &_, targets: &_| run.model.loss_value(tokens, targets);
        let loss = corpus.validation_loss(args.batch, &args.device, value)?;
        println!("validation loss, {}: {loss:.3} nats a token", arithmetic.name());
    }
    if let Some(reference) = &reference {
        let (step, difference) = largest_difference(&trained, reference);
        println!(
            "largest difference of the smoothed training losses: {difference:.4}, at step {step}"
        );
    }

    if args.sample > 0 && !matches!(alphabet, Alphabet::Numbers) {
        println!("\n{}\n", sample::generate(&trained.model, &alphabet, &args)?);
    }

    if let Some(path) = &args.log {
        write_log(path, &runs)?;
        println!("losses: {}", path.display());
    }
    let picture = args.out.join("train_gpt.png");
    draw(&picture, &runs, entropy)?;
    println!("loss curve: {}", picture.display());
    println!("checkpoint: {}", args.checkpoint.display());
    Ok(())
}

/// Where the smoothed curves are furthest apart, as the step's number, and by how much.
fn largest_difference(a: &Trained, b: &Trained) -> (usize, f64) {
    let differences = a.smoothed().into_iter().zip(b.smoothed()).map(|(a, b)| (a - b).abs());
    let numbered = (1..).zip(differences);
    numbered.max_by(|(_, a), (_, b)| a.total_cmp(b)).unwrap_or_default()
}

/// A line for each step: its number, and the loss of every run.
fn write_log(path: &Path, runs: &[(Arithmetic, &Trained)]) -> Result<(), Box<dyn Error>> {
    let names = runs.iter().map(|(arithmetic, _)| arithmetic.name());
    let mut lines = vec![["step"].into_iter().chain(names).collect::<Vec<_>>().join(",")];
    for step in 0..runs[0].1.losses.len() {
        let losses = runs.iter().map(|(_, run)| run.losses[step].to_string());
        let cells = std::iter::once((step + 1).to_string()).chain(losses);
        lines.push(cells.collect::<Vec<_>>().join(","));
    }
    Ok(fs::write(path, lines.join("\n") + "\n")?)
}

fn draw(path: &Path, runs: &[(Arithmetic, &Trained)], entropy: f64) -> Result<(), Box<dyn Error>> {
    let line = |name: &str, losses: Vec<f64>| Series {
        name: name.to_owned(),
        points: (1..).map(f64::from).zip(losses).collect(),
    };
    let mut series: Vec<_> =
        runs.iter().map(|(arithmetic, run)| line(arithmetic.name(), run.smoothed())).collect();
    series.push(line("entropy of single tokens", vec![entropy; runs[0].1.losses.len()]));
    let title = format!("Training loss, mean of {SMOOTHING} steps");
    chart::line_chart(path, &title, "step", "nats per token", &series)
}
