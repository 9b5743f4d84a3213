//! The text: where it comes from, how it is split, and the batches cut from it.

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use candle_core::{Device, Result, Tensor, bail};

use crate::rng::Rng;

/// The part of the text, at its end, that is never trained on.
const HELD_OUT: f64 = 0.1;
/// Bounds the time that validation takes on a long text.
const MAX_VALIDATION_WINDOWS: usize = 256;

/// A text whose two parts both have windows of `seq` bytes and one more.
pub struct Corpus {
    training: Vec<u8>,
    validation: Vec<u8>,
    seq: usize,
}

impl Corpus {
    pub fn from_file(path: &Path, seq: usize) -> Result<Self> {
        match fs::read(path) {
            Ok(text) => Self::new(text, seq),
            Err(error) => bail!("cannot read the text {}: {error}", path.display()),
        }
    }

    /// Every Rust, Markdown and TOML file of this crate, in the order of their paths.
    pub fn of_this_crate(seq: usize) -> Result<Self> {
        let Some(root) = env::var_os("CARGO_MANIFEST_DIR") else {
            bail!(
                "the crate's sources are found only under `cargo run`; give a text with --text FILE"
            )
        };
        let mut files = Vec::new();
        collect_sources(Path::new(&root), &mut files)?;
        files.sort();
        let mut text = Vec::new();
        for file in files {
            text.extend(fs::read(file)?);
        }
        Self::new(text, seq)
    }

    fn new(mut text: Vec<u8>, seq: usize) -> Result<Self> {
        let held_out = (text.len() as f64 * HELD_OUT) as usize;
        if held_out <= seq {
            bail!(
                "{held_out} bytes are held out of a text of {}: too few for --seq {seq}",
                text.len()
            )
        }
        let validation = text.split_off(text.len() - held_out);
        Ok(Self { training: text, validation, seq })
    }

    pub fn len(&self) -> usize {
        self.training.len() + self.validation.len()
    }

    /// The entropy of single bytes, in nats: the loss of a model that knows how common each byte is
    /// and nothing else.
    pub fn unigram_entropy(&self) -> f64 {
        let mut counts = [0usize; 256];
        for &byte in self.training.iter().chain(&self.validation) {
            counts[usize::from(byte)] += 1;
        }
        let total = self.len() as f64;
        let probabilities =
            counts.iter().filter(|&&count| count > 0).map(|&count| count as f64 / total);
        -probabilities.map(|p| p * p.ln()).sum::<f64>()
    }

    /// `batch` windows of training text and, for each of their bytes, the byte that follows it.
    pub fn training_batch(
        &self,
        rng: &mut Rng,
        batch: usize,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        inputs_and_targets(&self.training_windows(rng, batch), device)
    }

    /// Each with the byte that follows it.
    pub fn training_windows(&self, rng: &mut Rng, batch: usize) -> Vec<&[u8]> {
        let starts = self.training.len() - self.seq;
        let window = |_| &self.training[rng.below(starts)..][..=self.seq];
        (0..batch).map(window).collect()
    }

    /// The held-out text in windows that do not overlap, at most [`MAX_VALIDATION_WINDOWS`] of them
    /// spread over it.
    pub fn validation_batches(
        &self,
        batch: usize,
        device: &Device,
    ) -> impl Iterator<Item = Result<(Tensor, Tensor)>> {
        let windows = self.validation.windows(self.seq + 1).step_by(self.seq);
        let stride = windows.len().div_ceil(MAX_VALIDATION_WINDOWS);
        let windows: Vec<_> = windows.step_by(stride).collect();
        (0..windows.len()).step_by(batch).map(move |start| {
            let end = windows.len().min(start + batch);
            inputs_and_targets(&windows[start..end], device)
        })
    }
}

fn inputs_and_targets(windows: &[&[u8]], device: &Device) -> Result<(Tensor, Tensor)> {
    let seq = windows[0].len() - 1;
    let tokens = |offset: usize| {
        let bytes = windows.iter().flat_map(|window| &window[offset..offset + seq]);
        let ids: Vec<u32> = bytes.map(|&byte| u32::from(byte)).collect();
        Tensor::from_vec(ids, (windows.len(), seq), device)
    };
    Ok((tokens(0)?, tokens(1)?))
}

fn collect_sources(directory: &Path, files: &mut Vec<PathBuf>) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                collect_sources(&path, files)?;
            }
        } else if matches!(path.extension().and_then(|e| e.to_str()), Some("rs" | "md" | "toml")) {
            files.push(path);
        }
    }
    Ok(())
}
