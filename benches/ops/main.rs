//! One table of all ops: `cargo bench` on the CPU, `cargo bench --features cuda --bench ops` on the
//! first GPU.
//!
//! Each row runs its contestants in turn, round by round, after warm-up rounds, on random inputs, and
//! shows the median µs from start to end (device events on a GPU; caches are not flushed), and the
//! host's µs until the call returned in the fastest round, ours and that of a direct call of kaio-ops
//! into a result that exists, where it has the op.
//!
//! The table goes to the terminal, the same as JSON and as a chart to `out/bench`
//! (`KAIO_BENCH_DIR`). An argument keeps only the rows whose op contains it.

mod cases;
#[path = "../../examples/common/chart.rs"]
mod chart;
#[cfg(feature = "cuda")]
mod direct;
mod timing;
#[path = "../common/turns.rs"]
mod turns;
#[path = "../common/unfused.rs"]
mod unfused;

use std::path::{Path, PathBuf};

use candle_core::Device;
use cases::Case;
use timing::Timing;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A case and the timing of each contestant, ours first.
struct Row {
    case: Case,
    timings: Vec<Timing>,
}

impl Row {
    /// The contestants' names and timings.
    fn all(&self) -> impl Iterator<Item = (&'static str, &Timing)> {
        self.case.contestants.iter().map(|c| c.name).zip(&self.timings)
    }

    fn of(&self, name: &str) -> Option<&Timing> {
        self.all().find(|(n, _)| *n == name).map(|(_, timing)| timing)
    }

    fn tflops(&self, timing: &Timing) -> f64 {
        self.case.flops / timing.total_us / 1e6
    }
}

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let (device, name) = device()?;
    println!("{name}; medians; ratio = the peer's time over ours: above 1 we are faster");
    print(
        ["op", "shape", "µs", "TFLOP/s"],
        ["kaio-ops", "ratio"],
        ["candle", "ratio", "its op"],
        ["host", "direct"],
    );
    let mut rows = Vec::new();
    for case in cases::all(&device) {
        if !case.op.contains(&filter) {
            continue;
        }
        let mut case = (case.build)(&device)?;
        let timings = timing::contest(&device, &mut case.contestants, case.rounds)?;
        let row = Row { case, timings };
        show(&row);
        rows.push(row);
    }
    let directory = std::env::var("KAIO_BENCH_DIR").unwrap_or_else(|_| "out/bench".into());
    save(&rows, &name, &PathBuf::from(directory), if device.is_cpu() { "cpu" } else { "cuda" })
}

/// The device and what to call it.
fn device() -> Result<(Device, String)> {
    #[cfg(feature = "cuda")]
    {
        let device = Device::new_cuda(0)?;
        let info = kaio_candle::registry::device(0)?.info()?;
        Ok((device, info.name))
    }
    #[cfg(not(feature = "cuda"))]
    Ok((Device::Cpu, format!("CPU, {} threads", rayon::current_num_threads())))
}

fn print(ours: [&str; 4], direct: [&str; 2], candle: [&str; 3], host: [&str; 2]) {
    let [op, shape, us, tflops] = ours;
    let ([direct, direct_ratio], [candle, ratio, its_op]) = (direct, candle);
    let [host, host_direct] = host;
    println!(
        "{op:<26} {shape:<18} {us:>9} {tflops:>8} | {direct:>9} {direct_ratio:>5} | {candle:>9} \
         {ratio:>5} {its_op:<26} | {host:>8} {host_direct:>8}"
    );
}

fn show(row: &Row) {
    let ours = &row.timings[0];
    let number = |x: f64| format!("{x:.1}");
    let or_dash = |x: Option<String>| x.unwrap_or_else(|| "–".into());
    let us = |peer: Option<&Timing>| or_dash(peer.map(|t| number(t.total_us)));
    let ratio =
        |peer: Option<&Timing>| or_dash(peer.map(|t| format!("{:.2}", t.total_us / ours.total_us)));
    let direct = row.of("kaio-ops");
    let (its_op, candle) = row.all().find(|(name, _)| name.starts_with("candle")).unzip();
    print(
        [row.case.op, &row.case.shape, &number(ours.total_us), &format!("{:.2}", row.tflops(ours))],
        [&us(direct), &ratio(direct)],
        [&us(candle), &ratio(candle), its_op.unwrap_or("–")],
        [&number(ours.host_us), &or_dash(direct.map(|t| number(t.host_us)))],
    );
}

fn save(rows: &[Row], device: &str, directory: &Path, kind: &str) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let json = rows.iter().map(|row| {
        let contestants = row.all().map(|(name, t)| {
            serde_json::json!({
                "name": name, "us": t.total_us, "host_us": t.host_us, "tflops": row.tflops(t),
            })
        });
        serde_json::json!({
            "device": device, "op": row.case.op, "shape": row.case.shape,
            "flops": row.case.flops, "contestants": contestants.collect::<Vec<_>>(),
        })
    });
    let path = directory.join(format!("ops-{kind}.json"));
    std::fs::write(&path, serde_json::to_string_pretty(&json.collect::<Vec<_>>())?)?;

    // Times of one op say nothing beside those of another: each group has its own scale.
    let groups: Vec<_> = rows.iter().map(group).collect();
    let picture = directory.join(format!("ops-{kind}.png"));
    chart::bar_chart(&picture, &format!("Speed on {device}"), "% of the fastest", &groups)?;
    println!("wrote {} and {}", path.display(), picture.display());
    Ok(())
}

/// One op's bars.
fn group(row: &Row) -> (String, Vec<(String, f64)>) {
    let best = row.all().map(|(_, t)| t.total_us).fold(f64::INFINITY, f64::min);
    let bars = row.all().map(|(name, t)| {
        let family = if name.starts_with("candle") { "candle" } else { name };
        (family.to_string(), 100.0 * best / t.total_us)
    });
    let label = format!("{} {}, {:.0} µs", row.case.op, row.case.shape, row.timings[0].total_us);
    (label, bars.collect())
}
