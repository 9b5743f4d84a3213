//! `ptxas`, and what it says about a kernel.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use kaio_candle::ptx::Source;

use crate::cache::Cache;

/// Ahead of `-arch`.
const FLAGS: [&str; 1] = ["-v"];

/// A `ptxas`.
pub struct Assembler {
    program: PathBuf,
    /// `13.0`
    pub release: String,
    /// All that `--version` says: the build, too.
    version: String,
}

impl Assembler {
    /// That of PATH, or of `$CUDA_HOME`.
    pub fn find() -> Option<Self> {
        let home = std::env::var_os("CUDA_HOME").map(|home| Path::new(&home).join("bin/ptxas"));
        [Some("ptxas".into()), home].into_iter().flatten().find_map(Self::new)
    }

    fn new(program: PathBuf) -> Option<Self> {
        let output = Command::new(&program).arg("--version").output().ok()?;
        let version = String::from_utf8(output.stdout).ok()?;
        let release = version.split("release ").nth(1)?.split(',').next()?.to_string();
        Some(Self { program, release, version })
    }

    /// The registers of a thread, or what is wrong. `file` is written and removed.
    ///
    /// What `ptxas` said of a text that is all right is kept, and judged anew each time; of one that is not, it
    /// is asked again.
    pub fn assemble(
        &self,
        source: &Source,
        arch: &str,
        file: &Path,
        cache: &Cache,
    ) -> Result<u32, String> {
        let key = [&self.version, &FLAGS.join(" "), arch, &source.text];
        if let Some(Ok(registers)) = cache.get(key).map(|said| read(&said)) {
            return Ok(registers);
        }
        let said = self.run(&source.text, arch, file)?;
        let registers = read(&said)?;
        cache.put(key, &said);
        Ok(registers)
    }

    fn run(&self, text: &str, arch: &str, file: &Path) -> Result<String, String> {
        fs::write(file, text).expect("cargo's folder for tests can be written to");
        let output = Command::new(&self.program)
            .args(FLAGS)
            .args(["-arch", arch, "-o", "/dev/null"])
            .arg(file)
            .output()
            .expect("it ran before");
        fs::remove_file(file).expect("it was written");
        let said = String::from_utf8_lossy(&output.stderr);
        let said = said.trim().replace(&*file.to_string_lossy(), "ptx");
        if output.status.success() { Ok(said) } else { Err(said) }
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

const CLEAN: &str = "ptxas info    : Function properties for matmul\n    0 bytes stack frame, 0 bytes \
                     spill stores, 0 bytes spill loads\nptxas info    : Used 40 registers, used 2 barriers";

#[test]
fn what_ptxas_says_is_judged() {
    assert_eq!(read(CLEAN), Ok(40));
    let spilling = CLEAN.replace("0 bytes spill stores", "8 bytes spill stores");
    let advised = format!(
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are \
         serialized due to function call\n{CLEAN}"
    );
    for bad in [spilling, advised, CLEAN.replace("Used 40", ""), String::new()] {
        assert_eq!(read(&bad), Err(bad.clone()));
    }
}

/// An assembler that is a shell script: it counts its calls, and says what it is told to say.
#[cfg(unix)]
#[test]
fn only_what_is_all_right_is_kept() {
    use std::os::unix::fs::PermissionsExt;

    use kaio_candle::ptx::{Kernel, Target};

    let folder = PathBuf::from(env!("CARGO_TARGET_TMPDIR"))
        .join(format!("assembler-{}", std::process::id()));
    let _ = fs::remove_dir_all(&folder);
    fs::create_dir_all(&folder).expect("a folder for tests");
    let [program, calls, says, fails] =
        ["ptxas", "calls", "says", "fails"].map(|name| folder.join(name));
    let shown = |path: &Path| path.to_string_lossy().into_owned();
    let script = format!(
        "#!/bin/sh\necho call >>'{}'\ncat '{}' >&2\n[ ! -e '{}' ]\n",
        shown(&calls),
        shown(&says),
        shown(&fails)
    );
    fs::write(&program, script).expect("written");
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).expect("executable");
    let assembler = |version: &str| Assembler {
        program: program.clone(),
        release: "13.0".into(),
        version: version.into(),
    };
    let one = assembler("13.0.1");
    let cache = Cache::new(folder.join("kept"));
    let count = || fs::read_to_string(&calls).unwrap_or_default().lines().count();
    let source = |name: &'static str| Kernel::new(name, Target::Sm80, 32).finish();
    let (a, b) = (source("a"), source("b"));
    let ask = |by: &Assembler, source: &Source, arch: &str| {
        by.assemble(source, arch, &folder.join("a.ptx"), &cache)
    };

    // Neither a failure nor advice is kept.
    fs::write(&fails, "").expect("written");
    fs::write(&says, CLEAN).expect("written");
    assert!(ask(&one, &a, "sm_80").is_err() && ask(&one, &a, "sm_80").is_err());
    fs::remove_file(&fails).expect("it is there");
    fs::write(&says, CLEAN.replace("0 bytes spill loads", "4 bytes spill loads")).expect("written");
    assert!(ask(&one, &a, "sm_80").is_err() && ask(&one, &a, "sm_80").is_err());
    assert_eq!(count(), 4);

    // A clean text is, and is for this text, architecture and version alone.
    fs::write(&says, CLEAN).expect("written");
    assert_eq!([ask(&one, &a, "sm_80"), ask(&one, &a, "sm_80")], [Ok(40), Ok(40)]);
    assert_eq!(count(), 5);
    fs::write(&says, CLEAN.replace("Used 40", "Used 41")).expect("written");
    assert_eq!(ask(&one, &b, "sm_80"), Ok(41));
    assert_eq!(ask(&one, &a, "sm_89"), Ok(41));
    assert_eq!(ask(&assembler("13.0.2"), &a, "sm_80"), Ok(41));
    assert_eq!(ask(&one, &a, "sm_80"), Ok(40));
    assert_eq!(count(), 8);

    // What was damaged is asked again.
    for damage in [
        |kept: &str| kept.replace("Used 40", "Used 39"),
        |kept: &str| kept[..kept.len() / 2].to_string(),
    ] {
        for entry in fs::read_dir(folder.join("kept")).expect("it is there") {
            let path = entry.expect("it can be read").path();
            let kept = fs::read_to_string(&path).expect("a text");
            fs::write(&path, damage(&kept)).expect("written");
        }
        let before = count();
        fs::write(&says, CLEAN).expect("written");
        assert_eq!(ask(&one, &a, "sm_80"), Ok(40));
        assert_eq!(count(), before + 1);
    }
    fs::remove_dir_all(&folder).expect("it is there");
}
