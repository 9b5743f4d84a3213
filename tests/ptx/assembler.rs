//! `ptxas`, and what it says about a kernel.

use std::path::{Path, PathBuf};
use std::process::Command;

use kaio_candle::ptx::Source;

/// A `ptxas`.
pub struct Assembler {
    program: PathBuf,
    /// `13.0`
    pub release: String,
}

impl Assembler {
    /// That of PATH, or of `$CUDA_HOME`.
    pub fn find() -> Option<Self> {
        let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/ptxas"));
        [Some("ptxas".into()), home].into_iter().flatten().find_map(Self::new)
    }

    fn new(program: PathBuf) -> Option<Self> {
        let output = Command::new(&program).arg("--version").output().ok()?;
        let text = String::from_utf8(output.stdout).ok()?;
        let release = text.split("release ").nth(1)?.split(',').next()?.to_string();
        Some(Self { program, release })
    }

    /// The registers of a thread, or what is wrong. `file` is written and removed.
    pub fn assemble(&self, source: &Source, arch: &str, file: &Path) -> Result<u32, String> {
        std::fs::write(file, &source.text).expect("cargo's folder for tests can be written to");
        let output = Command::new(&self.program)
            .args(["-v", "-arch", arch, "-o", "/dev/null"])
            .arg(file)
            .output()
            .expect("it ran before");
        std::fs::remove_file(file).expect("it was written");
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().replace(&*file.to_string_lossy(), "ptx");
        if output.status.success() { read(&said) } else { Err(said) }
    }
}

/// Judges what `ptxas -v` says.
fn read(said: &str) -> Result<u32, String> {
    let spills = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads";
    // Advice has a number, as (C7510): wgmma is serialised, setmaxnreg is ignored.
    let advice = said.contains("(C") || said.contains("warning");
    if !said.contains(spills) || said.contains("lmem") || advice {
        return Err(said.into());
    }
    let registers = said.split("Used ").nth(1).and_then(|rest| rest.split(' ').next());
    registers.and_then(|number| number.parse().ok()).ok_or_else(|| said.into())
}

#[test]
fn what_ptxas_says_is_judged() {
    let clean = "ptxas info    : Function properties for matmul\n    0 bytes stack frame, 0 bytes \
                 spill stores, 0 bytes spill loads\nptxas info    : Used 40 registers, used 2 barriers";
    assert_eq!(read(clean), Ok(40));
    let spilling = clean.replace("0 bytes spill stores", "8 bytes spill stores");
    let advised = format!(
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are \
         serialized due to function call\n{clean}"
    );
    for bad in [spilling, advised, clean.replace("Used 40", ""), String::new()] {
        assert_eq!(read(&bad), Err(bad.clone()));
    }
}
