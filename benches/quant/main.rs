//! What quantised weights are for, through the methods that users call, beside our own product of the same weight in 16 bits,
//! on the first GPU:
//!
//! ```text
//! cargo bench --features cuda --bench quant -- --quick --rows a,b
//! ```
//!
//! - `--rows a,b`: only these groups (`rows.rs` has them)
//! - `--quick`: fewer rounds
//! - `--torch FILE`, `--list`: as for the bench `matmul`
//! - `--sweep all`: instead, every candidate of the choosers of all schemes on many problems, or on those named
//!   (`1x4096x4096 int4-g128,…`)
//!
//! Contestants take turns, on random inputs; weights come from memory where M ≤ 64: see benches/README.md.
//!
//! The table goes to the terminal, the same as JSON and a chart of times to `out/bench` (`KAIO_BENCH_DIR`).

#[path = "../../examples/common/chart.rs"]
mod chart;
mod codes;
#[path = "../common/mod.rs"]
mod common;
mod contest;
mod rows;
mod sweep;
mod sweep_bytes;
#[path = "../common/upstream.rs"]
mod upstream;

use candle_core::DType;
use common::Result;
use common::args::{Args, directory};
use common::contest::{CANDLE, Contest, OURS};
use common::gpu::Gpu;
use common::race;
use common::table::{Bench, Outcome, Row as _};
use kaio_candle::prelude::{Activations, QuantScheme};
use lexopt::ValueExt as _;
use rows::{Op, Row};

fn main() -> Result<()> {
    let mut sweep = None;
    let args = Args::parse(&rows::GROUPS, |option, parser| {
        if option == "sweep" {
            sweep = Some(parser.value()?.string()?);
        }
        Ok(option == "sweep")
    })?;
    let rows = args.select(rows::all());
    if args.list {
        return race::list(&rows);
    }
    let mut gpu = Gpu::new(0)?;
    if let Some(filter) = &sweep {
        return sweep::run(&mut gpu, filter);
    }
    race::run(&Quant::default(), &mut gpu, &rows, &args)
}

#[derive(Default)]
struct Quant {
    weights: contest::Weights,
}

impl Bench for Quant {
    type Row = Row;
    const NAME: &str = "quant";
    const GROUPS: &[(char, &str)] = &rows::GROUPS;
    const LEGEND: &str = "M×N×K; caches are flushed for M ≤ 64 and not for other rows";
    const COLUMNS: &[(&str, usize)] = &[("shape", 17), ("weight", 16), ("dtype", 5), ("what", 10)];
    const PEERS: &[&'static str] = &[contest::DENSE, contest::APART, CANDLE, "tinygemm", "torch"];

    fn cells(&self, row: &Row) -> Vec<String> {
        vec![row.shape(), row.weight(), row.dtype.as_str().into(), row.op().into()]
    }

    fn prepare(&self, gpu: &mut Gpu, row: &Row) -> candle_core::Result<Contest> {
        self.weights.prepare(gpu, row)
    }

    /// The time of a product by the rows of its activations.
    fn draw(&self, outcomes: &[Outcome<Row>], gpu: &Gpu) -> Result<()> {
        const SIDE: usize = 8192;
        let line = |name: &str, scheme: QuantScheme, how, contestant| {
            let of = |row: &Row| {
                (row.op, row.scheme, row.dtype) == (Op::Product(how), scheme, DType::BF16)
                    && (row.n, row.k, row.host()) == (SIDE, SIDE, false)
            };
            let times = outcomes.iter().filter(|outcome| of(&outcome.row));
            let points = times.filter_map(|o| Some((o.row.m as f64, o.of(contestant)?.us)));
            chart::Series { name: name.into(), points: points.collect() }
        };
        let series = [
            line("bf16", rows::INT4, Activations::Float, contest::DENSE),
            line("int4", rows::INT4, Activations::Float, OURS),
            line("int8, activations rounded to int8", rows::INT8, Activations::Int8, OURS),
            line("fp8, activations rounded to fp8", rows::FP8, Activations::Fp8, OURS),
        ];
        if series.iter().all(|line| line.points.len() < 2) {
            return Ok(());
        }
        let path = directory().join("quant-cuda.png");
        let title = format!("M×{SIDE}×{SIDE}, {}, {}", gpu.name, common::today());
        chart::log_chart(&path, &title, "M", "µs", &series)?;
        println!("wrote {}", path.display());
        Ok(())
    }
}
