//! Golden texts and digests: a change of what is emitted shows up as a change of these files.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use kaio_candle::kernel::Config;
use kaio_candle::ptx::Source;

use crate::digest::digest;
use crate::{RATCHET, families, golden_folder, instructions, set};

/// The text, after what a launch must match.
fn with_facts(title: &str, source: &Source) -> String {
    let Source { entry, threads, shared, cluster, starts_early, params, .. } = source;
    let mut text =
        format!("// {title}\n// {entry}: {threads} threads, {shared} bytes of shared memory");
    let params: Vec<_> = params.iter().map(|param| param.kind.size()).collect();
    let early = if *starts_early { ", starts early" } else { "" };
    writeln!(text, ", clusters of {cluster}{early}\n// parameters of {params:?} bytes")
        .expect("a String");
    text + &source.text
}

/// Name, title and text of all kernels.
fn sources() -> Vec<(&'static str, String, Source)> {
    let kernels = families::goldens().into_iter().map(|(name, kernel)| {
        let check = match kernel {
            Config::MatmulSm90(config) => config.check(232_448),
            Config::MatmulSm80(config) => config.check(166_912),
            Config::FlashSm90(config) => config.check(232_448),
            Config::FlashSm80(config) => config.check(166_912),
            _ => Ok(()),
        };
        check.unwrap_or_else(|why| panic!("{name}: {why}"));
        (name, kernel.name(), kernel.emit())
    });
    kernels.collect()
}

/// The writer's instructions as they are written, and a digest of each kernel.
#[test]
fn texts_are_as_before() {
    let kernels = sources();
    if let Some(folder) = std::env::var_os("KAIO_TEXTS").map(PathBuf::from) {
        fs::create_dir_all(&folder).expect("KAIO_TEXTS names a folder that can be made");
        for (name, title, source) in &kernels {
            let path = folder.join(format!("{name}.ptx"));
            fs::write(path, with_facts(title, source)).expect("KAIO_TEXTS can be written to");
        }
    }
    let digests = kernels
        .iter()
        .map(|(name, title, source)| (format!("{name}.digest"), digest(title, source)));
    let instructions = instructions::kernels().into_iter().map(|(name, source)| {
        (format!("{name}.ptx"), with_facts("each method of the writer, once", &source))
    });
    let now: Vec<_> = digests.chain(instructions).collect();

    let folder = golden_folder();
    let there = fs::read_dir(&folder).expect("tests/golden is there").filter_map(|entry| {
        let name = entry.expect("it can be read").file_name().into_string().ok()?;
        (name != RATCHET).then_some(name)
    });
    let mut stale: BTreeSet<_> = there.collect();
    let mut changed = Vec::new();
    for (name, text) in &now {
        stale.remove(name);
        let path = folder.join(name);
        let before = fs::read_to_string(&path).unwrap_or_default();
        if before == *text {
            continue;
        }
        match set("KAIO_BLESS") {
            true => fs::write(&path, text).expect("the checkout can be written to"),
            false => changed.push(difference(name, &before, text)),
        }
    }
    for name in stale {
        match set("KAIO_BLESS") {
            true => fs::remove_file(folder.join(name)).expect("it is there"),
            false => changed.push(format!("{name}: no kernel has this golden text")),
        }
    }
    assert!(
        changed.is_empty(),
        "{}\nIf that is meant: KAIO_BLESS=1 cargo test --test ptx, then read git diff tests/golden. \
         KAIO_TEXTS=FOLDER writes the kernels' texts to a folder.",
        changed.join("\n")
    );
}

/// The first lines that differ, up to ten of each.
fn difference(name: &str, before: &str, now: &str) -> String {
    let (before, now) = (before.lines().collect::<Vec<_>>(), now.lines().collect::<Vec<_>>());
    let without = |lines: &[&str], others: &[&str], sign: char| {
        let own = lines.iter().filter(|line| !others.contains(line)).take(10);
        own.map(|line| format!("\n  {sign} {line}")).collect::<String>()
    };
    format!("{name}:{}{}", without(&before, &now, '-'), without(&now, &before, '+'))
}
