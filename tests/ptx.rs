//! PTX without a GPU: the writer, the choosers, golden texts, and the gate that everything that can
//! be chosen assembles without spills, in no more registers and shared memory than before.
//!
//! - `cargo test --test ptx` assembles a sample; without `ptxas` (PATH or `$CUDA_HOME/bin`) it says
//!   SKIPPED and passes.
//! - `KAIO_REQUIRE_PTXAS=1` assembles everything, and wants a `ptxas`. What it said of a text is kept in the
//!   target folder; `KAIO_CI_ALL=1` asks again.
//! - `KAIO_MANIFEST=FILE` writes a hash of each text there: a refactoring changes none.
//! - `KAIO_BLESS=1` rewrites `tests/golden`; read the difference before you commit it. `KAIO_TEXTS=FOLDER`
//!   writes the golden kernels' texts, of which the digests there are made.

#[path = "ptx/assembler.rs"]
mod assembler;
#[path = "ptx/cache.rs"]
mod cache;
#[path = "ptx/choices.rs"]
mod choices;
#[path = "ptx/digest.rs"]
mod digest;
#[path = "ptx/families/mod.rs"]
mod families;
#[path = "ptx/gate.rs"]
mod gate;
#[path = "ptx/golden.rs"]
mod golden;
#[path = "ptx/instructions.rs"]
mod instructions;
#[path = "ptx/manifest.rs"]
mod manifest;
#[path = "ptx/params.rs"]
mod params;
#[path = "ptx/ratchet.rs"]
mod ratchet;
#[path = "ptx/writer.rs"]
mod writer;

use std::io::Write;
use std::path::PathBuf;

/// Prints past the test harness's capture.
fn say(text: &str) {
    writeln!(std::io::stderr(), "{text}").expect("stderr is open");
}

/// Whether a variable of the environment is 1.
fn set(variable: &str) -> bool {
    std::env::var(variable).is_ok_and(|value| value == "1")
}

/// In the golden folder: what kernels take.
const RATCHET: &str = "ratchet.txt";

fn golden_folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}
