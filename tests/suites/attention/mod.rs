//! Tables of attention and its gradients: a file for each topic.

mod accuracy;
mod alibi;
mod alone;
mod bias;
mod combined;
mod differences;
mod engines;
mod gradient_kinds;
mod isolation;
mod kinds;
mod layouts;
mod lengths;
mod log_sum_exp;
mod loops;
mod many_tiles;
mod options;
mod plain;
mod problem;
mod random;
mod scales;
mod sizes;
mod softcap;
mod specials;
mod stand_ins;
mod tc;
mod windows;

pub use {
    accuracy::*, alibi::*, alone::*, bias::*, combined::*, differences::*, engines::*,
    gradient_kinds::*, isolation::*, kinds::*, layouts::*, lengths::*, log_sum_exp::*,
    many_tiles::*, random::*, scales::*, sizes::*, softcap::*, specials::*, stand_ins::*, tc::*,
    windows::*,
};
pub use {options::Options, problem::Problem};

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::Device;

use super::Tally;

const DTYPES: [DType; 3] = [F32, F16, BF16];

/// `[]`, `[Hq]` or `[B, Hq]`; Hkv; `[Sq, Sk, D, Dv]`.
type Sizes = (&'static [usize], usize, [usize; 4]);

const SMALL: Sizes = (&[2, 4], 2, [9, 13, 8, 24]);

/// Around tiles, Sq ≠ Sk both ways, one row, one key, grouped heads, Dv ≠ D, D not a multiple of 8.
const MIXED: [Sizes; 8] = [
    (&[], 1, [65, 63, 24, 24]),
    (&[3], 3, [64, 64, 8, 16]),
    (&[4], 2, [63, 129, 40, 8]),
    (&[2, 4], 1, [127, 128, 20, 12]),
    (&[1, 2], 1, [129, 127, 64, 80]),
    (&[2, 6], 3, [1, 177, 16, 16]),
    (&[1, 2], 2, [176, 175, 33, 5]),
    (&[2, 2], 1, [17, 1, 8, 8]),
];

fn run(suite: &'static str, device: &Device, problems: impl IntoIterator<Item = Problem>) {
    let mut tally = Tally::new(suite, device);
    for problem in problems {
        tally.case(format!("{problem:?}"), || problem.check(device));
    }
    tally.finish();
}

/// Results alone, without gradients.
fn results(
    suite: &'static str,
    device: &Device,
    problems: impl IntoIterator<Item = (&'static str, Problem)>,
) {
    let mut tally = Tally::new(suite, device);
    for (what, problem) in problems {
        tally.case(format!("{what}: {problem:?}"), || problem.check_result(device));
    }
    tally.finish();
}

/// All sizes in all dtypes, causal and not.
fn grid(sizes: &[Sizes]) -> impl Iterator<Item = Problem> + Clone + use<> {
    let sizes = sizes.to_vec();
    sizes.into_iter().flat_map(|sizes| {
        DTYPES.into_iter().flat_map(move |dtype| {
            [false, true].map(|causal| {
                let options = Options { causal, ..Options::default() };
                Problem { options, ..Problem::new(dtype, sizes) }
            })
        })
    })
}

/// Each of `options` in all sizes and dtypes.
fn each(sizes: &[Sizes], options: &[Options]) -> Vec<Problem> {
    let problems = sizes.iter().flat_map(|&sizes| {
        let dtypes = DTYPES.into_iter().map(move |dtype| Problem::new(dtype, sizes));
        dtypes
            .flat_map(|p| options.iter().map(move |o| Problem { options: o.clone(), ..p.clone() }))
    });
    problems.collect()
}
