//! The directories of `KAIO_CACHE_DIR` and `KAIO_DUMP_PTX`.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::hash::{BuildHasher, DefaultHasher, Hash, Hasher, RandomState};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

pub fn hash(value: &impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

/// What was kept under a name, unless it is damaged, or somebody else may have written it: this becomes
/// code.
pub fn read_sealed(directory: &Path, name: &str) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    own_file(&directory.join(name)).ok()?.read_to_end(&mut bytes).ok()?;
    let length = unsealed(name, &bytes)?.len();
    bytes.truncate(length);
    Some(bytes)
}

/// Keeps bytes under a name. That it could not be done costs only time.
pub fn write_sealed(directory: &Path, name: &str, bytes: &[u8]) {
    write_whole(directory, name, &sealed(name, bytes));
}

/// A file that is there whole or not at all, whoever else writes it. That it could not be written costs
/// only time.
pub fn write_whole(directory: &Path, name: &str, bytes: &[u8]) {
    // Nobody can leave a link where the file is put together, and one at its name is replaced.
    let partial = directory.join(format!("{name}.{:016x}", random()));
    let written = own_directory(directory)
        .and_then(|()| write_new(&partial, bytes))
        .and_then(|()| fs::rename(&partial, directory.join(name)));
    if written.is_err() {
        let _ = fs::remove_file(&partial);
    }
}

/// A number that others cannot predict: std seeds it with what the system has for that.
fn random() -> u64 {
    RandomState::new().hash_one(())
}

fn write_new(path: &Path, bytes: &[u8]) -> io::Result<()> {
    // Not if there is something, be it a link to nowhere.
    let mut options = OpenOptions::new();
    options.write(true).create_new(true);
    // Whatever the process's mask allows, only its user writes: `own_file` wants it so.
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o644);
    options.open(path)?.write_all(bytes)
}

/// Makes a directory, if it is not there, that only its user writes to.
fn own_directory(path: &Path) -> io::Result<()> {
    let mut builder = DirBuilder::new();
    #[cfg(unix)]
    std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
    builder.recursive(true).create(path)
}

/// With a check sum of name and bytes at its end.
fn sealed(name: &str, bytes: &[u8]) -> Vec<u8> {
    [bytes, &hash(&(name, bytes)).to_le_bytes()].concat()
}

/// The driver believes the sizes inside an image: what was cut, overwritten or renamed must not reach it.
fn unsealed<'a>(name: &str, file: &'a [u8]) -> Option<&'a [u8]> {
    let (bytes, seal) = file.split_last_chunk()?;
    (u64::from_le_bytes(*seal) == hash(&(name, bytes))).then_some(bytes)
}

/// A file that is no link and that nobody but this user and root may have written.
fn own_file(path: &Path) -> io::Result<File> {
    let refuse = || io::Error::from(io::ErrorKind::PermissionDenied);
    let named = fs::symlink_metadata(path)?;
    if !named.is_file() {
        return Err(refuse());
    }
    let file = File::open(path)?;
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let opened = file.metadata()?;
        let same = (named.dev(), named.ino()) == (opened.dev(), opened.ino());
        let mine = user().is_none_or(|user| [user, ROOT].contains(&opened.uid()));
        if !same || !mine || opened.mode() & OTHERS_WRITE != 0 {
            return Err(refuse());
        }
    }
    Ok(file)
}

#[cfg(unix)]
const ROOT: u32 = 0;
/// Those of the group, and all others.
#[cfg(unix)]
const OTHERS_WRITE: u32 = 0o022;

/// This process's user, where the system tells.
#[cfg(unix)]
fn user() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/proc/self").ok().map(|process| process.uid())
}

/// A directory that a variable of the environment names.
pub fn directory(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).filter(|value| !value.is_empty()).map(PathBuf::from)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A new directory below the system's temporary one, removed at the end.
    struct Scratch(PathBuf);

    impl Scratch {
        fn new() -> Self {
            let path = std::env::temp_dir().join(format!("kaio-candle-{:016x}", random()));
            own_directory(&path).unwrap();
            Self(path)
        }

        fn names(&self) -> Vec<String> {
            let entries = fs::read_dir(&self.0).unwrap();
            entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_damaged_or_renamed_file_is_not_unsealed() {
        let image = b"\x7fELF and so on".as_slice();
        let file = sealed("a", image);
        assert_eq!(unsealed("a", &file), Some(image));
        assert_eq!(unsealed("b", &file), None);
        assert!((0..file.len()).all(|len| unsealed("a", &file[..len]).is_none()));
        for i in 0..file.len() {
            let mut file = file.clone();
            file[i] ^= 1;
            assert_eq!(unsealed("a", &file), None);
        }
    }

    #[test]
    fn files_are_written_whole_or_not_at_all() {
        let scratch = Scratch::new();
        // Made if it is not there.
        let directory = scratch.0.join("below");
        let bytes = vec![7; 1 << 16];
        std::thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| write_sealed(&directory, "kernel", &bytes));
            }
        });
        assert_eq!(read_sealed(&directory, "kernel"), Some(bytes.clone()));
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1, "nothing else is left");
        // Not a directory: silent.
        write_whole(&directory.join("kernel"), "kernel", &bytes);
        assert_eq!(read_sealed(&directory, "other"), None);
    }

    #[test]
    fn names_of_unfinished_files_differ() {
        assert_ne!(random(), random());
    }

    #[cfg(unix)]
    #[test]
    fn links_are_not_followed() {
        use std::os::unix::fs::symlink;
        let scratch = Scratch::new();
        let (target, planted) = (scratch.0.join("target"), scratch.0.join("kernel"));
        fs::write(&target, sealed("kernel", b"mine")).unwrap();
        symlink(&target, &planted).unwrap();
        // Neither read ...
        assert_eq!(read_sealed(&scratch.0, "kernel"), None);
        // ... nor written to, where a file is put together ...
        assert_eq!(write_new(&planted, b"new").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        let nowhere = scratch.0.join("nowhere");
        symlink(scratch.0.join("nothing"), &nowhere).unwrap();
        assert_eq!(write_new(&nowhere, b"new").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        // ... and at the final name it is replaced.
        write_sealed(&scratch.0, "kernel", b"new");
        assert_eq!(fs::read(&target).unwrap(), sealed("kernel", b"mine"));
        assert!(fs::symlink_metadata(&planted).unwrap().is_file());
        assert_eq!(read_sealed(&scratch.0, "kernel").as_deref(), Some(b"new".as_slice()));
        let mut names = scratch.names();
        names.sort();
        assert_eq!(names, ["kernel", "nowhere", "target"]);
    }

    #[cfg(unix)]
    #[test]
    fn what_others_may_write_is_not_read() {
        use std::os::unix::fs::PermissionsExt;
        let scratch = Scratch::new();
        write_sealed(&scratch.0, "kernel", b"mine");
        let path = scratch.0.join("kernel");
        for (mode, read) in [(0o644, true), (0o664, false), (0o646, false), (0o600, true)] {
            fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            assert_eq!(read_sealed(&scratch.0, "kernel").is_some(), read, "{mode:o}");
        }
        let mode = fs::metadata(&scratch.0).unwrap().permissions().mode();
        assert_eq!(mode & 0o077, 0, "the directory was made for its user alone");
    }
}
