//! The command line.

use std::path::PathBuf;

use candle_core::Device;
use lexopt::prelude::*;

use crate::command::{at_least, device, positive};
use crate::model::Config;
use crate::ops::Arithmetic;

const HELP: &str = "\
Trains a GPT or a Llama with kaio-candle: fused operations with gradients in bf16, AdamW with f32 copies of the weights.

Usage: cargo run --release --example train_gpt -- [OPTIONS]

Text and machine:
  --text FILE            train on FILE [default: the sources and documents of this crate; random tokens for a
                         preset that is no model of bytes, if there is no tokenizer]
  --tokenizer FILE       what makes tokens of the text: a tokenizer.json [default: its bytes are the tokens]
  --device DEVICE        cpu, or cuda:N when built with --features cuda [default: cpu]
  --seed N               decides the initial weights, the batches and the sample [default: 0]
  --deterministic        attention's gradients are the same bits on every run
  --recompute            keep what goes into each block alone, and compute the rest again in the backward pass
  --reference            also train the same model on candle's own f32 operations, and compare
  --benchmark            only time training steps: ours, and with --reference candle's. 30 of them, of the
                         preset byte-86m with --batch 8; options after it may change that

Model:
  --preset NAME          byte-86m, gpt2-124m or llama-1b, with a batch and a rate that suit them;
                         options after it may change that [default: a GPT for a laptop]
  --seq N                tokens of context [default: 128]
  --layers N             transformer blocks [default: 3]
  --heads N              attention heads [default: 4]
  --dim N                width, a multiple of the heads [default: 128]

Training:
  --steps N              steps in all, those before a checkpoint included [default: 500]
  --batch N              windows in a step [default: 8]
  --rate X               peak learning rate [default: 0.003]
  --peak X               TFLOP/s of the machine, to show which part of them is used [default on a GPU: 989, an
                         H100's in bf16]

Results:
  --out DIR              where the pictures and the checkpoint go [default: out]
  --checkpoint FILE      the checkpoint [default: train_gpt.safetensors in the output directory]
  --checkpoint-every N   write it every N steps as well as at the end
  --resume FILE          go on from a checkpoint; with the same text and options the run ends in
                         the same bits as one that was never interrupted
  --log FILE             write the loss of every step as CSV
  --export FILE          write the initial weights and all batches, of a model of bytes, for scripts/torch_train_gpt.py
  --sample N             tokens of generated text [default: 400]
  --temperature X        of the sampling [default: 0.8]
  --prompt TEXT          what the sample continues [default: \"pub fn \"]

  -h, --help             print this
";

pub struct Args {
    pub text: Option<PathBuf>,
    pub tokenizer: Option<PathBuf>,
    pub device: Device,
    pub seed: u64,
    pub arithmetic: Arithmetic,
    pub recompute: bool,
    pub reference: bool,
    pub benchmark: bool,
    pub model: Config,
    pub steps: usize,
    pub batch: usize,
    pub rate: f64,
    pub peak: Option<f64>,
    pub out: PathBuf,
    pub checkpoint: PathBuf,
    pub checkpoint_every: Option<usize>,
    pub resume: Option<PathBuf>,
    pub log: Option<PathBuf>,
    pub export: Option<PathBuf>,
    pub sample: usize,
    pub temperature: f64,
    pub prompt: String,
}

impl Args {
    /// The command line, or `None` after printing the help that it asked for.
    pub fn parse() -> Result<Option<Self>, lexopt::Error> {
        let mut args = Self {
            text: None,
            tokenizer: None,
            device: Device::Cpu,
            seed: 0,
            arithmetic: Arithmetic::Kaio { deterministic: false },
            recompute: false,
            reference: false,
            benchmark: false,
            model: Config::SMALL,
            steps: 500,
            batch: 8,
            rate: 3e-3,
            peak: None,
            out: "out".into(),
            checkpoint: PathBuf::new(),
            checkpoint_every: None,
            resume: None,
            log: None,
            export: None,
            sample: 400,
            temperature: 0.8,
            prompt: "pub fn ".into(),
        };
        let (mut checkpoint, mut deterministic) = (None, false);
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                Long("text") => args.text = Some(parser.value()?.into()),
                Long("tokenizer") => args.tokenizer = Some(parser.value()?.into()),
                Long("device") => args.device = parser.value()?.parse_with(device)?,
                Long("seed") => args.seed = parser.value()?.parse()?,
                Long("deterministic") => deterministic = true,
                Long("recompute") => args.recompute = true,
                Long("reference") => args.reference = true,
                Long("benchmark") => {
                    args.benchmark = true;
                    args.model = Config::BYTE_86M;
                    (args.batch, args.steps) = (8, 30);
                }
                Long("preset") => {
                    (args.model, args.batch, args.rate) = parser.value()?.parse_with(preset)?;
                }
                Long("seq") => args.model.seq = parser.value()?.parse_with(at_least::<1>)?,
                Long("layers") => args.model.layers = parser.value()?.parse_with(at_least::<1>)?,
                Long("heads") => args.model.set_heads(parser.value()?.parse_with(at_least::<1>)?),
                Long("dim") => args.model.set_dim(parser.value()?.parse_with(at_least::<1>)?),
                // Two make the shortest curve.
                Long("steps") => args.steps = parser.value()?.parse_with(at_least::<2>)?,
                Long("batch") => args.batch = parser.value()?.parse_with(at_least::<1>)?,
                Long("rate") => args.rate = parser.value()?.parse_with(positive)?,
                Long("peak") => args.peak = Some(parser.value()?.parse_with(positive)?),
                Long("out") => args.out = parser.value()?.into(),
                Long("checkpoint") => checkpoint = Some(parser.value()?.into()),
                Long("checkpoint-every") => {
                    args.checkpoint_every = Some(parser.value()?.parse_with(at_least::<1>)?);
                }
                Long("resume") => args.resume = Some(parser.value()?.into()),
                Long("log") => args.log = Some(parser.value()?.into()),
                Long("export") => args.export = Some(parser.value()?.into()),
                Long("sample") => args.sample = parser.value()?.parse()?,
                Long("temperature") => args.temperature = parser.value()?.parse_with(positive)?,
                Long("prompt") => args.prompt = parser.value()?.string()?,
                Short('h') | Long("help") => {
                    print!("{HELP}");
                    return Ok(None);
                }
                _ => return Err(arg.unexpected()),
            }
        }
        args.checkpoint = checkpoint.unwrap_or_else(|| args.out.join("train_gpt.safetensors"));
        args.arithmetic = Arithmetic::Kaio { deterministic };
        args.peak = args.peak.or(args.device.is_cuda().then_some(989.0));
        if args.prompt.is_empty() {
            return Err("--prompt must not be empty".into());
        }
        if args.reference && args.resume.is_some() {
            return Err(
                "--reference compares whole runs, so it cannot be combined with --resume".into()
            );
        }
        Ok(Some(args))
    }
}

/// A model, its batch and its learning rate.
fn preset(name: &str) -> Result<(Config, usize, f64), &'static str> {
    match name {
        "byte-86m" => Ok((Config::BYTE_86M, 16, 1e-3)),
        "gpt2-124m" => Ok((Config::GPT2_124M, 32, 6e-4)),
        "llama-1b" => Ok((Config::LLAMA_1B, 8, 3e-4)),
        _ => Err("expected byte-86m, gpt2-124m or llama-1b"),
    }
}
