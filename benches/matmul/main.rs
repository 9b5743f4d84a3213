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
mod contest;
mod cublaslt;
mod gpu;
mod rows;
mod sweep;
#[path = "../common/turns.rs"]
mod turns;

use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Instant;

use candle_core::{DType, Tensor};
use contest::{CANDLE, Contest, LT, LT_BEST, OURS};
use cublaslt::Library;
use gpu::Gpu;
use rows::{Op, Row};
use serde_json::{Value, json};
use turns::{median, take_turns};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const TORCH: &str = "torch";
/// An H200: dense 16-bit products by the data sheet, reads as measured.
const PEAK_TFLOPS: f64 = 989.0;
const PEAK_TB_PER_S: f64 = 4.55;

struct Args {
    groups: Option<String>,
    quick: bool,
    sustained: bool,
    torch: Option<PathBuf>,
    list: bool,
    sweep: Option<String>,
}

impl Args {
    fn parse() -> Result<Self> {
        use lexopt::prelude::*;
        let mut args = Self {
            groups: None,
            quick: false,
            sustained: false,
            torch: None,
            list: false,
            sweep: None,
        };
        let mut parser = lexopt::Parser::from_env();
        while let Some(arg) = parser.next()? {
            match arg {
                Long("rows") => args.groups = Some(parser.value()?.string()?),
                Long("quick") => args.quick = true,
                Long("sustained") => args.sustained = true,
                Long("torch") => args.torch = Some(parser.value()?.into()),
                Long("list") => args.list = true,
                Long("sweep") => args.sweep = Some(parser.value()?.string()?),
                Long("bench") => {} // cargo's
                _ => return Err(arg.unexpected().into()),
            }
        }
        for letter in args.groups.iter().flat_map(|groups| groups.split(',')) {
            if !rows::GROUPS.iter().any(|(group, _)| letter == group.to_string()) {
                return Err(format!("no group {letter:?} of rows: they are a to g").into());
            }
        }
        Ok(args)
    }

    fn wants(&self, group: char) -> bool {
        self.groups.as_ref().is_none_or(|groups| groups.contains(group))
    }
}

struct Time {
    name: &'static str,
    us: f64,
    /// Of the host's times, which interruptions only ever make longer.
    fastest_us: Option<f64>,
    sustained_us: Option<f64>,
}

/// A row and everyone's times, ours first.
struct Outcome {
    row: Row,
    times: Vec<Time>,
    notes: Vec<String>,
}

impl Outcome {
    fn ours(&self) -> &Time {
        &self.times[0]
    }

    fn of(&self, name: &str) -> Option<&Time> {
        self.times.iter().find(|time| time.name == name)
    }

    fn best_peer(&self) -> &Time {
        let peers = self.times[1..].iter();
        peers.min_by(|a, b| a.us.total_cmp(&b.us)).expect("each row has a peer")
    }

    /// Above 1 we are faster.
    fn ratio(&self) -> f64 {
        self.best_peer().us / self.ours().us
    }

    fn tflops(&self, us: f64) -> f64 {
        self.row.flops() / us / 1e6
    }
}

fn main() -> Result<()> {
    let args = Args::parse()?;
    let all: Vec<_> = rows::all().into_iter().filter(|row| args.wants(row.group)).collect();
    if args.list {
        let rows = all.iter().map(Row::json).collect::<Vec<_>>();
        println!("{}", serde_json::to_string_pretty(&rows)?);
        return Ok(());
    }
    let torch = args.torch.as_deref().map(read_torch).transpose()?;
    let mut gpu = Gpu::new(0)?;
    if let Some(filter) = &args.sweep {
        let directory = std::env::var("KAIO_BENCH_DIR").unwrap_or_else(|_| "out/bench".into());
        return sweep::run(&mut gpu, Path::new(&directory), filter);
    }
    first_calls(&gpu)?;
    let library = Library::new(gpu.device.as_cuda_device()?)?;
    println!(
        "{}; medians of bursts in µs; M×N×K; caches are flushed for M ≤ 64 and not for other rows\n\
         ratio = the best peer's time over ours: above 1 we are faster",
        gpu.name
    );
    let mut outcomes = Vec::new();
    let mut failures = 0;
    let directory = std::env::var("KAIO_BENCH_DIR").unwrap_or_else(|_| "out/bench".into());
    let directory = Path::new(&directory);
    for (group, heading) in rows::GROUPS {
        let group: Vec<_> = all.iter().filter(|row| row.group == group).collect();
        let Some(first) = group.first() else { continue };
        print_heading(first, heading);
        let before = outcomes.len();
        for row in group {
            match run(&mut gpu, &library, row, &args, torch.as_ref()) {
                Ok(outcome) => {
                    print_outcome(&outcome);
                    outcomes.push(outcome);
                }
                Err(error) => {
                    println!("{} FAILED: {error}", row.id());
                    failures += 1;
                }
            }
        }
        print_summary(&outcomes[before..]);
        save(&outcomes, &gpu.name, directory)?;
    }
    draw(&outcomes, &gpu.name, directory)?;
    match failures {
        0 => Ok(()),
        _ => Err(format!("{failures} rows failed").into()),
    }
}

