//! Layout and dtype of the result by themselves, and many options together.

use candle_core::Device;

use super::options::{Bias, Options, Slopes};
use super::{MIXED, each, run};

/// What no file of its own is about, and many options together.
pub fn options(device: &Device) {
    let all = Options {
        causal: true,
        scale: Some(0.7),
        bshd: true,
        left: Some(70),
        softcap: Some(1.5),
        slopes: Some(Slopes::ByBatch),
        bias: Some(Bias { hides: true, ..Bias::default() }),
        wide: true,
        ..Options::default()
    };
    let options = [
        Options { bshd: true, ..Options::default() },
        Options { wide: true, ..Options::default() },
        all,
    ];
    run("flash_attn options", device, each(&MIXED, &options));
}
