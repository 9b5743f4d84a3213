//! All rows, one after the other.

use std::time::Instant;

use serde_json::Value;

use super::Result;
use super::args::{Args, directory};
use super::contest::{Contest, OURS};
use super::gpu::Gpu;
use super::table::{Bench, Outcome, Row, Time, print_heading, print_outcome, print_summary};
use super::today;
use super::turns::{Contestant, median, take_turns};

/// The rows as JSON.
pub fn list<R: Row>(rows: &[R]) -> Result<()> {
    let rows = rows.iter().map(Row::json).collect::<Vec<_>>();
    println!("{}", serde_json::to_string_pretty(&rows)?);
    Ok(())
}

pub fn run<B: Bench>(bench: &B, gpu: &mut Gpu, rows: &[B::Row], args: &Args) -> Result<()> {
    let torch = args.torch()?;
    println!(
        "{}, {}; medians of bursts in µs; {}\n\
         ratio = the best peer's time over ours: above 1 we are faster",
        gpu.name,
        today(),
        B::LEGEND
    );
    let (mut outcomes, mut failures) = (Vec::new(), 0);
    for &(letter, heading) in B::GROUPS {
        let before = outcomes.len();
        let mut group = rows.iter().filter(|row| row.group() == letter).peekable();
        if group.peek().is_none() {
            continue;
        }
        println!("\n{letter}: {heading}");
        print_heading::<B>();
        for row in group {
            match race(bench, gpu, row, args, torch.as_ref()) {
                Ok(outcome) => {
                    print_outcome(bench, &outcome);
                    outcomes.push(outcome);
                }
                Err(error) => {
                    println!("{} FAILED: {error}", row.id());
                    failures += 1;
                }
            }
        }
        print_summary(&outcomes[before..]);
        save::<B>(&outcomes, &gpu.name)?;
    }
    println!("\nwrote {}", directory().join(format!("{}-cuda.json", B::NAME)).display());
    bench.draw(&outcomes, gpu)?;
    match failures {
        0 => Ok(()),
        _ => Err(format!("{failures} rows failed").into()),
    }
}

fn race<B: Bench>(
    bench: &B,
    gpu: &mut Gpu,
    row: &B::Row,
    args: &Args,
    torch: Option<&Value>,
) -> Result<Outcome<B::Row>> {
    gpu.new_contest();
    let Contest { mut contestants, notes } = bench.prepare(gpu, row)?;
    let names: Vec<_> = contestants.iter().map(|c| c.name).collect();
    let mut times = Vec::new();
    if row.host() {
        let rounds = if args.quick { 25 } else { 100 };
        let samples = take_turns(&mut contestants, rounds, |run| host_times(gpu, run))?;
        for (name, samples) in names.into_iter().zip(samples) {
            let samples = samples.concat();
            let fastest = samples.iter().copied().fold(f64::INFINITY, f64::min);
            times.push(Time { fastest_us: Some(fastest), ..Time::new(name, median(samples)) });
        }
    } else {
        let (rounds, cold) = (row.rounds(args.quick), row.cold());
        let samples = take_turns(&mut contestants, rounds, |run| gpu.time(cold, run))?;
        times.extend(names.into_iter().zip(samples).map(|(name, s)| Time::new(name, median(s))));
    }
    let mut outcome = Outcome { row: *row, times, notes };
    // Shorter calls do not heat a GPU up: the host cannot enqueue them fast enough.
    if args.sustained && row.sustained() && outcome.ours().us > 50.0 {
        sustain(gpu, &mut contestants, &mut outcome)?;
    }
    for &peer in B::PEERS {
        let us = torch.and_then(|torch| torch["us"][row.id()][peer].as_f64());
        outcome.times.extend(us.map(|us| Time::new(peer, us)));
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
fn sustain<R: Row>(
    gpu: &mut Gpu,
    contestants: &mut [Contestant],
    outcome: &mut Outcome<R>,
) -> Result<()> {
    const BLOCK_US: f64 = 300_000.0;
    const BLOCKS: usize = 3;
    let names = [Some(OURS), outcome.best_peer().map(|peer| peer.name)];
    let mut blocks = names.map(|_| Vec::new());
    for block in 0..1 + BLOCKS {
        for (name, samples) in names.iter().flatten().zip(&mut blocks) {
            let run = contestants.iter_mut().find(|c| c.name == *name).expect("it was timed");
            let burst = outcome.of(name).expect("it was timed").us;
            let us = gpu.block((BLOCK_US / burst).ceil() as usize, &mut run.run)?;
            if block > 0 {
                samples.push(us);
            }
        }
    }
    for (name, samples) in names.iter().flatten().zip(blocks) {
        let time = outcome.times.iter_mut().find(|time| time.name == *name);
        time.expect("it was timed").sustained_us = Some(median(samples));
    }
    Ok(())
}

fn save<B: Bench>(outcomes: &[Outcome<B::Row>], device: &str) -> Result<()> {
    let json: Vec<_> = outcomes.iter().map(|outcome| outcome.json(device)).collect();
    let directory = directory();
    std::fs::create_dir_all(&directory)?;
    let path = directory.join(format!("{}-cuda.json", B::NAME));
    Ok(std::fs::write(path, serde_json::to_string_pretty(&json)?)?)
}
