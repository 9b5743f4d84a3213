//! Padded and packed batches.

use candle_core::Device;

use super::options::Lengths::{self, Packed, Padded};
use super::options::{Bias, Options, Slopes};
use super::{Sizes, each, run};

/// Padded and packed batches, with sequences of length zero and rows of no sequence.
pub fn lengths(device: &Device) {
    let variants = |lengths: Lengths, biased: bool| {
        let bias = biased.then(|| Bias { own: [true, false, true], ..Bias::default() });
        [
            Options { lengths: lengths.clone(), ..Options::default() },
            Options { lengths: lengths.clone(), causal: true, bshd: true, ..Options::default() },
            Options {
                lengths: lengths.clone(),
                left: Some(9),
                right: Some(2),
                wide: true,
                ..Options::default()
            },
            Options {
                lengths,
                causal: true,
                left: Some(70),
                softcap: Some(2.0),
                slopes: Some(Slopes::ByBatch),
                bias,
                ..Options::default()
            },
        ]
    };
    let padded = [
        [Some(vec![65, 0, 17]), Some(vec![3, 130, 140])],
        [None, Some(vec![140, 0, 65])],
        [Some(vec![1, 129, 64]), None],
        [Some(vec![0, 0, 0]), Some(vec![0, 0, 0])],
    ];
    let sizes: [Sizes; 1] = [(&[3, 4], 2, [130, 140, 20, 8])];
    let padded = padded.map(|lengths| each(&sizes, &variants(Padded(lengths), true)));
    let packed = [
        [vec![0, 5, 5, 70, 135], vec![0, 9, 20, 20, 155]],
        [vec![0, 64, 129, 140], vec![0, 63, 128, 150]],
        [vec![0, 140], vec![0, 155]],
        [vec![0, 0, 0], vec![0, 0, 0]],
        [vec![0], vec![0]],
    ];
    let sizes: [Sizes; 1] = [(&[4], 2, [140, 155, 20, 8])];
    let packed = packed.map(|lengths| each(&sizes, &variants(Packed(lengths), false)));
    run("flash_attn lengths", device, padded.into_iter().chain(packed).flatten());
}
