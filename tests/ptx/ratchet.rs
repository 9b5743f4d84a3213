//! Registers and shared memory of each shape of kernel, kept in a file that may only improve.
//!
//! Under a heading, an architecture and a family, a line for each shape: registers, bytes of shared memory,
//! name. They hold for all its variants (layouts, types, bias, activation) but for those that take many more
//! registers: these have lines of their own below it, with registers and name.

use std::collections::BTreeMap;
use std::fmt::{self, Display};

/// A variant that takes so many registers more than the least one has a line of its own.
const MANY: u32 = 8;

/// What a kernel takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Use {
    pub registers: u32,
    /// Dynamic shared memory, in bytes.
    pub shared: u32,
}

/// What was measured, by name: `SHAPE, VARIANT`.
pub type Measured = BTreeMap<String, Use>;

/// What the variants of a shape take at most.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Most {
    pub all: Use,
    /// Registers of those that take many more, by variant.
    pub exceptions: BTreeMap<String, u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Ratchet {
    /// The release of the `ptxas` that counted the registers.
    pub release: String,
    /// By shape: `ARCHITECTURE FAMILY SHAPE`.
    pub shapes: BTreeMap<String, Most>,
}

const HEAD: &str = "\
# What kernels take at most: CONTRIBUTING.md, \"Gates without a GPU\".
# [architecture family], then registers, bytes of shared memory and shape; below it, variants with more registers.
";

impl Display for Ratchet {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        writeln!(f, "{HEAD}ptxas {}", self.release)?;
        let mut heading = None;
        for (name, Most { all, exceptions }) in &self.shapes {
            let (family, shape) = split(name);
            if heading != Some(family) {
                write!(f, "\n[{family}]\n")?;
                heading = Some(family);
            }
            writeln!(f, "{:3} {:6} {shape}", all.registers, all.shared)?;
            for (variant, registers) in exceptions {
                writeln!(f, "    {registers:3} {variant}")?;
            }
        }
        Ok(())
    }
}

/// `ARCHITECTURE FAMILY`, and the rest.
fn split(name: &str) -> (&str, &str) {
    let end = name.match_indices(' ').nth(1).map(|(at, _)| at);
    let (family, shape) = name.split_at(end.expect("names have three parts"));
    (family, &shape[1..])
}

impl Ratchet {
    /// Of what was measured. `before` says which registers a shape need not pass.
    pub fn of(release: &str, measured: &Measured, before: &Self) -> Self {
        let mut by_shape: BTreeMap<&str, Vec<(&str, Use)>> = BTreeMap::new();
        for (name, &used) in measured {
            let (shape, variant) = name.split_once(", ").expect("names have two parts");
            by_shape.entry(shape).or_default().push((variant, used));
        }
        let most = |(shape, variants): (&str, Vec<(&str, Use)>)| {
            let least =
                variants.iter().map(|(_, used)| used.registers).min().expect("there is one");
            let limit = match before.shapes.get(shape) {
                Some(before) if before.all.registers >= least => before.all.registers,
                _ => least + MANY,
            };
            let (few, many): (Vec<_>, Vec<_>) =
                variants.iter().partition(|(_, used)| used.registers <= limit);
            let all = Use {
                registers: few.iter().map(|(_, used)| used.registers).max().expect("the least"),
                shared: variants.iter().map(|(_, used)| used.shared).max().expect("there is one"),
            };
            let exceptions =
                many.iter().map(|(variant, used)| (variant.to_string(), used.registers));
            (shape.to_string(), Most { all, exceptions: exceptions.collect() })
        };
        Self { release: release.into(), shapes: by_shape.into_iter().map(most).collect() }
    }

    /// Reads what `Display` wrote.
    pub fn parse(text: &str) -> Self {
        let mut ratchet = Self::default();
        let (mut family, mut shape) = (String::new(), String::new());
        for line in text.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
            let understood = ratchet.read(line, &mut family, &mut shape);
            understood.unwrap_or_else(|| panic!("the ratchet file has the line {line:?}"));
        }
        ratchet
    }

    fn read(&mut self, line: &str, family: &mut String, shape: &mut String) -> Option<()> {
        if let Some(release) = line.strip_prefix("ptxas ") {
            self.release = release.into();
        } else if let Some(inner) = line.strip_prefix('[') {
            *family = inner.strip_suffix(']')?.into();
        } else if let Some(exception) = line.strip_prefix("    ") {
            let (registers, variant) = exception.trim_start().split_once(' ')?;
            let exceptions = &mut self.shapes.get_mut(&*shape)?.exceptions;
            exceptions.insert(variant.into(), registers.parse().ok()?);
        } else {
            let (registers, rest) = line.trim_start().split_once(' ')?;
            let (shared, name) = rest.trim_start().split_once(' ')?;
            let all = Use { registers: registers.parse().ok()?, shared: shared.parse().ok()? };
            *shape = format!("{family} {name}");
            self.shapes.insert(shape.clone(), Most { all, exceptions: BTreeMap::new() });
        }
        Some(())
    }

    /// Compares what was measured with the file. Registers count only for the same `ptxas`.
    pub fn compare(&self, release: &str, measured: &Measured) -> Comparison {
        let same_release = self.release == release;
        let mut found = Comparison { same_release, ..Comparison::default() };
        for (name, now) in measured {
            let (shape, variant) = name.split_once(", ").expect("names have two parts");
            let Some(most) = self.shapes.get(shape) else {
                found.new.push(name.clone());
                continue;
            };
            let registers = most.exceptions.get(variant).copied().unwrap_or(most.all.registers);
            let mut pairs = vec![("bytes of shared memory", most.all.shared, now.shared)];
            if same_release {
                pairs.push(("registers", registers, now.registers));
            }
            for (what, before, now) in pairs {
                if now > before {
                    found.worse.push(format!("{before} → {now} {what}: {name}"));
                }
            }
        }
        let known = if same_release { self.clone() } else { Self::default() };
        found.now = Self::of(release, measured, &known);
        let better = |(shape, most): &(&String, &Most)| found.now.shapes.get(*shape) != Some(*most);
        let there = self.shapes.iter().filter(|(shape, _)| found.now.shapes.contains_key(*shape));
        found.better = there.filter(better).count();
        found.gone =
            self.shapes.keys().filter(|name| !found.now.shapes.contains_key(*name)).count();
        found
    }
}

