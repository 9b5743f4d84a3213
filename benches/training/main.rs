//! What a training step is made of besides products and attention, on the first GPU: each way, forward and backward, beside
//! a copy of as many bytes, which is as fast as memory is, and candle's own ops.
//!
//! ```text
//! cargo bench --features cuda --bench training -- --quick --rows a,b
//! ```
//!
//! - `--rows a,b`: only these groups (`rows.rs` has them)
//! - `--quick`: fewer rounds
//! - `--torch FILE`, `--list`: as for the bench `matmul`
//!
//! A backward pass is the op's gradient alone, from a random upstream gradient. The ratio is to the copy: the share of the
//! memory's speed, measured in turns. L2 is flushed: see benches/README.md.
//!
//! The table goes to the terminal, and as JSON to `out/bench` (`KAIO_BENCH_DIR`).

#[path = "../common/mod.rs"]
mod common;
mod contest;
mod loss;
mod rows;
mod table;

use common::Result;
use common::args::Args;
use common::contest::{CANDLE, COPY, Contest};
use common::gpu::Gpu;
use common::race;
use common::table::{Bench, Outcome};
use rows::Row;

fn main() -> Result<()> {
    let args = Args::parse(&rows::GROUPS, |_, _| Ok(false))?;
    let rows = args.select(rows::all());
    if args.list {
        return race::list(&rows);
    }
    race::run(&Training, &mut Gpu::new(0)?, &rows, &args)
}

struct Training;

impl Bench for Training {
    type Row = Row;
    const NAME: &str = "training";
    const GROUPS: &[(char, &str)] = &rows::GROUPS;
    const LEGEND: &str = "the ratio to the copy is the share of the memory's speed";
    const COLUMNS: &[(&str, usize)] = &[("op", 20), ("shape", 21), ("dtype", 5), ("pass", 8)];
    const PEERS: &[&'static str] = &[COPY, CANDLE, "torch", "compiled"];

    fn cells(&self, row: &Row) -> Vec<String> {
        vec![row.op.name().into(), row.shape(), row.dtype.as_str().into(), row.pass.name().into()]
    }

    fn prepare(&self, gpu: &mut Gpu, row: &Row) -> candle_core::Result<Contest> {
        contest::prepare(gpu, row)
    }

    /// A table says it all.
    fn draw(&self, _: &[Outcome<Row>], _: &Gpu) -> Result<()> {
        Ok(())
    }
}
