//! Command lines: values of options, and how a program ends.

use std::error::Error;
use std::process::ExitCode;

use candle_core::Device;

/// What `main` gives, and on the terminal why a run failed.
pub fn exit(result: Result<(), Box<dyn Error>>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error}");
            ExitCode::FAILURE
        }
    }
}

/// `cpu` or `cuda:N`.
pub fn device(text: &str) -> Result<Device, String> {
    match text.strip_prefix("cuda:").map(str::parse) {
        None if text == "cpu" => Ok(Device::Cpu),
        Some(Ok(_)) if cfg!(not(feature = "cuda")) => {
            Err("this build has no CUDA: add --features cuda to the cargo command".into())
        }
        Some(Ok(ordinal)) => Device::new_cuda(ordinal).map_err(|error| error.to_string()),
        _ => Err("expected cpu or cuda:N".into()),
    }
}

pub fn at_least<const LOW: usize>(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(number) if number >= LOW => Ok(number),
        _ => Err(format!("expected a whole number of at least {LOW}")),
    }
}

pub fn positive(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(number) if number > 0.0 && f64::is_finite(number) => Ok(number),
        _ => Err("expected a positive number".into()),
    }
}
