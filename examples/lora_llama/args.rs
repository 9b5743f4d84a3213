//! The command line.

use std::path::PathBuf;

use candle_core::{DType, Device};
use lexopt::prelude::*;

use crate::command::{at_least, device, positive};
use crate::model::peft::Lora;
use crate::model::{Base, Config, LINEARS};

const HELP: &str = "\
Fine-tunes a Llama by low-rank matrices beside its frozen weights (LoRA), and writes them as PEFT has them.

Usage: cargo run --release --example lora_llama -- [OPTIONS]

Model and text:
  --model DIR        a folder of Hugging Face's: config.json, model.safetensors or an index of several such files,
                     and tokenizer.json. Its files must stay as they are meanwhile
  --preset NAME      without a model: small learns from this crate's documents first, and is written to OUT/base;
                     llama-1b and llama-8b are random numbers in the shapes of Llama 3.2 1B and Llama 3.1 8B,
                     to time [default: small]
  --pretrain N       steps of that learning [default: 200]
  --text FILE        what is learnt [default: the sources of this crate; random tokens of a model to time]
  --device DEVICE    cpu, or cuda:N when built with --features cuda [default: cpu]
  --dtype DTYPE      of weights and activations: bf16 or f32, in which products are candle's [default: bf16]
  --base KIND        how frozen weights are kept: plain, int4, nf4 or int8 [default: plain]

Adapter:
  --rank N           [default: 16]
  --alpha X          the product of the matrices is added times X / rank [default: 32]
  --targets LIST     which weights, by commas [default: q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj]
  --adapter DIR      go on from this adapter, which has its own rank, alpha and targets; with the same text and
                     options one that this example wrote ends in the same bits as a run without interruption

Training:
  --seq N            tokens of context [default: 128 of the small model, else 1024]
  --batch N          windows in a step [default: 8]
  --steps N          steps in all, those before an interruption included [default: 120]
  --stop N           steps after which this run stops nevertheless
  --rate X           peak learning rate [default: 0.005 of the small model, else 0.0002]
  --recompute        compute layers again in the backward pass rather than keep what is in them
  --seed N           decides the adapter's initial matrices, the batches and the small model [default: 0]

Results:
  --out DIR          the adapter is written to DIR/adapter [default: out/lora_llama]
  --merge DIR        write the model with the adapter added to its weights to DIR

  -h, --help         print this
";

pub struct Args {
    pub model: Option<PathBuf>,
    pub preset: Preset,
    pub pretrain: usize,
    pub text: Option<PathBuf>,
    pub device: Device,
    pub dtype: DType,
    pub base: Base,
    pub lora: Lora,
    pub adapter: Option<PathBuf>,
    pub seq: usize,
    pub batch: usize,
    pub steps: usize,
    pub stop: Option<usize>,
    pub rate: f64,
    pub recompute: bool,
    pub seed: u64,
    pub out: PathBuf,
    pub merge: Option<PathBuf>,
}

/// What there is without a model.
pub enum Preset {
    Small,
    Random(Box<Config>),
}

impl Args {
    /// The command line, or `None` after printing the help that it asked for.
    pub fn parse() -> Result<Option<Self>, lexopt::Error> {
        let mut args = Self {
            model: None,
            preset: Preset::Small,
            pretrain: 200,
            text: None,
            device: Device::Cpu,
            dtype: DType::BF16,
            base: Base::Plain,
            lora: Lora { rank: 16, alpha: 32.0, targets: vec![] },
            adapter: None,
            seq: 0,
            batch: 8,
            steps: 120,
            stop: None,
            rate: 0.0,
            recompute: false,
            seed: 0,
            out: "out/lora_llama".into(),
            merge: None,
        };
        let (mut seq, mut rate) = (None, None);
        let mut targets: Vec<String> =
            LINEARS.map(|name| name.rsplit('.').next().unwrap_or(name).to_owned()).to_vec();
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                Long("model") => args.model = Some(parser.value()?.into()),
                Long("preset") => args.preset = parser.value()?.parse_with(preset)?,
                Long("pretrain") => args.pretrain = parser.value()?.parse_with(at_least::<1>)?,
                Long("text") => args.text = Some(parser.value()?.into()),
                Long("device") => args.device = parser.value()?.parse_with(device)?,
                Long("dtype") => args.dtype = parser.value()?.parse_with(dtype)?,
                Long("base") => args.base = parser.value()?.parse()?,
                Long("rank") => args.lora.rank = parser.value()?.parse_with(at_least::<1>)?,
                Long("alpha") => args.lora.alpha = parser.value()?.parse_with(positive)?,
                Long("targets") => {
                    targets = parser.value()?.string()?.split(',').map(str::to_owned).collect();
                }
                Long("adapter") => args.adapter = Some(parser.value()?.into()),
                Long("seq") => seq = Some(parser.value()?.parse_with(at_least::<1>)?),
                Long("batch") => args.batch = parser.value()?.parse_with(at_least::<1>)?,
                Long("steps") => args.steps = parser.value()?.parse_with(at_least::<1>)?,
                Long("stop") => args.stop = Some(parser.value()?.parse_with(at_least::<1>)?),
                Long("rate") => rate = Some(parser.value()?.parse_with(positive)?),
                Long("recompute") => args.recompute = true,
                Long("seed") => args.seed = parser.value()?.parse()?,
                Long("out") => args.out = parser.value()?.into(),
                Long("merge") => args.merge = Some(parser.value()?.into()),
                Short('h') | Long("help") => {
                    print!("{HELP}");
                    return Ok(None);
                }
                _ => return Err(arg.unexpected()),
            }
        }
        let Lora { rank, alpha, .. } = args.lora;
        args.lora = Lora::new(rank, alpha, targets).map_err(|error| error.to_string())?;
        let small = args.model.is_none() && matches!(args.preset, Preset::Small);
        args.seq = seq.unwrap_or(if small { 128 } else { 1024 });
        args.rate = rate.unwrap_or(if small { 5e-3 } else { 2e-4 });
        if args.dtype == DType::F32 && args.base != Base::Plain {
            return Err(
                "quantised weights are multiplied in 16 bits: --base needs --dtype bf16".into()
            );
        }
        if args.merge.is_some() && args.model.is_none() && !small {
            return Err("--merge needs a --model".into());
        }
        Ok(Some(args))
    }
}

fn preset(name: &str) -> Result<Preset, &'static str> {
    Ok(match name {
        "small" => Preset::Small,
        "llama-1b" => Preset::Random(Box::new(Config::LLAMA_1B)),
        "llama-8b" => Preset::Random(Box::new(Config::LLAMA_8B)),
        _ => return Err("expected small, llama-1b or llama-8b"),
    })
}

fn dtype(name: &str) -> Result<DType, &'static str> {
    match name {
        "bf16" => Ok(DType::BF16),
        "f32" => Ok(DType::F32),
        _ => Err("expected bf16 or f32"),
    }
}
