//! The text: where it comes from, what its tokens are, how it is split, and the batches cut from it.
#![allow(dead_code, reason = "each example that includes this file uses some of it")]

use std::path::{Path, PathBuf};
use std::{env, fs, io};

use candle_core::{Device, Result, Tensor, bail};
use tokenizers::Tokenizer;

use crate::rng::Rng;

/// The part of the text, at its end, that is never trained on.
const HELD_OUT: f64 = 0.1;
/// Bounds the time that validation takes on a long text.
const MAX_VALIDATION_WINDOWS: usize = 256;
/// Of a text that nobody wrote.
const RANDOM_TOKENS: usize = 1 << 22;

/// What a token is.
pub enum Alphabet {
    Bytes,
    Words(Box<Tokenizer>),
    /// A number: there is no text.
    Numbers,
}

impl Alphabet {
    /// By a tokenizer's file (`tokenizer.json`), if there is one.
    pub fn new(tokenizer: Option<&Path>, vocabulary: usize) -> Result<Self> {
        let Some(path) = tokenizer else {
            return Ok(if vocabulary == 256 { Self::Bytes } else { Self::Numbers });
        };
        match Tokenizer::from_file(path) {
            Ok(tokenizer) if tokenizer.get_vocab_size(true) > vocabulary => bail!(
                "the tokenizer {} has {} tokens, the model {vocabulary}",
                path.display(),
                tokenizer.get_vocab_size(true)
            ),
            Ok(mut tokenizer) => {
                // A file may say how many tokens a call gives.
                tokenizer.with_padding(None);
                tokenizer.with_truncation(None).map_err(candle_core::Error::wrap)?;
                Ok(Self::Words(Box::new(tokenizer)))
            }
            Err(error) => bail!("cannot read the tokenizer {}: {error}", path.display()),
        }
    }

    pub fn encode(&self, text: &[u8]) -> Result<Vec<u32>> {
        match self {
            Self::Bytes => Ok(text.iter().map(|&byte| byte.into()).collect()),
            Self::Words(tokenizer) => {
                let encoding = tokenizer.encode_fast(String::from_utf8_lossy(text), false);
                Ok(encoding.map_err(candle_core::Error::wrap)?.get_ids().to_vec())
            }
            Self::Numbers => bail!("a text needs a --tokenizer"),
        }
    }

    pub fn decode(&self, tokens: &[u32]) -> Result<String> {
        match self {
            Self::Bytes => {
                let bytes: Vec<_> = tokens.iter().map(|&token| token as u8).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
            Self::Words(tokenizer) => {
                tokenizer.decode(tokens, true).map_err(candle_core::Error::wrap)
            }
            Self::Numbers => Ok(format!("{tokens:?}")),
        }
    }
}

/// A text whose two parts both have windows of `seq` tokens and one more.
pub struct Corpus {
    training: Vec<u32>,
    validation: Vec<u32>,
    vocabulary: usize,
    seq: usize,
}

impl Corpus {
    /// The text of a file; without one, that of this crate for a model of bytes or with a tokenizer, and else random numbers.
    pub fn load(
        text: Option<&Path>,
        alphabet: &Alphabet,
        vocabulary: usize,
        seq: usize,
    ) -> Result<Self> {
        let text = match (text, alphabet) {
            (Some(path), _) => match fs::read(path) {
                Ok(text) => text,
                Err(error) => bail!("cannot read the text {}: {error}", path.display()),
            },
            (None, Alphabet::Numbers) => {
                let mut rng = Rng::new(0, Rng::TEXT);
                let tokens = (0..RANDOM_TOKENS).map(|_| rng.below(vocabulary) as u32);
                return Self::new(tokens.collect(), vocabulary, seq);
            }
            (None, _) => text_of_this_crate(&["rs", "md", "toml"])?,
        };
        Self::new(alphabet.encode(&text)?, vocabulary, seq)
    }

