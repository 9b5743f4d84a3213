//! Lines of a table: a row, and everyone's times in it.

use candle_core::Result;
use serde_json::{Value, json};

use super::contest::Contest;
use super::gpu::{Gpu, PEAK_TB_PER_S};

/// What is timed.
pub trait Row: Copy {
    fn group(&self) -> char;

    /// Names the row to `scripts/torch_peers.py`.
    fn id(&self) -> String;

    /// What that script reads of it.
    fn json(&self) -> Value;

    fn flops(&self) -> f64;

    /// What one call has to read and write.
    fn bytes(&self) -> f64;

    /// Whether the operands come from memory, which then is the work.
    fn cold(&self) -> bool;

    /// Those of the operands that the work of a cold row is to read.
    fn cold_bytes(&self) -> f64;

    /// Whether the row is what a call costs the host.
    fn host(&self) -> bool;

    /// Whether `--sustained` is for this row.
    fn sustained(&self) -> bool;

    /// About as many rounds as fit a time budget on a current GPU.
    fn rounds(&self, quick: bool) -> usize {
        let us = (self.flops() / 600e6).max(self.bytes() / 4e6);
        let (budget_us, range) = if quick { (6_000.0, (8, 25)) } else { (40_000.0, (20, 100)) };
        ((budget_us / us) as usize).clamp(range.0, range.1)
    }

    fn tflops(&self, us: f64) -> f64 {
        self.flops() / us / 1e6
    }

    fn rate(&self, us: f64) -> String {
        match (self.host(), self.cold()) {
            (true, _) => String::new(),
            (_, true) => format!("{:.0} GB/s", self.cold_bytes() / us / 1e3),
            _ => format!("{:.0} TFLOP/s", self.tflops(us)),
        }
    }
}

/// A table of rows.
pub trait Bench {
    type Row: Row;
    /// What its files are called.
    const NAME: &str;
    /// Letters and headings.
    const GROUPS: &[(char, &str)];
    const LEGEND: &str;
    /// Headings and widths of the columns that say what a row is.
    const COLUMNS: &[(&str, usize)];
    /// Those who have a column of times, PyTorch's included.
    const PEERS: &[&'static str];

    fn cells(&self, row: &Self::Row) -> Vec<String>;

    fn prepare(&self, gpu: &mut Gpu, row: &Self::Row) -> Result<Contest>;

    /// Draws what there is to see.
    fn draw(&self, outcomes: &[Outcome<Self::Row>], gpu: &Gpu) -> super::Result<()>;
}

pub struct Time {
    pub name: &'static str,
    pub us: f64,
    /// Of the host's times, which interruptions only ever make longer.
    pub fastest_us: Option<f64>,
    pub sustained_us: Option<f64>,
}

impl Time {
    pub fn new(name: &'static str, us: f64) -> Self {
        Self { name, us, fastest_us: None, sustained_us: None }
    }
}

/// One of the times of a contestant.
type Pick = fn(&Time) -> Option<f64>;

const MEDIAN: Pick = |time| Some(time.us);
const PICKS: [(&str, Pick); 3] = [
    ("", MEDIAN),
    ("  fastest", |time| time.fastest_us),
    ("  sustained", |time| time.sustained_us),
];

/// A row and everyone's times, ours first.
pub struct Outcome<R> {
    pub row: R,
    pub times: Vec<Time>,
    pub notes: Vec<String>,
}

impl<R: Row> Outcome<R> {
    pub fn ours(&self) -> &Time {
        &self.times[0]
    }

    pub fn of(&self, name: &str) -> Option<&Time> {
        self.times.iter().find(|time| time.name == name)
    }

    pub fn best_peer(&self) -> Option<&Time> {
        self.best(MEDIAN)
    }

    fn best(&self, pick: Pick) -> Option<&Time> {
        let peers = self.times[1..].iter().filter(|&time| pick(time).is_some());
        peers.min_by(|a, b| pick(a).partial_cmp(&pick(b)).expect("times are numbers"))
    }

