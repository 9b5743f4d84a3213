//! What was found out about a text, kept in a folder under a hash of all that it depends on.
//!
//! A file for each, `HASH`: the hash once more, a hash of what follows, and what follows. A file that is cut
//! or changed, or that cannot be read, is none.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};
use std::{fs, process};

/// How long entries stay that nobody asks for: other checkouts share the folder.
const UNUSED: Duration = Duration::from_secs(14 * 24 * 3600);

pub struct Cache {
    folder: Option<PathBuf>,
    /// Entries that were read or written.
    used: Mutex<HashSet<String>>,
    found: AtomicUsize,
}

impl Cache {
    pub fn new(folder: PathBuf) -> Self {
        let made = fs::create_dir_all(&folder).is_ok();
        Self { folder: made.then_some(folder), ..Self::none() }
    }

    /// One that keeps nothing.
    pub fn none() -> Self {
        Self { folder: None, used: Mutex::default(), found: AtomicUsize::default() }
    }

    pub fn get(&self, key: [&str; 4]) -> Option<String> {
        let name = name(key);
        let kept = fs::read_to_string(self.folder.as_ref()?.join(&name)).ok()?;
        let (first, rest) = kept.split_once('\n')?;
        let (second, value) = rest.split_once('\n')?;
        let whole = first == name && second == hash([value.as_bytes()]);
        whole.then(|| {
            self.used.lock().expect("nobody panicked").insert(name);
            self.found.fetch_add(1, Ordering::Relaxed);
            value.to_string()
        })
    }

    /// A folder that cannot be written to keeps nothing.
    pub fn put(&self, key: [&str; 4], value: &str) {
        let (Some(folder), name) = (&self.folder, name(key)) else { return };
        let text = format!("{name}\n{}\n{value}", hash([value.as_bytes()]));
        // Whole or not at all, whoever else writes the same.
        let part = folder.join(format!("{name}.{}", process::id()));
        let written = fs::write(&part, text).and_then(|()| fs::rename(&part, folder.join(&name)));
        if written.is_ok() {
            self.used.lock().expect("nobody panicked").insert(name);
        }
    }

    /// How often something was found.
    pub fn found(&self) -> usize {
        self.found.load(Ordering::Relaxed)
    }

    /// Removes what was not asked for, and is old.
    pub fn forget_unused(&self) {
        let used = self.used.lock().expect("nobody panicked");
        let entries = self.folder.iter().filter_map(|folder| fs::read_dir(folder).ok()).flatten();
        for entry in entries.flatten() {
            let written = entry.metadata().and_then(|of| of.modified());
            let age = written.map(|at| SystemTime::now().duration_since(at).unwrap_or_default());
            let asked = entry.file_name().to_str().is_some_and(|name| used.contains(name));
            if !asked && age.is_ok_and(|age| age > UNUSED) {
                // Another run may have been faster.
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn name(key: [&str; 4]) -> String {
    hash(key.map(str::as_bytes))
}

/// FNV-1a of 128 bits, in hexadecimal, over the parts and their lengths.
pub fn hash<const N: usize>(parts: [&[u8]; N]) -> String {
    let mut hash: u128 = 0x6c62_272e_07bb_0142_62b8_2175_6295_c58d;
    let mut eat = |bytes: &[u8]| {
        for &byte in bytes {
            hash = (hash ^ u128::from(byte)).wrapping_mul(0x0100_0000_0000_0000_0000_013b);
        }
    };
    for part in parts {
        eat(&(part.len() as u64).to_le_bytes());
        eat(part);
    }
    format!("{hash:032x}")
}
