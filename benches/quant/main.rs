//! Products with quantised weights beside our own product of the same weight in 16 bits, on the first GPU:
//!
//! ```text
//! cargo bench --features cuda --bench quant -- --quick --rows a,b
//! ```
//!
//! - `--rows a,b`: only these groups (`rows.rs` has them)
//! - `--quick`: fewer rounds
//! - `--torch FILE`, `--list`: as for the bench `matmul`
//! - `--sweep all`: instead, every candidate of the choosers on many problems, or on those named
//!   (`1x4096x4096 int4,…`)
//!
//! Contestants take turns, on random inputs; weights come from memory where M ≤ 64: see benches/README.md.
//!
//! The table goes to the terminal, the same as JSON to `out/bench` (`KAIO_BENCH_DIR`).

#[path = "../common/mod.rs"]
mod common;
mod contest;
mod rows;
mod sweep;

use common::Result;
use common::args::Args;
use common::contest::{CANDLE, Contest};
use common::gpu::Gpu;
use common::race;
use common::table::{Bench, Outcome};
use lexopt::ValueExt as _;
use rows::Row;

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
    race::run(&Quant, &mut gpu, &rows, &args)
}

struct Quant;

impl Bench for Quant {
    type Row = Row;
    const NAME: &str = "quant";
    const GROUPS: &[(char, &str)] = &rows::GROUPS;
    const LEGEND: &str = "M×N×K; caches are flushed for M ≤ 64 and not for other rows";
    const COLUMNS: &[(&str, usize)] = &[("shape", 17), ("weight", 16), ("dtype", 5)];
    const PEERS: &[&'static str] = &[contest::DENSE, CANDLE, "torch"];

    fn cells(&self, row: &Row) -> Vec<String> {
        vec![row.shape(), row.weight.name(), row.dtype.as_str().into()]
    }

    fn prepare(&self, gpu: &mut Gpu, row: &Row) -> candle_core::Result<Contest> {
        contest::prepare(gpu, row)
    }

    fn draw(&self, _: &[Outcome<Row>], _: &Gpu) -> Result<()> {
        Ok(())
    }
}
