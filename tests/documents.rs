//! What documents name is there: files, headings, and the paths of this repository. And README stays short.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

/// The documents, and their texts without the contents of code blocks.
fn documents() -> Vec<(PathBuf, String)> {
    let folder = |name: &str| {
        let all = fs::read_dir(root().join(name)).unwrap();
        all.map(|entry| Path::new(name).join(entry.unwrap().file_name())).collect::<Vec<_>>()
    };
    let all = [folder(""), folder("docs"), folder("benches")].concat();
    let all = all.into_iter().filter(|path| path.extension().is_some_and(|end| end == "md"));
    all.map(|path| {
        let text = prose(&fs::read_to_string(root().join(&path)).unwrap());
        (path, text)
    })
    .collect()
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn prose(text: &str) -> String {
    let mut code = false;
    let lines = text.lines().filter(|line| {
        let fence = line.trim_start_matches("> ").trim_start().starts_with("```");
        code ^= fence;
        !code && !fence
    });
    lines.map(|line| format!("{line}\n")).collect()
}

/// Headings as GitHub makes anchors of them.
fn anchors(text: &str) -> HashSet<String> {
    let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
    headings
        .map(|line| {
            let kept = line.trim_start_matches('#').trim().chars();
            let kept = kept.filter(|c| c.is_alphanumeric() || [' ', '-', '_'].contains(c));
            kept.collect::<String>().to_lowercase().replace(' ', "-")
        })
        .collect()
}

#[test]
fn links_lead_somewhere() {
    let documents = documents();
    let mut links = 0;
    for (path, text) in &documents {
        for link in text.split("](").skip(1) {
            let link = link.split(')').next().unwrap();
            if link.contains("://") {
                continue;
            }
            links += 1;
            let (file, anchor) = link.split_once('#').unwrap_or((link, ""));
            let target = match file {
                "" => path.clone(),
                file => path.parent().unwrap().join(file),
            };
            let at = root().join(&target);
            assert!(at.exists(), "{}: no file {link}", path.display());
            let there = || anchors(&prose(&fs::read_to_string(&at).unwrap()));
            assert!(
                anchor.is_empty() || there().contains(anchor),
                "{}: no heading {link}",
                path.display()
            );
        }
    }
    assert!(documents.len() > 8 && links > 30, "{} documents, {links} links", documents.len());
}

#[test]
fn paths_are_there() {
    let mut paths = 0;
    for (document, text) in documents() {
        // History names what is gone.
        if document == Path::new("CHANGELOG.md") {
            continue;
        }
        for span in text.split('`').skip(1).step_by(2) {
            let ours = ["src/", "tests/", "docs/", "benches/", "examples/", "scripts/", ".ci/"];
            let exact = span
                .chars()
                .all(|c| c.is_ascii_lowercase() || "/_.-".contains(c) || c.is_ascii_digit());
            if exact && ours.iter().any(|start| span.starts_with(start)) {
                paths += 1;
                assert!(root().join(span).exists(), "{}: no `{span}`", document.display());
            }
        }
    }
    assert!(paths > 30, "{paths} paths");
}

/// All files of Rust code below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let below = |path: PathBuf| match path.is_dir() {
        true => sources(&path),
        false => vec![path],
    };
    let all = entries.flat_map(below);
    all.filter(|path| path.extension().is_some_and(|end| end == "rs")).collect()
}

/// The glossary and the explanations name types and files, which are renamed from time to time.
#[test]
fn kernels_names_what_there_is() {
    let files = sources(&root().join("src"));
    let code: String = files.iter().map(|path| fs::read_to_string(path).unwrap()).collect();
    let text = prose(&fs::read_to_string(root().join("docs/kernels.md")).unwrap());
    let mut named = 0;
    for span in text.split('`').skip(1).step_by(2) {
        let is_file = span.ends_with(".rs") && !span.contains('*');
        let is_type = span.starts_with(|c: char| c.is_ascii_uppercase())
            && span.chars().all(|c| c.is_ascii_alphanumeric());
        let there = match (is_file, is_type) {
            (true, _) => files.iter().any(|path| path.ends_with(span)),
            (_, true) => ["struct", "enum", "trait", "type"].iter().any(|kind| {
                [" ", "<", "(", ";"].iter().any(|end| code.contains(&format!("{kind} {span}{end}")))
            }),
            _ => continue,
        };
        assert!(there, "docs/kernels.md names `{span}`, which is not in src");
        named += 1;
    }
    assert!(named > 40, "{named} names");
}

#[test]
fn readme_is_short() {
    let lines = fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(lines <= 220, "README.md has {lines} lines: docs/ has room for more");
}
