//! ALiBi slopes.

use candle_core::Device;

use super::options::{Options, Slopes};
use super::{MIXED, each, run};

/// Slopes of heads, and of each batch and head.
pub fn alibi(device: &Device) {
    let options = [
        Options { slopes: Some(Slopes::ByHead), ..Options::default() },
        Options { slopes: Some(Slopes::ByBatch), ..Options::causal() },
    ];
    run("flash_attn alibi", device, each(&MIXED, &options));
}
