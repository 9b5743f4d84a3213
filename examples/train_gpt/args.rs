//! The command line.

use std::path::PathBuf;

use candle_core::Device;
use lexopt::prelude::*;

use crate::model::GptConfig;
use crate::ops::{Arithmetic, Attention};

const HELP: &str = "\
Trains a small byte-level GPT with kaio-candle: bf16 matmul and flash attention, f32 weights, AdamW with clipped
gradients.

Usage: cargo run --release --example train_gpt -- [OPTIONS]

Text and machine:
  --text FILE            train on FILE [default: the sources and documents of this crate]
  --device DEVICE        cpu, or cuda:N when built with --features cuda [default: cpu]
  --seed N               decides the initial weights, the batches and the sample [default: 0]
  --attention WHO        kaio, or candle: its own operations, in f32 [default: kaio]
  --deterministic        attention's gradients are the same bits on every run
  --reference            also train the same model on candle's own f32 operations, and compare
  --benchmark            only time training steps: ours, ours with candle's attention, and all of candle's own
                         f32 operations. Sets a GPT of 86 M parameters, 12 layers of 12 heads, --dim 768,
                         --seq 1024, --batch 8, --steps 30; options after it may change that

Model:
  --seq N                bytes of context [default: 128]
  --layers N             transformer blocks [default: 3]
  --heads N              attention heads [default: 4]
  --dim N                width, a multiple of the heads [default: 128]

Training:
  --steps N              steps in all, those before a checkpoint included [default: 500]
  --batch N              windows in a step [default: 8]
  --rate X               peak learning rate [default: 0.003]

Results:
  --out DIR              where the pictures and the checkpoint go [default: out]
  --checkpoint FILE      the checkpoint [default: train_gpt.safetensors in the output directory]
  --checkpoint-every N   write it every N steps as well as at the end
  --resume FILE          go on from a checkpoint; with the same text and options the run ends in
                         the same bits as one that was never interrupted
  --log FILE             write the loss of every step as CSV
  --export FILE          write the initial weights and all batches, for scripts/torch_train_gpt.py
  --sample-bytes N       length of the generated text [default: 400]
  --temperature X        of the sampling [default: 0.8]
  --prompt TEXT          what the sample continues [default: \"pub fn \"]

  -h, --help             print this
";

pub struct Args {
    pub text: Option<PathBuf>,
    pub device: Device,
    pub seed: u64,
    pub arithmetic: Arithmetic,
    pub reference: bool,
    pub benchmark: bool,
    pub model: GptConfig,
    pub steps: usize,
    pub batch: usize,
    pub rate: f64,
    pub out: PathBuf,
    pub checkpoint: PathBuf,
    pub checkpoint_every: Option<usize>,
    pub resume: Option<PathBuf>,
    pub log: Option<PathBuf>,
    pub export: Option<PathBuf>,
    pub sample_bytes: usize,
    pub temperature: f64,
    pub prompt: String,
}

impl Args {
    /// The command line, or `None` after printing the help that it asked for.
    pub fn parse() -> Result<Option<Self>, lexopt::Error> {
        let mut args = Self {
            text: None,
            device: Device::Cpu,
            seed: 0,
            arithmetic: Arithmetic::Kaio(Attention::Kaio { deterministic: false }),
            reference: false,
            benchmark: false,
            model: GptConfig { seq: 128, layers: 3, heads: 4, dim: 128 },
            steps: 500,
            batch: 8,
            rate: 3e-3,
            out: "out".into(),
            checkpoint: PathBuf::new(),
            checkpoint_every: None,
            resume: None,
            log: None,
            export: None,
            sample_bytes: 400,
            temperature: 0.8,
            prompt: "pub fn ".into(),
        };
        let (mut checkpoint, mut candle_attends, mut deterministic) = (None, false, false);
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                Long("text") => args.text = Some(parser.value()?.into()),
                Long("device") => args.device = parser.value()?.parse_with(device)?,
                Long("seed") => args.seed = parser.value()?.parse()?,
                Long("attention") => candle_attends = parser.value()?.parse_with(is_candle)?,
                Long("deterministic") => deterministic = true,
                Long("reference") => args.reference = true,
                Long("benchmark") => {
                    args.benchmark = true;
                    args.model = GptConfig { seq: 1024, layers: 12, heads: 12, dim: 768 };
                    (args.batch, args.steps) = (8, 30);
                }
                Long("seq") => args.model.seq = parser.value()?.parse_with(at_least::<1>)?,
                Long("layers") => args.model.layers = parser.value()?.parse_with(at_least::<1>)?,
                Long("heads") => args.model.heads = parser.value()?.parse_with(at_least::<1>)?,
                Long("dim") => args.model.dim = parser.value()?.parse_with(at_least::<1>)?,
                // Two make the shortest curve.
                Long("steps") => args.steps = parser.value()?.parse_with(at_least::<2>)?,
                Long("batch") => args.batch = parser.value()?.parse_with(at_least::<1>)?,
                Long("rate") => args.rate = parser.value()?.parse_with(positive)?,
                Long("out") => args.out = parser.value()?.into(),
                Long("checkpoint") => checkpoint = Some(parser.value()?.into()),
                Long("checkpoint-every") => {
                    args.checkpoint_every = Some(parser.value()?.parse_with(at_least::<1>)?);
                }
                Long("resume") => args.resume = Some(parser.value()?.into()),
                Long("log") => args.log = Some(parser.value()?.into()),
                Long("export") => args.export = Some(parser.value()?.into()),
                Long("sample-bytes") => args.sample_bytes = parser.value()?.parse()?,
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
        args.arithmetic = Arithmetic::Kaio(match (candle_attends, deterministic) {
            (false, deterministic) => Attention::Kaio { deterministic },
            (true, false) => Attention::Candle,
            (true, true) => return Err("--deterministic is for --attention kaio".into()),
        });
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

fn device(text: &str) -> Result<Device, String> {
    match text.strip_prefix("cuda:").map(str::parse) {
        None if text == "cpu" => Ok(Device::Cpu),
        Some(Ok(_)) if cfg!(not(feature = "cuda")) => {
            Err("this build has no CUDA: add --features cuda to the cargo command".into())
        }
        Some(Ok(ordinal)) => Device::new_cuda(ordinal).map_err(|error| error.to_string()),
        _ => Err("expected cpu or cuda:N".into()),
    }
}

fn is_candle(text: &str) -> Result<bool, &'static str> {
    match text {
        "kaio" => Ok(false),
        "candle" => Ok(true),
        _ => Err("expected kaio or candle"),
    }
}

fn at_least<const LOW: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= LOW => Ok(number),
        _ => Err(format!("expected a whole number of at least {LOW}")),
    }
}

fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if number > 0.0 && f64::is_finite(number) => Ok(number),
        _ => Err("expected a positive number".into()),
    }
}
