//! What a kernel is, in some fifty lines: facts of its launch, parameters, and how many instructions of each
//! kind it has, in all and in each of its loops.

use std::collections::BTreeMap;
use std::fmt::Write;

use kaio_candle::ptx::Source;

use crate::cache::hash;

/// Shorter loops only wait for something.
const WAITING: usize = 5;

/// One instruction, or a label.
enum Line<'a> {
    Label(&'a str),
    Instruction { opcode: &'a str, operands: &'a str },
}

/// From a label to the last jump back to it.
struct Loop {
    first: usize,
    last: usize,
    /// `1`, and `1.1` and `1.2` within it.
    name: String,
}

pub fn digest(title: &str, source: &Source) -> String {
    let Source { entry, threads, shared, cluster, starts_early, text, .. } = source;
    let target = text.lines().find_map(|line| line.strip_prefix(".target ")).unwrap_or_default();
    let lines = lines(text);
    let loops = loops(&lines);
    let mut out = format!(
        "{title}\n{entry} for {target}: {threads} threads, {shared} bytes of shared memory"
    );
    if *cluster > 1 {
        write!(out, ", clusters of {cluster}").expect("a String");
    }
    out += if *starts_early { ", starts early\n" } else { "\n" };
    out += &wrapped("parameters:", &parameters(text));
    out += &wrapped("registers:", &registers(text));
    let length = text.lines().count();
    writeln!(out, "text: {length} lines, {}\n", hash([text.as_bytes()])).expect("a String");
    out + &table(&lines, &loops)
}

fn lines(text: &str) -> Vec<Line<'_>> {
    let body = text.split_once("\n{\n").map_or("", |(_, body)| body);
    body.lines().filter_map(|line| read(line.trim())).collect()
}

/// None for declarations, pragmas, comments and braces.
fn read(line: &str) -> Option<Line<'_>> {
    if let Some(label) = line.strip_suffix(':') {
        return Some(Line::Label(label));
    }
    // After the predicate.
    let line = if line.starts_with('@') { line.split_once(' ')?.1 } else { line };
    let line = line.strip_suffix(';').filter(|line| line.starts_with(char::is_alphabetic))?;
    let (opcode, operands) = line.split_once(' ').unwrap_or((line, ""));
    Some(Line::Instruction { opcode, operands })
}

fn loops(lines: &[Line]) -> Vec<Loop> {
    let label = |wanted: &str| {
        lines.iter().position(|line| matches!(line, Line::Label(label) if *label == wanted))
    };
    let mut ends = BTreeMap::new();
    for (at, line) in lines.iter().enumerate() {
        if let Line::Instruction { opcode: "bra", operands } = line
            && let Some(first) = label(operands)
            && first < at
        {
            ends.insert(first, at);
        }
    }
    let mut loops: Vec<Loop> = Vec::new();
    for (first, last) in ends.into_iter().filter(|(first, last)| last - first > WAITING) {
        let outer = loops.iter().rev().find(|outer| outer.last > last);
        let prefix = outer.map_or(String::new(), |outer| format!("{}.", outer.name));
        let depth = prefix.matches('.').count();
        let before = loops
            .iter()
            .filter(|l| l.name.starts_with(&prefix) && l.name.matches('.').count() == depth);
        let name = format!("{prefix}{}", before.count() + 1);
        loops.push(Loop { first, last, name });
    }
    loops
}

/// A row for each kind of instruction, a column for each loop without the loops within it.
fn table(lines: &[Line], loops: &[Loop]) -> String {
    let mut rows: BTreeMap<String, Vec<usize>> = BTreeMap::new();
    let mut total = vec![0; 1 + loops.len()];
    for (at, line) in lines.iter().enumerate() {
        let Line::Instruction { opcode, .. } = line else { continue };
        let row = rows.entry(kind(opcode)).or_insert_with(|| vec![0; 1 + loops.len()]);
        let inside = loops.iter().rposition(|l| (l.first..=l.last).contains(&at));
        for column in [Some(0), inside.map(|i| i + 1)].into_iter().flatten() {
            row[column] += 1;
            total[column] += 1;
        }
    }
    let names = ["all"].into_iter().chain(loops.iter().map(|l| l.name.as_str()));
    let mut out = format!("{:36}", "instructions; loops");
    names.for_each(|name| write!(out, "{name:>7}").expect("a String"));
    for (kind, counts) in [("", &total)].into_iter().chain(rows.iter().map(|(k, v)| (&**k, v))) {
        write!(out, "\n{kind:36}").expect("a String");
        for &count in counts {
            let count = if count == 0 { String::new() } else { count.to_string() };
            write!(out, "{count:>7}").expect("a String");
        }
        out.truncate(out.trim_end().len());
    }
    out + "\n"
}