fn run(
    gpu: &mut Gpu,
    library: &Rc<Library>,
    row: &Row,
    args: &Args,
    torch: Option<&Value>,
) -> Result<Outcome> {
    let Contest { mut contestants, notes } = contest::prepare(gpu, library, row)?;
    let time = |name, us| Time { name, us, fastest_us: None, sustained_us: None };
    let names: Vec<_> = contestants.iter().map(|c| c.name).collect();
    let mut times = Vec::new();
    if row.op == Op::Host {
        let rounds = if args.quick { 25 } else { 100 };
        let samples = take_turns(&mut contestants, rounds, |run| host_times(gpu, run))?;
        for (name, samples) in names.into_iter().zip(samples) {
            let samples = samples.concat();
            let fastest = samples.iter().copied().fold(f64::INFINITY, f64::min);
            times.push(Time { fastest_us: Some(fastest), ..time(name, median(samples)) });
        }
    } else {
        let (rounds, cold) = (row.rounds(args.quick), row.cold());
        let samples = take_turns(&mut contestants, rounds, |run| gpu.time(cold, run))?;
        times.extend(names.into_iter().zip(samples).map(|(name, s)| time(name, median(s))));
    }
    let mut outcome = Outcome { row: *row, times, notes };
    // Shorter calls do not heat a GPU up: the host cannot enqueue them fast enough.
    let sustained = args.sustained && row.layout == "nn" && row.dtype == DType::BF16;
    if sustained && row.op == Op::Matmul && !row.cold() && outcome.ours().us > 50.0 {
        sustain(gpu, &mut contestants, &mut outcome)?;
    }
    if let Some(us) = torch.and_then(|torch| torch["us"][row.id()].as_f64()) {
        outcome.times.push(time(TORCH, us));
    }
    Ok(outcome)
}

/// µs until each of a few calls returned. So few that the queue never fills.
fn host_times(
    gpu: &Gpu,
    run: &mut dyn FnMut() -> candle_core::Result<()>,
) -> candle_core::Result<Vec<f64>> {
    const CALLS: usize = 8;
    let mut times = Vec::new();
    for _ in 0..CALLS {
        let clock = Instant::now();
        run()?;
        times.push(clock.elapsed().as_secs_f64() * 1e6);
    }
    gpu.device.synchronize()?;
    Ok(times)
}

/// Ours and the best peer's in blocks, so that both have the temperature and clock of steady work.
fn sustain(
    gpu: &mut Gpu,
    contestants: &mut [turns::Contestant],
    outcome: &mut Outcome,
) -> Result<()> {
    const BLOCK_US: f64 = 300_000.0;
    const BLOCKS: usize = 3;
    let peer = outcome.best_peer().name;
    let mut blocks = [Vec::new(), Vec::new()];
    for block in 0..1 + BLOCKS {
        for (name, samples) in [OURS, peer].into_iter().zip(&mut blocks) {
            let run = contestants.iter_mut().find(|c| c.name == name).expect("it was timed");
            let burst = outcome.of(name).expect("it was timed").us;
            let us = gpu.block((BLOCK_US / burst).ceil() as usize, &mut run.run)?;
            if block > 0 {
                samples.push(us);
            }
        }
    }
    for (name, samples) in [OURS, peer].into_iter().zip(blocks) {
        let time = outcome.times.iter_mut().find(|time| time.name == name);
        time.expect("it was timed").sustained_us = Some(median(samples));
    }
    Ok(())
}

/// `{"peer": "torch 2.11", "us": {a row's id: µs}}`.
fn read_torch(path: &Path) -> Result<Value> {
    let torch: Value = serde_json::from_str(&std::fs::read_to_string(path)?)?;
    println!("{} from {}: timed by itself, not in turns", torch["peer"], path.display());
    Ok(torch)
}

