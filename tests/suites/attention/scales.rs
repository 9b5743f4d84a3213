//! Scores that are all alike, and scores that are far apart.

use candle_core::Device;

use super::options::{Bias, Options, Slopes};
use super::problem::Problem;
use super::{SMALL, Sizes, each, grid, run};

/// Uniform, inverted and one-hot weights; the largest scores overflow a naive `exp`.
pub fn scales(device: &Device) {
    let sizes = [SMALL, (&[2], 2, [40, 300, 8, 8])];
    let scales = [0.0, -1.0, 1e-30, 0.1, 40.0, 1e3].into_iter().map(Some);
    let problems = scales.flat_map(|scale| {
        grid(&sizes).map(move |p| Problem { options: Options { scale, ..p.options }, ..p })
    });
    run("flash_attn scales", device, problems);
}

/// Scores of some ±10⁴, and in long rows of 10⁵, which f16 does not hold.
pub fn large_logits(device: &Device) {
    let scales = [1e4, -1e4].into_iter().flat_map(|scale| {
        let options = Options { scale: Some(scale), ..Options::default() };
        [
            Options { causal: true, ..options.clone() },
            Options { left: Some(20), bias: Some(Bias::default()), ..options.clone() },
            Options { softcap: Some(1e4), slopes: Some(Slopes::ByHead), ..options },
        ]
    });
    let sizes = [SMALL, (&[2], 2, [40, 300, 8, 8])];
    let mut problems = each(&sizes, &scales.collect::<Vec<_>>());
    let long: Sizes = (&[1, 2], 1, [576, 382, 64, 64]);
    let sizes = if device.is_cpu() { [(&[2][..], 1, [100, 90, 64, 64])] } else { [long] };
    let beyond = [
        Options { scale: Some(4e4), ..Options::default() },
        Options { scale: Some(4e4), ..Options::causal() },
    ];
    problems.extend(each(&sizes, &beyond));
    run("flash_attn large logits", device, problems);
}
