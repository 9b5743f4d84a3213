//! Scores under a cap.

use candle_core::Device;

use super::options::Options;
use super::{MIXED, each, run};

/// A cap that bends most scores, and one that few come near.
pub fn softcap(device: &Device) {
    let options = [
        Options { softcap: Some(0.3), ..Options::default() },
        Options { softcap: Some(30.0), scale: Some(20.0), ..Options::causal() },
    ];
    run("flash_attn softcap", device, each(&MIXED, &options));
}