fn print(ours: [&str; 5], peers: [&str; 4], ratio: &str, notes: &str) {
    let ([layout, shape, dtypes, us, rate], [candle, lt, lt_best, torch]) = (ours, peers);
    println!(
        "{layout:<6} {shape:<17} {dtypes:<10} {us:>9} {rate:>13} | {candle:>9} {lt:>9} \
         {lt_best:>9} {torch:>9} | {ratio:>5} {notes}"
    );
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

fn print_heading(first: &Row, heading: &str) {
    println!("\n{}: {heading}", first.group);
    print(
        ["layout", "shape", "dtype→out", "ours", ""],
        [CANDLE, LT, LT_BEST.trim_start_matches("cuBLASLt "), TORCH],
        "ratio",
        "best peer",
    );
}

fn print_outcome(outcome: &Outcome) {
    let (row, ours) = (&outcome.row, outcome.ours());
    let us = |name| outcome.of(name).map_or("–".into(), |time| format!("{:.1}", time.us));
    let rate = match row.op {
        Op::Host => String::new(),
        _ if row.cold() => format!("{:.0} GB/s", row.bytes() / ours.us / 1e3),
        _ => format!("{:.0} TFLOP/s", outcome.tflops(ours.us)),
    };
    let best = outcome.best_peer();
    let mut notes = vec![best.name.to_string()];
    if row.group == 'd' {
        let share = |us: f64| 100.0 * row.weight_bytes() / us / (PEAK_TB_PER_S * 1e6);
        let (ours, peer) = (share(ours.us), share(best.us));
        notes.push(format!("weights at {ours:.0} % of {PEAK_TB_PER_S} TB/s, peer {peer:.0} %"));
    }
    if row.op == Op::Host {
        let fastest = outcome.times.iter().filter_map(|t| Some((t.name, t.fastest_us?)));
        let fastest = fastest.map(|(name, us)| format!("{name} {us:.1}")).collect::<Vec<_>>();
        notes.push(format!("fastest: {}", fastest.join(", ")));
    }
    notes.extend_from_slice(&outcome.notes);
    let best_choice = match outcome.of(LT) {
        Some(_) if outcome.of(LT_BEST).is_none() => "first".into(),
        _ => us(LT_BEST),
    };
    print(
        [row.layout, &row.shape(), &row.dtypes(), &format!("{:.1}", ours.us), &rate],
        [&us(CANDLE), &us(LT), &best_choice, &us(TORCH)],
        &format!("{:.3}", outcome.ratio()),
        &notes.join("; "),
    );
    let sustained = outcome.times.iter().filter_map(|t| Some((t.name, t.sustained_us?)));
    if let [(_, ours), (peer, theirs)] = sustained.collect::<Vec<_>>()[..] {
        let (us, tflops) = (format!("{ours:.1}"), format!("{:.0} TFLOP/s", outcome.tflops(ours)));
        let ratio = format!("{:.3}", theirs / ours);
        print(
            ["", "  sustained", "", &us, &tflops],
            [""; 4],
            &ratio,
            &format!("{peer} {theirs:.1}"),
        );
    }
}

fn print_summary(outcomes: &[Outcome]) {
    let Some(worst) = outcomes.iter().min_by(|a, b| a.ratio().total_cmp(&b.ratio())) else {
        return;
    };
    let logs = outcomes.iter().map(|outcome| outcome.ratio().ln());
    let mean = (logs.sum::<f64>() / outcomes.len() as f64).exp();
    println!(
        "geometric mean of the {} ratios {mean:.3}, worst {:.3} ({})",
        outcomes.len(),
        worst.ratio(),
        worst.row.id()
    );
}

fn save(outcomes: &[Outcome], device: &str, directory: &Path) -> Result<()> {
    let json = outcomes.iter().map(|outcome| {
        let times = outcome.times.iter().map(|t| {
            json!({
                "name": t.name, "us": t.us, "tflops": outcome.tflops(t.us),
                "fastest_us": t.fastest_us, "sustained_us": t.sustained_us,
            })
        });
        json!({
            "device": device, "row": outcome.row.json(), "flops": outcome.row.flops(),
            "bytes": outcome.row.bytes(), "contestants": times.collect::<Vec<_>>(),
            "best_peer": outcome.best_peer().name, "ratio": outcome.ratio(),
            "notes": outcome.notes,
        })
    });
    std::fs::create_dir_all(directory)?;
    let path = directory.join("matmul-cuda.json");
    Ok(std::fs::write(path, serde_json::to_string_pretty(&json.collect::<Vec<_>>())?)?)
}

/// The single products under the roofs of memory and arithmetic.
fn draw(outcomes: &[Outcome], device: &str, directory: &Path) -> Result<()> {
    let products = || outcomes.iter().filter(|outcome| outcome.row.op == Op::Matmul);
    if products().next().is_some() {
        let series = |name: &str, us: fn(&Outcome) -> f64| chart::Series {
            name: name.into(),
            points: products().map(|o| (o.row.flops() / o.row.bytes(), o.tflops(us(o)))).collect(),
        };
        let series = [series(OURS, |o| o.ours().us), series("best peer", |o| o.best_peer().us)];
        let path = directory.join("matmul-cuda.png");
        let roofs = (PEAK_TB_PER_S, PEAK_TFLOPS);
        chart::roofline(&path, &format!("Matmul on {device}"), roofs, &series)?;
        println!("\nwrote {}", path.display());
    }
    println!("wrote {}", directory.join("matmul-cuda.json").display());
    Ok(())
}