    /// Above 1 we are faster.
    fn ratio(&self, pick: Pick) -> Option<f64> {
        Some(pick(self.best(pick)?)? / pick(self.ours())?)
    }

    pub fn json(&self, device: &str) -> Value {
        let times = self.times.iter().map(|t| {
            json!({
                "name": t.name, "us": t.us, "tflops": self.row.tflops(t.us),
                "fastest_us": t.fastest_us, "sustained_us": t.sustained_us,
            })
        });
        json!({
            "device": device, "row": self.row.json(), "flops": self.row.flops(),
            "bytes": self.row.bytes(), "contestants": times.collect::<Vec<_>>(),
            "best_peer": self.best_peer().map(|peer| peer.name), "ratio": self.ratio(MEDIAN),
            "notes": self.notes,
        })
    }
}

const NONE: &str = "–";

pub fn print_heading<B: Bench>() {
    let cells: Vec<_> = B::COLUMNS.iter().map(|(name, _)| name.to_string()).collect();
    let peers: Vec<_> = B::PEERS.iter().map(|name| name.to_string()).collect();
    print::<B>(&cells, ["ours", ""], &peers, "ratio", "best peer");
}

pub fn print_outcome<B: Bench>(bench: &B, outcome: &Outcome<B::Row>) {
    for (name, pick) in PICKS {
        let Some(ours) = pick(outcome.ours()) else { continue };
        let us = |us: Option<f64>| us.map_or(NONE.into(), |us| format!("{us:.1}"));
        let peers: Vec<_> =
            B::PEERS.iter().map(|peer| us(outcome.of(peer).and_then(pick))).collect();
        let first = name.is_empty();
        let cells = if first { bench.cells(&outcome.row) } else { vec![name.into()] };
        let ratio = outcome.ratio(pick).map_or(NONE.into(), |ratio| format!("{ratio:.3}"));
        let notes = if first { notes(outcome) } else { String::new() };
        print::<B>(&cells, [&us(Some(ours)), &outcome.row.rate(ours)], &peers, &ratio, &notes);
    }
}

fn notes<R: Row>(outcome: &Outcome<R>) -> String {
    let (row, best) = (&outcome.row, outcome.best_peer());
    let mut notes = vec![best.map_or(NONE, |best| best.name).to_string()];
    if row.cold() {
        let share = |time: &Time| 100.0 * row.cold_bytes() / time.us / (PEAK_TB_PER_S * 1e6);
        let peer = best.map(|best| format!(", peer {:.0} %", share(best))).unwrap_or_default();
        notes.push(format!("{:.0} % of {PEAK_TB_PER_S} TB/s{peer}", share(outcome.ours())));
    }
    notes.extend_from_slice(&outcome.notes);
    notes.join("; ")
}

fn print<B: Bench>(
    cells: &[String],
    [us, rate]: [&str; 2],
    peers: &[String],
    ratio: &str,
    notes: &str,
) {
    for (i, (_, width)) in B::COLUMNS.iter().enumerate() {
        print!("{:<width$} ", cells.get(i).map_or("", |cell| cell));
    }
    print!("{us:>9} {rate:>13} |");
    for (us, name) in peers.iter().zip(B::PEERS) {
        print!(" {us:>width$}", width = name.len().max(9));
    }
    println!(" | {ratio:>5} {notes}");
}

pub fn print_summary<R: Row>(outcomes: &[Outcome<R>]) {
    let ratios = outcomes.iter().filter_map(|o| Some((o.row.id(), o.ratio(MEDIAN)?)));
    let ratios: Vec<_> = ratios.collect();
    let Some((id, worst)) = ratios.iter().min_by(|(_, a), (_, b)| a.total_cmp(b)) else { return };
    let logs = ratios.iter().map(|(_, ratio)| ratio.ln());
    let mean = (logs.sum::<f64>() / ratios.len() as f64).exp();
    println!("geometric mean of the {} ratios {mean:.3}, worst {worst:.3} ({id})", ratios.len());
}
