//! Registers and shared memory of each kernel, kept in a file that may only improve.
//!
//! Under a heading, a shape and its bytes of shared memory, a line for each variant: registers, name.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// What a kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    pub registers: u32,
    /// Dynamic shared memory, in bytes.
    pub shared: u32,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ratchet {
    /// The release of the `ptxas` that counted the registers.
    pub release: String,
    /// By name: `SHAPE, VARIANT`.
    pub rows: BTreeMap<String, Use>,
}

const HEAD: &str = "\
# What each kernel takes: CONTRIBUTING.md, \"Gates without a GPU\".
# [shape: bytes of shared memory], then registers and variant.
";

impl Display for Ratchet {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{HEAD}ptxas {}", self.release)?;
        let mut heading = None;
        for (name, used) in &self.rows {
            let (shape, variant) = name.split_once(", ").expect("names have two parts");
            let here = Some((shape, used.shared));
            if heading != here {
                write!(f, "\n[{shape}: {}]\n", used.shared)?;
                heading = here;
            }
            writeln!(f, "{:3} {variant}", used.registers)?;
        }
        Ok(())
    }
}

impl Ratchet {
    /// Reads what `Display` wrote.
    pub fn parse(text: &str) -> Self {
        let mut ratchet = Self::default();
        let mut heading = None;
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let understood = ratchet.read(line, &mut heading);
            understood.unwrap_or_else(|| panic!("the ratchet file has the line {line:?}"));
        }
        ratchet
    }

    fn read<'a>(&mut self, line: &'a str, heading: &mut Option<(&'a str, u32)>) -> Option<()> {
        if let Some(release) = line.strip_prefix("ptxas ") {
            self.release = release.into();
        } else if let Some(inner) = line.strip_prefix('[') {
            let (shape, shared) = inner.strip_suffix(']')?.rsplit_once(": ")?;
            *heading = Some((shape, shared.parse().ok()?));
        } else {
            let (registers, variant) = line.trim().split_once(' ')?;
            let (shape, shared) = (*heading)?;
            let used = Use { registers: registers.parse().ok()?, shared };
            self.rows.insert(format!("{shape}, {variant}"), used);
        }
        Some(())
    }

    /// Compares what was measured with the rows. Registers count only for the same `ptxas`.
    pub fn compare(&self, measured: &Self) -> Comparison {
        let mut found =
            Comparison { same_release: self.release == measured.release, ..Comparison::default() };
        for (name, &now) in &measured.rows {
            let Some(&before) = self.rows.get(name) else {
                found.new.push(name.clone());
                continue;
            };
            let mut pairs = vec![("bytes of shared memory", before.shared, now.shared)];
            if found.same_release {
                pairs.push(("registers", before.registers, now.registers));
            }
            for (what, before, now) in pairs {
                let line = || format!("{before} → {now} {what}: {name}");
                match now.cmp(&before) {
                    std::cmp::Ordering::Less => found.better.push(line()),
                    std::cmp::Ordering::Equal => (),
                    std::cmp::Ordering::Greater => found.worse.push(line()),
                }
            }
        }
        found.gone = self.rows.keys().filter(|name| !measured.rows.contains_key(*name)).count();
        found
    }
}

/// How measurements relate to a ratchet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    pub same_release: bool,
    pub worse: Vec<String>,
    pub better: Vec<String>,
    pub new: Vec<String>,
    /// Rows of what is no longer chosen.
    pub gone: usize,
}

#[test]
fn a_ratchet_reads_what_it_wrote() {
    let of = |registers, shared| Use { registers, shared };
    let rows = [
        ("sm_80 sm80 64x64 k64x4 2/sm unit4, nn bf16→f32", of(90, 65_536)),
        ("sm_80 sm80 64x64 k64x4 2/sm unit4, nt bf16→f32 +f32 relu", of(100, 65_536)),
        ("sm_90a sm90 64x8 k64x12, nt f16→f16", of(32, 1024)),
    ];
    let rows = rows.map(|(name, used)| (name.to_string(), used)).into();
    let ratchet = Ratchet { release: "13.0".into(), rows };
    assert_eq!(Ratchet::parse(&ratchet.to_string()), ratchet);
}

#[test]
fn only_worse_is_worse() {
    let ratchet = |release: &str, rows: &[(&str, u32, u32)]| Ratchet {
        release: release.into(),
        rows: rows
            .iter()
            .map(|&(name, registers, shared)| (format!("{name}, x"), Use { registers, shared }))
            .collect(),
    };
    let before = ratchet("13.0", &[("a", 40, 1000), ("b", 40, 1000), ("c", 40, 1000)]);
    let now = [("a", 41, 1000), ("b", 39, 1001), ("d", 255, 9999)];
    let found = before.compare(&ratchet("13.0", &now));
    assert_eq!(
        found.worse,
        ["40 → 41 registers: a, x", "1000 → 1001 bytes of shared memory: b, x"]
    );
    assert_eq!(found.better, ["40 → 39 registers: b, x"]);
    assert_eq!((found.new, found.gone), (vec!["d, x".to_string()], 1));
    let found = before.compare(&ratchet("13.1", &now));
    assert_eq!(found.worse, ["1000 → 1001 bytes of shared memory: b, x"]);
}