    /// The bytes of this crate's files whose names end so.
    pub fn of_this_crate(extensions: &[&str], vocabulary: usize, seq: usize) -> Result<Self> {
        let text = Alphabet::Bytes.encode(&text_of_this_crate(extensions)?)?;
        Self::new(text, vocabulary, seq)
    }

    fn new(mut text: Vec<u32>, vocabulary: usize, seq: usize) -> Result<Self> {
        let held_out = (text.len() as f64 * HELD_OUT) as usize;
        if held_out <= seq {
            bail!(
                "{held_out} tokens are held out of a text of {}: too few for --seq {seq}",
                text.len()
            )
        }
        let validation = text.split_off(text.len() - held_out);
        Ok(Self { training: text, validation, vocabulary, seq })
    }

    pub fn len(&self) -> usize {
        self.training.len() + self.validation.len()
    }

    /// The entropy of single tokens, in nats: the loss of a model that knows how common each of them is
    /// and nothing else.
    pub fn unigram_entropy(&self) -> f64 {
        let mut counts = vec![0usize; self.vocabulary];
        for &token in self.training.iter().chain(&self.validation) {
            counts[token as usize] += 1;
        }
        let total = self.len() as f64;
        let probabilities =
            counts.iter().filter(|&&count| count > 0).map(|&count| count as f64 / total);
        -probabilities.map(|p| p * p.ln()).sum::<f64>()
    }

    /// `batch` windows of training text and, for each of their tokens, the one that follows it.
    pub fn training_batch(
        &self,
        rng: &mut Rng,
        batch: usize,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        inputs_and_targets(&self.training_windows(rng, batch), device)
    }

    /// Each with the token that follows it.
    pub fn training_windows(&self, rng: &mut Rng, batch: usize) -> Vec<&[u32]> {
        let starts = self.training.len() - self.seq;
        let window = |_| &self.training[rng.below(starts)..][..=self.seq];
        (0..batch).map(window).collect()
    }

    /// The mean of a loss, in nats per token, on text that is not trained on.
    pub fn validation_loss(
        &self,
        batch: usize,
        device: &Device,
        loss: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<f64> {
        let (mut sum, mut count) = (0.0, 0);
        for windows in self.validation_batches(batch, device) {
            let (tokens, targets) = windows?;
            sum += f64::from(loss(&tokens, &targets)?.to_scalar::<f32>()?)
                * tokens.elem_count() as f64;
            count += tokens.elem_count();
        }
        Ok(sum / count as f64)
    }

    /// The held-out text in windows that do not overlap, at most [`MAX_VALIDATION_WINDOWS`] of them
    /// spread over it.
    fn validation_batches(
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

/// Every file of this crate whose name ends so, in the order of their paths.
fn text_of_this_crate(extensions: &[&str]) -> Result<Vec<u8>> {
    let Some(root) = env::var_os("CARGO_MANIFEST_DIR") else {
        bail!("the crate's sources are found only under `cargo run`; give a text with --text FILE")
    };
    let mut files = Vec::new();
    collect_files(Path::new(&root), extensions, &mut files)?;
    files.sort();
    let mut text = Vec::new();
    for file in files {
        text.extend(fs::read(file)?);
    }
    Ok(text)
}

fn inputs_and_targets(windows: &[&[u32]], device: &Device) -> Result<(Tensor, Tensor)> {
    let seq = windows[0].len() - 1;
    let tokens = |offset: usize| {
        let ids = windows.iter().flat_map(|window| &window[offset..offset + seq]);
        let ids: Vec<u32> = ids.copied().collect();
        Tensor::from_vec(ids, (windows.len(), seq), device)
    };
    Ok((tokens(0)?, tokens(1)?))
}

fn collect_files(
    directory: &Path,
    extensions: &[&str],
    files: &mut Vec<PathBuf>,
) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let ends = path.extension().and_then(|end| end.to_str());
        if path.is_dir() {
            if name != "target" && !name.starts_with('.') {
                collect_files(&path, extensions, files)?;
            }
        } else if ends.is_some_and(|end| extensions.contains(&end)) {
            files.push(path);
        }
    }
    Ok(())
}
