//! A small case of each kernel of the backward pass, and of each way through it.

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::Device;

use super::options::{Bias, Lengths, Options, Slopes};
use super::problem::{Leaves, Loss, Problem};
use super::{Sizes, run};
use crate::suites::Layout;

pub fn every_gradient_kind(dtype: DType) -> Vec<Problem> {
    let (plain, causal) = (Options::default, Options::causal);
    let padded = Lengths::Padded([Some(vec![150, 3]), Some(vec![0, 140])]);
    let packed = Lengths::Packed([vec![0, 5, 5, 90, 150], vec![0, 70, 78, 78, 140]]);
    let bias = |own, narrow| Some(Bias { own, narrow, ..Bias::default() });
    let all = |bias| Options {
        bias,
        left: Some(60),
        softcap: Some(2.0),
        slopes: Some(Slopes::ByHead),
        ..causal()
    };
    let hides = Some(Bias { hides: true, ..Bias::default() });
    let kinds: Vec<(Sizes, Options)> = vec![
        ((&[1], 1, [150, 140, 64, 64]), plain()),
        ((&[1, 4], 2, [140, 150, 64, 64]), causal()),
        ((&[2], 1, [150, 70, 128, 128]), causal()),
        ((&[1], 1, [70, 150, 128, 128]), plain()),
        ((&[2], 2, [40, 70, 256, 256]), causal()),
        ((&[2], 1, [70, 40, 80, 40]), plain()),
        ((&[1], 1, [70, 80, 96, 200]), causal()),
        ((&[3], 1, [70, 75, 33, 5]), causal()),
        ((&[1], 1, [1, 1, 1, 1]), plain()),
        ((&[2], 1, [1, 200, 64, 64]), causal()),
        ((&[2], 2, [70, 1, 8, 16]), plain()),
        ((&[2], 2, [150, 60, 16, 16]), causal()),
        ((&[1, 2], 1, [140, 150, 16, 16]), Options { left: Some(40), ..causal() }),
        ((&[2], 1, [150, 90, 24, 24]), Options { right: Some(9), ..plain() }),
        ((&[1, 2], 2, [80, 90, 64, 64]), Options { scale: Some(-0.2), ..causal() }),
        ((&[2, 2], 1, [70, 90, 64, 64]), all(bias([true; 3], false))),
        ((&[2, 2], 1, [70, 80, 32, 32]), all(bias([false, true, true], true))),
        ((&[2, 2], 1, [70, 81, 32, 32]), all(bias([true, false, false], false))),
        ((&[2, 2], 1, [90, 90, 128, 128]), Options { bias: bias([false; 3], true), ..plain() }),
        ((&[1, 2], 1, [70, 80, 16, 16]), Options { bias: hides, ..plain() }),
        ((&[2, 2], 1, [150, 140, 16, 16]), Options { lengths: padded.clone(), ..causal() }),
        (
            (&[2, 2], 2, [150, 140, 16, 24]),
            Options {
                lengths: padded,
                bias: bias([true, false, true], false),
                bshd: true,
                wide: true,
                ..plain()
            },
        ),
        ((&[4], 2, [155, 145, 64, 64]), Options { lengths: packed.clone(), ..causal() }),
        (
            (&[2], 1, [155, 145, 20, 12]),
            Options {
                lengths: packed,
                left: Some(30),
                slopes: Some(Slopes::ByBatch),
                bshd: true,
                ..plain()
            },
        ),
        ((&[2, 3], 3, [90, 90, 64, 64]), Options { wide: true, bshd: true, ..plain() }),
    ];
    let problem = |(sizes, options)| Problem { options, ..Problem::new(dtype, sizes) };
    let fused =
        Problem { leaves: Leaves::Fused, ..problem(((&[1, 2], 2, [70, 70, 64, 64]), causal())) };
    let strided = Problem {
        leaves: Leaves::Each([Layout::Permuted, Layout::Transposed, Layout::Expanded]),
        loss: Loss::Transposed,
        ..problem(((&[2, 2], 2, [70, 80, 16, 16]), plain()))
    };
    let broadcast = Problem { loss: Loss::Sum, ..problem(((&[2], 1, [70, 80, 64, 64]), causal())) };
    kinds.into_iter().map(problem).chain([fused, strided, broadcast]).collect()
}

/// What `compute-sanitizer` and the emulator are run on.
pub fn gradient_kinds(device: &Device) {
    let dtypes = if device.is_cpu() { &[BF16] } else { [BF16, F16, F32].as_slice() };
    let problems = dtypes.iter().flat_map(|&dtype| every_gradient_kind(dtype));
    let problems = problems.flat_map(|problem| {
        [false, true].map(|deterministic| {
            let options = Options { deterministic, ..problem.options.clone() };
            Problem { options, ..problem.clone() }
        })
    });
    run("flash_attn gradient kinds", device, problems);
}
