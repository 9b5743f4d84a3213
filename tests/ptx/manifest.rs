//! One line for each kernel, with a hash of its text: shows that a refactoring changed none.
//!
//! ```sh
//! KAIO_MANIFEST=/tmp/before.txt cargo test --test ptx manifest   # before the change
//! KAIO_MANIFEST=/tmp/after.txt cargo test --test ptx manifest    # after it
//! diff /tmp/before.txt /tmp/after.txt                            # nothing: all texts are the same bytes
//! ```
//!
//! It takes no `ptxas` and no CUDA. The kernels are all that the gate assembles and all golden ones. A
//! line is `HASH threads=… shared=… NAME`, sorted by name; where names changed, compare
//! `cut -d' ' -f1-3 FILE | sort`.

use std::env;
use std::fmt::Write;
use std::fs;
use std::path::PathBuf;

use kaio_candle::ptx::Source;

use crate::choices::choices;
use crate::families::{self, Extent, hash};
use crate::{instructions, say};

#[test]
fn manifest() {
    let Some(path) = env::var_os("KAIO_MANIFEST").map(PathBuf::from) else {
        return say("no KAIO_MANIFEST=FILE: no manifest of the kernels' texts is written");
    };
    let chosen = choices(Extent::All).into_iter().map(|(name, of)| (name, of.kernel.emit()));
    let golden = families::goldens().into_iter().map(|(name, kernel)| (name, kernel.emit()));
    let golden = golden.chain(instructions::kernels());
    let golden = golden.map(|(name, source)| (format!("golden {name}"), source));
    let mut lines: Vec<_> =
        chosen.chain(golden).map(|(name, source)| line(&name, &source)).collect();
    lines.sort_by(|(a, _), (b, _)| a.cmp(b));
    let mut text = String::new();
    for (_, line) in &lines {
        writeln!(text, "{line}").expect("a String takes all text");
    }
    fs::write(&path, text).expect("KAIO_MANIFEST names a file that can be written");
    say(&format!("{} kernels in {}", lines.len(), path.display()));
}

fn line(name: &str, source: &Source) -> (String, String) {
    let Source { threads, shared, .. } = source;
    let hash = hash(&source.text);
    (name.into(), format!("{hash:016x} threads={threads} shared={shared} {name}"))
}