/// How measurements relate to a ratchet.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Comparison {
    pub same_release: bool,
    /// What takes more than its shape may.
    pub worse: Vec<String>,
    /// Kernels of shapes that the file does not have.
    pub new: Vec<String>,
    /// Shapes that take less, if nothing is worse and all was measured.
    pub better: usize,
    /// Shapes that are no longer chosen, if all was measured.
    pub gone: usize,
    /// The file that says what was measured.
    pub now: Ratchet,
}

fn measured(rows: &[(&str, u32, u32)]) -> Measured {
    let row = |&(name, registers, shared): &_| (String::from(name), Use { registers, shared });
    rows.iter().map(row).collect()
}

#[test]
fn a_ratchet_reads_what_it_wrote() {
    let measured = measured(&[
        ("sm_80 sm80 64x64 k64x4 2/sm unit4, nn bf16→f32", 90, 65_536),
        ("sm_80 sm80 64x64 k64x4 2/sm unit4, nt bf16→f32 +f32 relu", 98, 65_536),
        ("sm_80 sm80 64x64 k64x4 2/sm unit4, tt bf16→f32 gelu_erf", 99, 65_536),
        ("sm_90a sm90 64x8 k64x12, nt f16→f16", 32, 1024),
    ]);
    let ratchet = Ratchet::of("13.0", &measured, &Ratchet::default());
    let text = "ptxas 13.0\n\n[sm_80 sm80]\n 98  65536 64x64 k64x4 2/sm unit4\n     99 tt bf16→f32 \
                gelu_erf\n\n[sm_90a sm90]\n 32   1024 64x8 k64x12\n";
    assert_eq!(ratchet.to_string(), format!("{HEAD}{text}"));
    assert_eq!(Ratchet::parse(&ratchet.to_string()), ratchet);
}

#[test]
fn only_worse_is_worse() {
    let rows = [("x y a, 1", 40, 9), ("x y a, 2", 44, 9), ("x y a, 3", 60, 9), ("x y b, 1", 40, 9)];
    let before = Ratchet::of("13.0", &measured(&rows), &Ratchet::default());

    let same = before.compare("13.0", &measured(&rows));
    assert_eq!((same.worse.len(), same.better, same.gone), (0, 0, 0));
    assert_eq!(same.now, before);

    // Variant 1 may take what its shape does, and variant 4, which was not there; variant 3 what it did.
    let rows =
        [("x y a, 1", 44, 9), ("x y a, 3", 60, 9), ("x y a, 4", 44, 9), ("x y c, 1", 255, 9)];
    let found = before.compare("13.0", &measured(&rows));
    assert_eq!((found.worse.len(), found.gone), (0, 1));
    assert_eq!(found.new, ["x y c, 1"]);

    let rows = [("x y a, 1", 45, 9), ("x y a, 3", 61, 9), ("x y b, 1", 39, 10)];
    let found = before.compare("13.0", &measured(&rows));
    let more = ["44 → 45 registers: x y a, 1", "60 → 61 registers: x y a, 3"];
    assert_eq!(found.worse, [more[0], more[1], "9 → 10 bytes of shared memory: x y b, 1"]);
    let found = before.compare("13.1", &measured(&rows));
    assert_eq!(found.worse, ["9 → 10 bytes of shared memory: x y b, 1"]);
}

#[test]
fn what_improved_is_kept() {
    let rows = [("x y a, 1", 40, 9), ("x y a, 2", 44, 9), ("x y a, 3", 60, 9)];
    let before = Ratchet::of("13.0", &measured(&rows), &Ratchet::default());
    // The least one takes more, within its shape's limit, which does not move.
    let rows = [("x y a, 1", 44, 9), ("x y a, 2", 43, 9), ("x y a, 3", 50, 9)];
    let found = before.compare("13.0", &measured(&rows));
    assert_eq!((found.worse.len(), found.better), (0, 1));
    let most = &found.now.shapes["x y a"];
    assert_eq!((most.all.registers, most.exceptions["3"]), (44, 50));
}
