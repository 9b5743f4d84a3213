//! An attention for every kind of kernel, small.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::Device;

use super::options::{Bias, Lengths, Options, Slopes};
use super::problem::{Leaves, Problem};
use super::{Sizes, results};

/// One of each, and what is special about it.
pub fn every_kind(dtype: DType) -> Vec<(&'static str, Problem)> {
    let (plain, causal) = (Options::default, Options::causal);
    let packed = Lengths::Packed([vec![0, 130, 130, 200, 333], vec![0, 64, 90, 290, 301]]);
    let padded = Lengths::Padded([Some(vec![0, 170]), Some(vec![300, 129])]);
    let all = || Options {
        softcap: Some(2.0),
        slopes: Some(Slopes::ByBatch),
        bias: Some(Bias { hides: true, ..Bias::default() }),
        ..causal()
    };
    let narrow = Bias { own: [false, true, false], narrow: true, ..Bias::default() };
    let keyless = Lengths::Packed([vec![0, 60, 120, 180, 240, 340], vec![0, 0, 0, 0, 0, 310]]);
    let kinds: [(_, Sizes, _); 21] = [
        ("three warpgroups", (&[1, 2], 2, [200, 210, 64, 64]), plain()),
        ("two of them, some tiles without keys", (&[2, 4], 2, [300, 200, 128, 128]), causal()),
        ("the widest heads", (&[1, 2], 1, [130, 170, 256, 256]), plain()),
        ("values narrower than keys", (&[2, 1], 1, [150, 170, 80, 40]), causal()),
        ("many heads, which share L2", (&[24, 6], 3, [70, 70, 64, 64]), causal()),
        ("one query, keys in parts", (&[1, 8], 2, [1, 1500, 128, 128]), plain()),
        ("a few queries, keys in parts", (&[2, 8], 1, [5, 1400, 64, 64]), causal()),
        ("stages used again and again", (&[1], 1, [140, 1300, 128, 128]), causal()),
        ("the same of the widest heads", (&[1], 1, [70, 700, 256, 256]), plain()),
        ("tiles without keys, one after the other", (&[2, 4], 2, [520, 60, 128, 128]), causal()),
        ("one key", (&[3], 3, [70, 1, 8, 16]), plain()),
        ("heads of odd widths", (&[2], 2, [70, 90, 20, 12]), causal()),
        ("a window", (&[1, 2], 2, [200, 250, 64, 64]), Options { left: Some(70), ..causal() }),
        (
            "a window that looks ahead",
            (&[2], 1, [250, 150, 96, 96]),
            Options { right: Some(9), ..plain() },
        ),
        ("all that changes scores", (&[2, 4], 2, [140, 200, 64, 64]), all()),
        (
            "one bias for all queries, a scale below zero",
            (&[2, 2], 1, [140, 200, 128, 128]),
            Options { bias: Some(narrow), scale: Some(-0.2), ..plain() },
        ),
        ("lengths", (&[2, 2], 1, [250, 300, 64, 64]), Options { lengths: padded, ..causal() }),
        (
            "packed sequences",
            (&[4], 2, [340, 310, 64, 64]),
            Options { lengths: packed, bshd: true, ..causal() },
        ),
        (
            "sequences without keys",
            (&[6], 2, [340, 310, 128, 128]),
            Options { lengths: keyless, ..causal() },
        ),
        (
            "an f32 result",
            (&[2, 3], 3, [200, 200, 64, 64]),
            Options { wide: true, bshd: true, ..plain() },
        ),
        ("one view of three", (&[2, 3], 3, [200, 200, 128, 128]), causal()),
    ];
    let problem = |(name, sizes, options)| {
        let leaves = match name {
            "one view of three" => Leaves::Fused,
            _ => Problem::new(dtype, sizes).leaves,
        };
        (name, Problem { options, leaves, ..Problem::new(dtype, sizes) }.untracked())
    };
    kinds.into_iter().map(problem).collect()
}

/// What `compute-sanitizer` and the emulator are run on. The CPU path has one kernel for all.
pub fn kinds(device: &Device) {
    let dtypes = if device.is_cpu() { &[BF16] } else { [BF16, F16, F32].as_slice() };
    results("flash_attn kinds", device, dtypes.iter().flat_map(|&dtype| every_kind(dtype)));
}
