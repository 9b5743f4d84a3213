//! One table of all ops: `cargo bench` on the CPU, `cargo bench --features cuda` on the first GPU.
//!
//! Each row runs its contestants in turn, round by round, after warm-up rounds, on random inputs, and
//! shows medians. The table goes to the terminal, the same as JSON and as a chart to `out/bench`
//! (`KAIO_BENCH_DIR`). An argument keeps only the rows whose op contains it.

mod cases;
#[path = "../../examples/common/chart.rs"]
mod chart;
mod timing;

use std::path::{Path, PathBuf};

use candle_core::Device;
use cases::Case;
use timing::Timing;

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// A case and the timing of each contestant, the bridge first.
struct Row {
    case: Case,
    timings: Vec<Timing>,
}

impl Row {
    fn of(&self, name: &str) -> Option<&Timing> {
        let at = self.case.contestants.iter().position(|c| c.name == name)?;
        self.timings.get(at)
    }

    fn tflops(&self, timing: &Timing) -> f64 {
        self.case.flops / timing.total_us / 1e6
    }
}

fn main() -> Result<()> {
    let filter = std::env::args().skip(1).find(|arg| !arg.starts_with("--")).unwrap_or_default();
    let (device, name) = device()?;
    println!(
        "{name}; medians in µs; inputs random; ratio = peer's time / ours, above 1 we are faster"
    );
    println!(
        "{:<22} {:<26} {:>10} {:>8} | {:>10} {:>6} | {:>10} {:>6} {:<26} | {:>8} {:>8} {:>7}",
        "op",
        "shape",
        "µs",
        "TFLOP/s",
        "kaio-ops",
        "ratio",
        "candle",
        "ratio",
        "which",
        "host",
        "direct",
        "bridge"
    );
    let mut rows = Vec::new();
    for build in cases::all(&device) {
        if !build.op.contains(&filter) {
            continue;
        }
        let mut case = (build.build)(&device)?;
        let timings = timing::contest(&device, &mut case.contestants, case.rounds)?;
        let row = Row { case, timings };
        print(&row);
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

fn print(row: &Row) {
    let ours = &row.timings[0];
    let ratio = |peer: Option<&Timing>| match peer {
        Some(peer) => {
            (format!("{:.1}", peer.total_us), format!("{:.2}", peer.total_us / ours.total_us))
        }
        None => ("–".into(), "–".into()),
    };
    let direct = row.of("kaio-ops");
    let peer = row.case.contestants.iter().find(|c| c.name.starts_with("candle"));
    let peer_name = peer.map_or("", |c| c.name);
    let (direct_us, direct_ratio) = ratio(direct);
    let (peer_us, peer_ratio) = ratio(row.of(peer_name));
    let (host_direct, bridge) = match direct {
        Some(direct) => {
            (format!("{:.1}", direct.host_us), format!("{:+.1}", ours.host_us - direct.host_us))
        }
        None => ("–".into(), "–".into()),
    };
    println!(
        "{:<22} {:<26} {:>10.1} {:>8.2} | {direct_us:>10} {direct_ratio:>6} | {peer_us:>10} \
         {peer_ratio:>6} {peer_name:<26} | {:>8.1} {host_direct:>8} {bridge:>7}",
        row.case.op,
        row.case.shape,
        ours.total_us,
        row.tflops(ours),
        ours.host_us
    );
}

fn save(rows: &[Row], device: &str, directory: &Path, kind: &str) -> Result<()> {
    std::fs::create_dir_all(directory)?;
    let json: Vec<_> = rows
        .iter()
        .map(|row| {
            let contestants = row.case.contestants.iter().zip(&row.timings).map(|(c, t)| {
                serde_json::json!({
                    "name": c.name, "us": t.total_us, "host_us": t.host_us, "tflops": row.tflops(t),
                })
            });
            serde_json::json!({
                "device": device, "op": row.case.op, "shape": row.case.shape,
                "flops": row.case.flops, "contestants": contestants.collect::<Vec<_>>(),
            })
        })
        .collect();
    let path = directory.join(format!("ops-{kind}.json"));
    std::fs::write(&path, serde_json::to_string_pretty(&json)?)?;
    let groups: Vec<(String, Vec<(String, f64)>)> = rows
        .iter()
        .map(|row| {
            let bars = row.case.contestants.iter().zip(&row.timings).map(|(c, t)| {
                let family = if c.name.starts_with("candle") { "candle" } else { c.name };
                (family.to_string(), row.tflops(t))
            });
            (format!("{} {}", row.case.op, row.case.shape), bars.collect())
        })
        .collect();
    let picture = directory.join(format!("ops-{kind}.png"));
    chart::bar_chart(&picture, &format!("kaio-candle on {device}"), "TFLOP/s", &groups)?;
    println!("wrote {} and {}", path.display(), picture.display());
    Ok(())
}
