//! Our flash attention beside candle's own operations and, from a file, PyTorch's with cuDNN and with
//! FlashAttention, on the first GPU:
//!
//! ```text
//! cargo bench --features cuda --bench attention -- --quick --rows a,c
//! ```
//!
//! - `--rows a,c`: only these groups (`rows.rs` has them)
//! - `--quick`: fewer rounds
//! - `--sustained`: for long bf16 calls also blocks of 0.3 s, ours and the best peer's in turn, under the
//!   power cap
//! - `--torch FILE`: PyTorch's times (`scripts/torch_peers.py` makes them)
//! - `--list`: the rows as JSON, and no GPU
//! - `--sweep 64,128`: instead, many configurations for heads of these widths
//! - `--accuracy FILE`: instead, inputs and our results, whose errors `scripts/torch_peers.py --accuracy FILE`
//!   prints beside those of PyTorch's
//! - `--errors FILE`: the same of gradients
//!
//! It measures as the matmul bench does: contestants in turns, random inputs, device events around one
//! call of a GPU that was kept busy, medians, rests. candle multiplies, scales, masks, takes the softmax
//! and multiplies, where the scores fit easily; PyTorch has no turns. The backward pass is that of the op
//! alone, as PyTorch's is, given a random upstream gradient: candle's graph would add a few kernels of its own.
//!
//! The table goes to the terminal, the same as JSON and a chart to `out/bench` (`KAIO_BENCH_DIR`).

mod accuracy;
mod backward;
#[path = "../../examples/common/chart.rs"]
mod chart;
#[path = "../common/mod.rs"]
mod common;
mod contest;
mod rows;
mod sweep;
#[path = "../common/unfused.rs"]
mod unfused;

use candle_core::DType;
use common::args::{Args, directory};
use common::contest::{CANDLE, Contest, OURS};
use common::gpu::Gpu;
use common::table::{Bench, Outcome, Row as _, Time};
use common::{Result, race};
use lexopt::ValueExt as _;
use rows::Row;

/// As `scripts/torch_peers.py` calls them.
const CUDNN: &str = "cuDNN";
const FLASH: &str = "FlashAttention";
/// Our own backward pass, where the deterministic one is timed.
const DEFAULT: &str = "default";

fn main() -> Result<()> {
    let (mut sweep, mut accuracy, mut errors) = (None, None, None);
    let args = Args::parse(&rows::GROUPS, |option, parser| {
        match option {
            "sweep" => sweep = Some(parser.value()?.string()?),
            "accuracy" => accuracy = Some(parser.value()?),
            "errors" => errors = Some(parser.value()?),
            _ => return Ok(false),
        }
        Ok(true)
    })?;
    let rows = args.select(rows::all());
    if args.list {
        return race::list(&rows);
    }
    let mut gpu = Gpu::new(0)?;
    if let Some(widths) = &sweep {
        return sweep::run(&mut gpu, widths);
    }
    if let Some(path) = &accuracy {
        return accuracy::results(&gpu.device, path.as_ref());
    }
    if let Some(path) = &errors {
        return accuracy::gradients(&gpu.device, path.as_ref());
    }
    race::run(&Attention, &mut gpu, &rows, &args)
}

struct Attention;

impl Bench for Attention {
    type Row = Row;
    const NAME: &str = "attention";
    const GROUPS: &[(char, &str)] = &rows::GROUPS;
    const LEGEND: &str = "B batches of H heads (of queries/of keys) of S positions (queries/keys), \
         D wide; 4·B·H·S·S·D FLOP forward and 2.5 times as many backward, half of them if causal; \
         GB/s of keys and values, and caches flushed, for decoding";
    const COLUMNS: &[(&str, usize)] = &[("shape", 25), ("mask", 11), ("dtype", 5), ("pass", 8)];
    const PEERS: &[&'static str] = &[CANDLE, CUDNN, FLASH, DEFAULT];

    fn cells(&self, row: &Row) -> Vec<String> {
        [row.shape(), row.mask(), row.dtype.as_str().into(), row.pass().into()].into()
    }

    fn prepare(&self, gpu: &mut Gpu, row: &Row) -> candle_core::Result<Contest> {
        contest::prepare(gpu, row)
    }

    /// How fast we and cuDNN are by the length, forward and backward.
    fn draw(&self, outcomes: &[Outcome<Row>], gpu: &Gpu) -> Result<()> {
        chart(outcomes, gpu, ['a', 'b', 'c', 'd'], "Flash attention", "attention-cuda.png")?;
        let (title, file) = ("Flash attention, backward", "attention-backward-cuda.png");
        chart(outcomes, gpu, ['l', 'm', 'n', 'o'], title, file)
    }
}

/// `groups`: of D 128, D 128 causal, D 64 and D 64 causal.
fn chart(
    outcomes: &[Outcome<Row>],
    gpu: &Gpu,
    groups: [char; 4],
    title: &str,
    file: &str,
) -> Result<()> {
    let line = |group, case, contestant: &str| {
        let points = outcomes.iter().filter_map(|o| {
            let time: &Time = o.of(contestant)?;
            Some((o.row.keys as f64, o.row.tflops(time.us)))
                .filter(|_| o.row.group == group && o.row.dtype == DType::BF16)
        });
        chart::Series { name: format!("{contestant}, {case}"), points: points.collect() }
    };
    let cases = ["D 128", "D 128 causal", "D 64", "D 64 causal"];
    let pair = |i: usize| [OURS, CUDNN].map(|who| line(groups[i], cases[i], who));
    let pairs = [0, 1, 2, 3].map(pair);
    if pairs.iter().flatten().all(|line| line.points.len() < 2) {
        return Ok(());
    }
    let path = directory().join(file);
    let title = format!("{title}, bf16, {}, {}", gpu.name, common::today());
    chart::pair_chart(&path, &title, "S", "TFLOP/s", &pairs)?;
    println!("wrote {}", path.display());
    Ok(())
}
