//! Our matmul beside candle's own (cuBLAS), cuBLASLt and, from a file, PyTorch, on the first GPU:
//!
//! ```text
//! cargo bench --features cuda --bench matmul -- --quick --rows a,c
//! ```
//!
//! - `--rows a,c`: only these groups (`rows.rs` has them)
//! - `--quick`: fewer rounds
//! - `--sustained`: for long bf16 products of row-major operands also blocks of 0.3 s, ours and the best
//!   peer's in turn, under the power cap
//! - `--torch FILE`: PyTorch's times as one more peer (`scripts/torch_peers.py` makes them)
//! - `--list`: the rows as JSON, and no GPU
//! - `--sweep all`: instead, every candidate of the chooser on many problems, or on those named
//!   (`1x4096x4096 nn,…`)
//!
//! Contestants take turns in each round, on random inputs; times are medians of device events around
//! one call, while the GPU is kept busy until the call is enqueued, and with rests between that keep
//! it under its power cap. cuBLASLt writes to memory that exists; candle and we allocate.
//!
//! The table goes to the terminal, the same as JSON and a roofline to `out/bench` (`KAIO_BENCH_DIR`).

#[path = "../../examples/common/chart.rs"]
mod chart;
#[path = "../common/mod.rs"]
mod common;
mod contest;
mod cublaslt;
mod rows;
mod sweep;
#[path = "../common/upstream.rs"]
mod upstream;

use std::rc::Rc;
use std::time::Instant;

use candle_core::{DType, Tensor};
use common::Result;
use common::args::{Args, directory};
use common::contest::{CANDLE, Contest, OURS};
use common::gpu::{Gpu, PEAK_TB_PER_S};
use common::race;
use common::table::{Bench, Outcome, Row as _};
use contest::{LT, LT_BEST};
use cublaslt::Library;
use lexopt::ValueExt as _;
use rows::{Op, Row};

/// An H200: dense 16-bit products by the data sheet.
const PEAK_TFLOPS: f64 = 989.0;

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
    first_calls(&gpu)?;
    let library = Library::new(gpu.device.as_cuda_device()?)?;
    race::run(&Matmul { library }, &mut gpu, &rows, &args)
}

struct Matmul {
    library: Rc<Library>,
}

impl Bench for Matmul {
    type Row = Row;
    const NAME: &str = "matmul";
    const GROUPS: &[(char, &str)] = &rows::GROUPS;
    const LEGEND: &str = "M×N×K; caches are flushed for M ≤ 64 and not for other rows";
    const COLUMNS: &[(&str, usize)] = &[("shape", 17), ("layout", 6), ("dtype→out", 10)];
    const PEERS: &[&'static str] = &[CANDLE, LT, LT_BEST, "torch"];

    fn cells(&self, row: &Row) -> Vec<String> {
        vec![row.shape(), row.layout.into(), row.dtypes()]
    }

    fn prepare(&self, gpu: &mut Gpu, row: &Row) -> candle_core::Result<Contest> {
        contest::prepare(gpu, &self.library, row)
    }

    /// The single products under the roofs of memory and arithmetic.
    fn draw(&self, outcomes: &[Outcome<Row>], gpu: &Gpu) -> Result<()> {
        let points = |us: fn(&Outcome<Row>) -> Option<f64>| {
            let products = outcomes.iter().filter(|outcome| outcome.row.op == Op::Matmul);
            let point =
                |o: &Outcome<Row>| Some((o.row.flops() / o.row.bytes(), o.row.tflops(us(o)?)));
            products.filter_map(point).collect::<Vec<_>>()
        };
        let ours = points(|o| Some(o.ours().us));
        if ours.is_empty() {
            return Ok(());
        }
        let best = points(|o| Some(o.best_peer()?.us));
        let series = [(OURS, ours), ("best peer", best)];
        let series = series.map(|(name, points)| chart::Series { name: name.into(), points });
        let path = directory().join("matmul-cuda.png");
        let roofs = (PEAK_TB_PER_S, PEAK_TFLOPS);
        chart::roofline(
            &path,
            &format!("Matmul, {}, {}", gpu.name, common::today()),
            roofs,
            &series,
        )?;
        println!("wrote {}", path.display());
        Ok(())
    }
}

/// What a kernel costs once in a process: it is written and compiled (or found in
/// `KAIO_CACHE_DIR`), while the call waits.
fn first_calls(gpu: &Gpu) -> Result<()> {
    use kaio_candle::prelude::*;
    let x = Tensor::randn(0f32, 1., (1024, 4096), &gpu.device)?;
    let x = x.to_dtype(DType::BF16)?;
    for (name, rows) in [("1024", 1024), ("1", 1)] {
        let (a, opts) = (x.narrow(0, 0, rows)?, MatmulOptions::default());
        let call = || -> Result<f64> {
            let start = Instant::now();
            drop(a.kaio_matmul_with(&x.t()?, &opts)?);
            Ok(start.elapsed().as_secs_f64() * 1e3)
        };
        let (first, second) = (call()?, call()?);
        println!("first call, {name}×1024×4096 bf16→f32: {first:.1} ms, second {second:.3} ms");
    }
    Ok(())
}
