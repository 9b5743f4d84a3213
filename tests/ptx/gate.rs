//! Everything that can be chosen assembles: no spills, no advice of the assembler's, no more
//! registers and shared memory than before.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::assembler::Assembler;
use crate::cache::Cache;
use crate::choices::{Choice, choices, on_all_cores, spread};
use crate::families::Extent;
use crate::ratchet::{Measured, Ratchet, Use};
use crate::{RATCHET, golden_folder, instructions, say, set};

/// Kernels of the sample.
const SAMPLE: usize = 60;

/// The assembler, or a loud skip.
fn assembler() -> Option<Assembler> {
    let found = Assembler::find();
    if found.is_none() {
        let why = "no ptxas in PATH or $CUDA_HOME/bin (scripts/cuda-toolchain.sh makes one)";
        assert!(!set("KAIO_REQUIRE_PTXAS"), "KAIO_REQUIRE_PTXAS=1, but there is {why}");
        say(&format!("SKIPPED, {why}"));
    }
    found
}

#[test]
fn what_is_chosen_assembles() {
    let Some(assembler) = assembler() else { return };
    let bless = set("KAIO_BLESS");
    let all = bless || set("KAIO_REQUIRE_PTXAS");
    let start = Instant::now();
    let mut found = choices(Extent::Few);
    let choices = match all {
        // What a sample may take is among it, so that the ratchet knows its variants.
        true => {
            found.extend(choices(Extent::All));
            found.into_iter().collect()
        }
        false => sample(found),
    };
    let chosen = start.elapsed();
    let cache = cache();
    let (measured, failures) = assemble(&assembler, &choices, &cache);
    if all {
        cache.forget_unused();
    }
    say(&format!(
        "ptxas {}: {} of {} chosen kernels assemble cleanly, {} of them as found before \
         (KAIO_CI_ALL=1 asks ptxas again){}; choosing {:.0?}, all {:.0?}",
        assembler.release,
        measured.len(),
        choices.len(),
        cache.found(),
        if all { "" } else { " (a sample: KAIO_REQUIRE_PTXAS=1 takes all)" },
        chosen,
        start.elapsed()
    ));
    for (family, worst) in worst(&measured) {
        say(&format!("most registers: {worst:3} {family}"));
    }
    let worse = compare(&assembler.release, &measured, all, bless);
    assert!(
        failures.is_empty() && worse.is_none(),
        "{} kernels fail{}\n{}",
        failures.len(),
        worse.map_or(String::new(), |worse| format!(", {worse}")),
        failures.join("\n\n")
    );
}

/// What `ptxas` said before, in the folder of cargo's that all checkouts share.
fn cache() -> Cache {
    match set("KAIO_CI_ALL") {
        true => Cache::none(),
        false => Cache::new(PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("ptxas")),
    }
}

/// Some of each.
fn sample(choices: BTreeMap<String, Choice>) -> Vec<(String, Choice)> {
    let word_of = |name: &str| {
        let family = name.split(' ').nth(1).expect("names begin with architecture and family");
        name.split(' ').map(|word| format!("{family}:{word} ")).collect::<String>()
    };
    spread(choices.into_iter().collect(), |(name, _)| word_of(name)).take(SAMPLE).collect()
}

/// What each takes, and what is wrong with the others.
fn assemble(
    assembler: &Assembler,
    choices: &[(String, Choice)],
    cache: &Cache,
) -> (Measured, Vec<String>) {
    let next = AtomicUsize::new(0);
    let (rows, failures) = (Mutex::new(BTreeMap::new()), Mutex::new(Vec::new()));
    on_all_cores(|worker| {
        let file = scratch(&format!("gate-{worker}"));
        while let Some((name, choice)) = choices.get(next.fetch_add(1, Ordering::Relaxed)) {
            match judge(assembler, choice, &file, cache) {
                Ok(used) => {
                    rows.lock().expect("nobody panicked").insert(name.clone(), used);
                }
                Err(why) => {
                    failures.lock().expect("nobody panicked").push(format!("{name}:\n{why}"));
                }
            }
        }
    });
    let rows = rows.into_inner().expect("nobody panicked");
    let mut failures = failures.into_inner().expect("nobody panicked");
    failures.sort();
    (rows, failures)
}

fn judge(
    assembler: &Assembler,
    choice: &Choice,
    file: &Path,
    cache: &Cache,
) -> Result<Use, String> {
    let source = choice.kernel.emit();
    let registers = assembler.assemble(&source, choice.gpu.arch, file, cache)?;
    let (shared, limit) = (source.shared, choice.gpu.device.shared_per_block);
    if shared > limit {
        return Err(format!("{shared} bytes of shared memory (at most {})", limit));
    }
    // A warp gets registers in units of 8 for each lane.
    let blocks = choice.blocks_per_sm();
    let together = registers.next_multiple_of(8) * source.threads * blocks;
    if together > 65_536 {
        return Err(format!(
            "{registers} registers: {blocks} blocks need {together} (at most 65536)"
        ));
    }
    Ok(Use { registers, shared })
}

/// Of each architecture and family.
fn worst(measured: &Measured) -> BTreeMap<String, u32> {
    let mut worst = BTreeMap::new();
    for (name, used) in measured {
        let family = name.split(' ').take(2).collect::<Vec<_>>().join(" ");
        let most = worst.entry(family).or_insert(0);
        *most = used.registers.max(*most);
    }
    worst
}

/// Blesses or compares; gives what became worse.
fn compare(release: &str, measured: &Measured, all: bool, bless: bool) -> Option<String> {
    let path = golden_folder().join(RATCHET);
    let before = Ratchet::parse(&fs::read_to_string(&path).unwrap_or_default());
    let found = before.compare(release, measured);
    if !found.worse.is_empty() {
        return Some(format!(
            "{} take more than before:\n{}\nWhere that is a price worth paying, delete their shapes' \
             lines from {} and bless.",
            found.worse.len(),
            found.worse.join("\n"),
            path.display()
        ));
    }
    if bless {
        fs::write(&path, found.now.to_string()).expect("the checkout can be written to");
        say(&format!("blessed {}: {} shapes", path.display(), found.now.shapes.len()));
        return None;
    }
    if !found.same_release {
        say(&format!(
            "REGISTERS NOT COMPARED: they were counted by ptxas {}, this is {}",
            before.release, release
        ));
    }
    if all && found.better + found.new.len() + found.gone > 0 {
        say(&format!(
            "the ratchet can be tightened: {} shapes better, {} kernels of new ones, {} gone; KAIO_BLESS=1 cargo test --test ptx",
            found.better,
            found.new.len(),
            found.gone
        ));
    }
    None
}

/// The instructions of the writer assemble, too: their texts are golden.
#[test]
fn every_instruction_assembles() {
    let Some(assembler) = assembler() else { return };
    let cache = cache();
    for (name, source) in instructions::kernels() {
        let archs: &[_] = match source.target {
            kaio_candle::ptx::Target::Sm89 => &["sm_89", "sm_90"],
            kaio_candle::ptx::Target::Sm80 => &["sm_80", "sm_89", "sm_90"],
            kaio_candle::ptx::Target::Sm90a => &["sm_90a"],
        };
        for arch in archs {
            if let Err(why) = assembler.assemble(&source, arch, &scratch(name), &cache) {
                panic!("{name} for {arch}: {why}");
            }
        }
    }
}

fn scratch(name: &str) -> PathBuf {
    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"));
    folder.join(format!("{name}-{}.ptx", std::process::id()))
}