/// An opcode without what says little: types, but where floats and integers share a name, modes, order.
fn kind(opcode: &str) -> String {
    const TYPES: [&str; 19] = [
        "b8", "b16", "b32", "b64", "u16", "u32", "u64", "s16", "s32", "s64", "pred", "f16", "bf16",
        "f16x2", "bf16x2", "f32", "f64", "tf32", "s8",
    ];
    const MODES: [&str; 31] = [
        "rn",
        "rz",
        "ftz",
        "approx",
        "sat",
        "full",
        "lo",
        "hi",
        "sync",
        "aligned",
        "row",
        "col",
        "acquire",
        "release",
        "relaxed",
        "nc",
        "cg",
        "read",
        "tile",
        "mbarrier",
        "bulk_group",
        "parity",
        "to",
        "m8n8",
        "2d",
        "3d",
        "4d",
        "5d",
        "uni",
        "cta",
        "param",
    ];
    const BOTH: [&str; 9] = ["add", "sub", "mul", "min", "max", "neg", "abs", "div", "setp"];
    const COMPARISONS: [&str; 6] = ["eq", "ne", "lt", "le", "gt", "ge"];
    let mut parts = opcode.split('.');
    let first = parts.next().unwrap_or_default();
    let mut kind = first.to_string();
    for part in parts.clone() {
        let name = part.split("::").next().unwrap_or(part);
        let silent = TYPES.contains(&name) || MODES.contains(&name) || COMPARISONS.contains(&name);
        if !silent || first == "ld" && name == "param" {
            kind = kind + "." + name;
        }
    }
    let float = parts.next_back().is_some_and(|of| ["f32", "f16x2", "bf16x2"].contains(&of));
    if float && BOTH.contains(&first) { kind + ".f32" } else { kind }
}

/// Names and types.
fn parameters(text: &str) -> Vec<String> {
    let list = text.split_once(".entry ").and_then(|(_, rest)| rest.split_once('('));
    let list = list.and_then(|(_, rest)| rest.split_once(")\n")).map_or("", |(list, _)| list);
    let words = list.split(", ").filter(|one| !one.is_empty()).map(|one| {
        let words: Vec<_> = one.split(' ').filter(|word| *word != ".param").collect();
        match words[..] {
            [kind, name] => format!("{name} {}", kind.trim_start_matches('.')),
            // An aligned array of bytes.
            _ => format!("{} descriptor", words[words.len() - 1].trim_end_matches("[128]")),
        }
    });
    words.collect()
}

/// How many of each type are declared.
fn registers(text: &str) -> Vec<String> {
    let declared = text.lines().filter_map(|line| line.trim().strip_prefix(".reg ."));
    let count = |line: &str| {
        let (kind, rest) = line.split_once(' ')?;
        let count = rest.split_once('<')?.1.split_once('>')?.0;
        Some(format!("{count} {kind}"))
    };
    declared.filter_map(count).collect()
}

fn wrapped(what: &str, items: &[String]) -> String {
    let mut line = what.to_string();
    let mut out = String::new();
    for (i, item) in items.iter().enumerate() {
        let end = if i + 1 == items.len() { "" } else { "," };
        if line.len() + item.len() > 100 {
            out += &line;
            out.push('\n');
            line = "   ".into();
        }
        write!(line, " {item}{end}").expect("a String");
    }
    out + &line + "\n"
}

#[test]
fn a_digest() {
    use kaio_candle::ptx::{Kernel, Target};
    let k = &Kernel::new("sums", Target::Sm80, 128);
    k.shared(1024);
    let (out, x, n) = (k.pointer("out"), k.param::<f32>("x"), k.param::<u32>("n"));
    k.for_(0, n, 1, |i| {
        let y = x + x;
        k.for_(0, n, 1, |_| y.set(y * x));
        k.st_global(out.at(0), [y]);
        let _ = (i + i, i / 3);
    });
    let source = k.finish();
    let got = digest("a kernel, two loops", &source);
    let (facts, table) = got.split_once("\n\n").expect("two parts");
    let facts: Vec<_> = facts.lines().collect();
    assert_eq!(
        facts[..4],
        [
            "a kernel, two loops",
            "sums for sm_80: 128 threads, 1024 bytes of shared memory",
            "parameters: out b64, x f32, n b32",
            "registers: 2 pred, 6 b32, 2 b64, 3 f32",
        ]
    );
    let expected = "\
instructions; loops                     all      1    1.1
                                         22      9      6
add                                       3      2      1
add.f32                                   1      1
bra                                       4      2      2
cvta.global                               1
div                                       1      1
ld.param                                  3
mov                                       4      1      1
mul.f32                                   1             1
ret                                       1
setp                                      2      1      1
st.global                                 1      1
";
    assert_eq!(table, expected);
}
