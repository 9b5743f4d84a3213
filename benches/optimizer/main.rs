//! A step of AdamW over all weights of a model, and the clipping of gradients, on the first GPU, beside a copy of as many bytes
//! and candle-nn's optimizer.
//!
//! ```text
//! cargo bench --features cuda --bench optimizer -- --quick --rows a,b
//! ```
//!
//! - `--rows a,b`: only these groups (`rows.rs` has them)
//! - `--quick`: fewer rounds
//! - `--torch FILE`, `--list`: as for the bench `matmul`
//!
//! The table goes to the terminal, and as JSON to `out/bench` (`KAIO_BENCH_DIR`).

#[path = "../common/mod.rs"]
mod common;
mod rows;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::Optimizer;
use kaio_candle::train::{AdamW, AdamWConfig, Moments, clip_grad_norm};

use common::args::Args;
use common::contest::{CANDLE, COPY, Contest, OURS, agree};
use common::gpu::Gpu;
use common::race;
use common::table::{Bench, Outcome};
use rows::{Op, Row};

fn main() -> common::Result<()> {
    let args = Args::parse(&rows::GROUPS, |_, _| Ok(false))?;
    let rows = args.select(rows::all());
    if args.list {
        return race::list(&rows);
    }
    race::run(&Optimizers, &mut Gpu::new(0)?, &rows, &args)
}

struct Optimizers;

impl Bench for Optimizers {
    type Row = Row;
    const NAME: &str = "optimizer";
    const GROUPS: &[(char, &str)] = &rows::GROUPS;
    const LEGEND: &str = "the ratio to the copy is the share of the memory's speed";
    const COLUMNS: &[(&str, usize)] = &[("op", 14), ("model", 10), ("weights", 7), ("moments", 7)];
    const PEERS: &[&'static str] = &[COPY, CANDLE, "torch"];

    fn cells(&self, row: &Row) -> Vec<String> {
        let (op, model) = (row.op.name().into(), row.model.name().into());
        vec![op, model, row.dtype.as_str().into(), row.moments().into()]
    }

    fn prepare(&self, gpu: &mut Gpu, row: &Row) -> Result<Contest> {
        prepare(&gpu.device, row)
    }

    /// A table says it all.
    fn draw(&self, _: &[Outcome<Row>], _: &Gpu) -> common::Result<()> {
        Ok(())
    }
}

/// Variables and their gradients.
fn model(device: &Device, row: &Row) -> Result<(Vec<Var>, GradStore)> {
    let (mut vars, mut grads) = (Vec::new(), GradStore::default());
    for shape in row.model.shapes() {
        let random = |std| Tensor::randn(0f32, std, shape.as_slice(), device)?.to_dtype(row.dtype);
        let var = Var::from_tensor(&random(0.02)?)?;
        grads.insert(&var, random(1e-3)?);
        vars.push(var);
    }
    Ok((vars, grads))
}

fn params() -> candle_nn::ParamsAdamW {
    candle_nn::ParamsAdamW { lr: 1e-4, weight_decay: 0.1, ..Default::default() }
}

fn prepare(device: &Device, row: &Row) -> Result<Contest> {
    let config = AdamWConfig::default().lr(1e-4).weight_decay(0.1);
    if row.dtype == DType::F32 && row.op == Op::Step && !row.codes {
        check(device, config.clone())?;
    }
    let (vars, mut grads) = model(device, row)?;
    let mut contest = Contest::default();
    let moments = if row.codes { Moments::Bits8 } else { Moments::F32 };
    let adamw = |config: AdamWConfig| AdamW::new(vars.clone(), config.moments(moments));
    match row.op {
        Op::Step | Op::Host => {
            let mut adamw = adamw(config)?;
            contest.add(OURS, move || adamw.step(&grads));
        }
        Op::ClippedStep => {
            let mut adamw = adamw(config.clip_norm(1.0))?;
            contest.add(OURS, move || adamw.step(&grads));
        }
        Op::Accumulate => {
            let mut adamw = adamw(config)?;
            contest.add(OURS, move || adamw.accumulate(&grads));
        }
        Op::Clip => {
            let vars = vars.clone();
            // The gradients stay as large as they are.
            contest.add(OURS, move || clip_grad_norm(&vars, &mut grads, 1e9).map(drop));
        }
    }
    if row.candle() {
        let (vars, grads) = model(device, row)?;
        let mut adamw = candle_nn::AdamW::new(vars, params())?;
        contest.add_if_able(CANDLE, move || adamw.step(&grads));
    }
    if row.op != Op::Host {
        contest.add_copy(common::table::Row::bytes(row), device)?;
    }
    Ok(contest)
}

/// Two steps of a few tensors are candle-nn's.
fn check(device: &Device, config: AdamWConfig) -> Result<()> {
    let values = [[700, 1000], [3, 5]].map(|dims| Tensor::randn(0f32, 1., &dims[..], device));
    let values = values.into_iter().collect::<Result<Vec<_>>>()?;
    let vars = || values.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>();
    let (ours, theirs) = (vars()?, vars()?);
    let grads = |vars: &[Var]| {
        let mut grads = GradStore::default();
        for (var, value) in vars.iter().zip(&values) {
            grads.insert(var, value.clone());
        }
        grads
    };
    let mut adamw = AdamW::new(ours.clone(), config)?;
    let mut candle = candle_nn::AdamW::new(theirs.clone(), params())?;
    for _ in 0..2 {
        adamw.step(&grads(&ours))?;
        candle.step(&grads(&theirs))?;
    }
    ours.iter().zip(&theirs).try_for_each(|(a, b)| agree("AdamW", a, b, 1))
}
