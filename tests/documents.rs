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

#[test]
fn readme_is_short() {
    let lines = fs::read_to_string(root().join("README.md")).unwrap().lines().count();
    assert!(lines <= 220, "README.md has {lines} lines: docs/ has room for more");
}
