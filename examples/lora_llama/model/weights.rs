//! Folders of checkpoints as Hugging Face has them: one safetensors file or several, with an index of which has which tensor.

use std::collections::{BTreeSet, HashMap};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Write};
use std::path::{Path, PathBuf};

use candle_core::safetensors::{self, MmapedSafetensors};
use candle_core::{DType, Device, Error, Result, Tensor, bail};
use candle_nn::VarBuilder;
use serde_json::{Map, Value, json};

use super::Config;

const ONE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// What a model's folder says of it.
pub fn config(folder: &Path) -> Result<Config> {
    let path = folder.join("config.json");
    let text = read(&path)?;
    Config::from_json(&String::from_utf8_lossy(&text)).map_err(|error| of_file(&path, error))
}

/// The files with a model's tensors.
pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
    let (one, index) = (folder.join(ONE), folder.join(INDEX));
    if !index.exists() {
        if !one.exists() {
            bail!("there is neither {ONE} nor {INDEX} in {}", folder.display())
        }
        return Ok(vec![one]);
    }
    let json: Value =
        serde_json::from_slice(&read(&index)?).map_err(|error| of_file(&index, error))?;
    let Some(map) = json["weight_map"].as_object() else {
        bail!("{}: no `weight_map`", index.display())
    };
    let names: BTreeSet<&str> = map.values().filter_map(Value::as_str).collect();
    let paths: Vec<_> = names.into_iter().map(|name| folder.join(name)).collect();
    match paths.iter().find(|path| !path.exists()) {
        Some(missing) => bail!("{} names {}, which is not there", INDEX, missing.display()),
        None => Ok(paths),
    }
}

/// The tensors of a model, read when they are asked for.
pub fn open(folder: &Path, dtype: DType, device: &Device) -> Result<VarBuilder<'static>> {
    let files = files(folder)?;
    // SAFETY: who runs the example does not change the model's files meanwhile.
    #[allow(unsafe_code, reason = "a file in memory is the system's, and others may write to it")]
    let tensors = unsafe { MmapedSafetensors::multi(&files)? };
    Ok(VarBuilder::from_backend(Box::new(tensors), dtype, device.clone()))
}

/// Writes tensors as transformers and PEFT read them: with the format in the header, where candle has none.
///
/// A run that is killed while it writes leaves what was there before.
pub fn save(tensors: &HashMap<String, Tensor>, path: &Path) -> Result<()> {
    let [plain, unfinished] = ["plain", "unfinished"].map(|end| path.with_extension(end));
    safetensors::save(tensors, &plain)?;
    let mut from = BufReader::new(File::open(&plain)?);
    let mut length = [0; 8];
    from.read_exact(&mut length)?;
    let mut header = vec![0; u64::from_le_bytes(length) as usize];
    from.read_exact(&mut header)?;
    let mut header: Map<String, Value> = serde_json::from_slice(&header).map_err(Error::wrap)?;
    header.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut header = serde_json::to_vec(&header).map_err(Error::wrap)?;
    header.resize(header.len().next_multiple_of(8), b' ');
    let mut to = BufWriter::new(File::create(&unfinished)?);
    to.write_all(&(header.len() as u64).to_le_bytes())?;
    to.write_all(&header)?;
    io::copy(&mut from, &mut to)?;
    to.flush()?;
    fs::rename(unfinished, path)?;
    Ok(fs::remove_file(plain)?)
}

pub fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).map_err(|error| of_file(path, error))
}

/// An error that says in which file it is.
pub fn of_file(path: &Path, error: impl std::fmt::Display) -> Error {
    Error::msg(format!("{}: {error}", path.display()))
}
