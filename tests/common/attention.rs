//! Tables of attention and its gradients.

mod accuracy;
mod kinds;
mod loops;
mod options;
mod plain;
mod problem;
mod variants;

#[allow(unused_imports)] // Each test binary uses a part.
pub use {accuracy::*, kinds::*, variants::*};

use std::ops::Range;

use candle_core::DType::{self, BF16, F16, F32};
use candle_core::{Device, Error, Result, Tensor, bail};
use kaio_candle::prelude::*;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::Layout::{self, *};
use super::{Nd, Source, Tally, close, identical, plain_on, results_alone, round, ulp};
use loops::{Loops, dot, matrix, nds};
use options::{Options, Rules};
use plain::plain;
use problem::{Leaves, Loss, Problem};

const DTYPES: [DType; 3] = [F32, F16, BF16];

/// `[]`, `[Hq]` or `[B, Hq]`; Hkv; `[Sq, Sk, D, Dv]`.
type Sizes = (&'static [usize], usize, [usize; 4]);

/// Rows and head dimensions around the tiles, causal rows that see nothing, keys shared by 1, 2, 4
/// and all query heads.
const SIZES: [Sizes; 20] = [
    (&[], 1, [1, 1, 1, 1]),
    (&[], 1, [1, 300, 64, 64]),
    (&[], 1, [300, 1, 8, 16]),
    (&[], 1, [65, 64, 80, 80]),
    (&[1], 1, [16, 16, 16, 16]),
    (&[3], 3, [15, 16, 8, 8]),
    (&[4], 2, [17, 15, 16, 40]),
    (&[6], 1, [1, 17, 128, 64]),
    (&[1, 1], 1, [64, 257, 256, 256]),
    (&[1, 1], 1, [257, 300, 1, 128]),
    (&[1, 1], 1, [300, 300, 64, 64]),
    (&[1, 2], 1, [257, 64, 40, 1]),
    (&[1, 2], 2, [65, 63, 64, 80]),
    (&[1, 2], 2, [128, 128, 128, 128]),
    (&[1, 4], 1, [128, 127, 8, 64]),
    (&[1, 8], 2, [63, 65, 16, 16]),
    (&[2, 1], 1, [127, 128, 80, 40]),
    (&[2, 4], 1, [16, 63, 40, 8]),
    (&[2, 6], 3, [17, 65, 8, 16]),
    (&[3, 2], 2, [1, 16, 64, 64]),
];

const EMPTY: [Sizes; 10] = [
    (&[], 1, [0, 4, 8, 8]),
    (&[], 1, [3, 0, 8, 8]),
    (&[], 1, [3, 4, 8, 0]),
    (&[], 1, [0, 0, 8, 0]),
    (&[0], 0, [3, 4, 8, 8]),
    (&[0], 2, [3, 4, 8, 8]),
    (&[2, 0], 0, [3, 4, 8, 8]),
    (&[0, 4], 2, [3, 4, 8, 8]),
    (&[2, 4], 2, [0, 4, 8, 8]),
    (&[2, 4], 2, [3, 0, 8, 8]),
];

const SMALL: Sizes = (&[2, 4], 2, [9, 13, 8, 24]);

pub fn sizes(device: &Device) {
    run("flash_attn sizes", device, grid(&SIZES));
}

pub fn empty(device: &Device) {
    let layouts = [Plain, Narrowed, Rows, Columns, Expanded].map(|l| Leaves::Each([l; 3]));
    let problems = layouts.map(|leaves| grid(&EMPTY).map(move |p| Problem { leaves, ..p }));
    run("flash_attn empty", device, problems.into_iter().flatten());
}

/// Views of all kinds, also of one tensor as q, k and v.
pub fn layouts(device: &Device) {
    let ranks: [Sizes; 3] = [(&[], 1, [9, 13, 8, 24]), (&[4], 2, [9, 13, 8, 24]), SMALL];
    let each = Layout::ALL.into_iter().flat_map(|l| {
        let mixed = [[l, Plain, Plain], [Plain, l, Transposed], [Narrowed, Expanded, l]];
        mixed.into_iter().chain([[l; 3]]).map(Leaves::Each)
    });
    let each = each.flat_map(|leaves| grid(&ranks).map(move |p| Problem { leaves, ..p }));
    let square = grid(&[(&[2, 3], 3, [17, 17, 16, 16])]);
    let one = [Leaves::Fused, Leaves::Shared].into_iter();
    let one = one.flat_map(|leaves| square.clone().map(move |p| Problem { leaves, ..p }));
    run("flash_attn layouts", device, each.chain(one));
}

/// Upstream gradients of several forms, and each input alone tracked.
pub fn upstream(device: &Device) {
    let losses = [Loss::Weighted, Loss::Sum, Loss::Transposed, Loss::Cast(F16), Loss::Cast(F32)];
    let tracked = [[true; 3], [true, false, false], [false, true, false], [false, false, true]];
    let problems = losses.into_iter().flat_map(|loss| {
        tracked.map(|tracked| grid(&[SMALL]).map(move |p| Problem { loss, tracked, ..p }))
    });
    run("flash_attn upstream", device, problems.flatten());
}

/// Uniform, inverted and one-hot weights; the largest scores overflow a naive `exp`.
pub fn scales(device: &Device) {
    let sizes = [SMALL, (&[2], 2, [40, 300, 8, 8])];
    let scales = [0.0, -1.0, 1e-30, 0.1, 40.0, 1e3].into_iter().map(Some);
    let problems = scales.flat_map(|scale| {
        grid(&sizes).map(move |p| Problem { options: Options { scale, ..p.options }, ..p })
    });
    run("flash_attn scales", device, problems);
}

/// Random shapes and layouts.
pub fn random(device: &Device) {
    let mut tally = Tally::new("flash_attn random", device);
    let layout = || prop::sample::select(Layout::ALL.as_slice());
    let strategy = (
        prop::sample::select(DTYPES.as_slice()),
        (0..3usize, 0..3usize, 1..3usize, 1..4usize),
        [0..70usize, 0..70, 1..40, 0..40],
        [layout(), layout(), layout()],
        any::<bool>(),
    );
    let config = Config { cases: 64, failure_persistence: None, ..Config::default() };
    let ran = TestRunner::new(config).run(&strategy, |(dtype, heads, sizes, leaves, causal)| {
        let ((leading, batch, hkv, group), [sq, sk, d, dv]) = (heads, sizes);
        let dims = |heads, rows, cols| [batch, heads, rows, cols][2 - leading..].to_vec();
        let dims = [dims(hkv * group, sq, d), dims(hkv, sk, d), dims(hkv, sk, dv)];
        let options = Options { causal, ..Options::default() };
        let leaves = Leaves::Each(leaves.map(|layout| summable(layout, dtype)));
        let problem = Problem { dims, leaves, options, ..Problem::new(dtype, SMALL) };
        problem.check(device).map_err(|e| TestCaseError::fail(format!("{problem:?}: {e}")))
    });
    tally.case("64 random problems", || ran.map_err(Error::msg));
    tally.finish();
}

/// What a broadcast view repeats, candle sums in the dtype itself: not to be held against the op.
fn summable(layout: Layout, dtype: DType) -> Layout {
    match layout {
        Repeated | Expanded if dtype != F32 => Rows,
        layout => layout,
    }
}

/// NaN and infinities in one row of q, k, v or the upstream gradient reach what sees that row, as in
/// the plain formula, and nothing else.
pub fn specials(device: &Device) {
    let mut tally = Tally::new("flash_attn specials", device);
    for problem in grid(&[(&[2], 1, [6, 20, 8, 8]), (&[], 1, [70, 300, 8, 8])]) {
        // There, hidden values are multiplied by their zero weight, as the plain formula does (README), and
        // hidden keys by their zero gradient.
        let reaches = device.is_cuda() && problem.options.causal;
        let problem = if reaches || results_alone() { problem.untracked() } else { problem };
        let mut source = Source::new(&format!("{problem:?}"), device);
        let clean = problem.inputs(&mut source).expect("inputs");
        let allowed = problem.reference(&clean).and_then(|want| problem.allowed(&clean, &want));
        let allowed = allowed.expect("plain formula");
        let mut case = |which: usize, rows: Range<usize>, special: f64| {
            let name = ["q", "k", "v", "upstream"][which];
            tally.case(format!("{special} in rows {rows:?} of {name}, {problem:?}"), || {
                let mut inputs = clean.clone();
                inputs[which] = replace(&clean[which], rows, special)?;
                problem.compare(&inputs, &problem.reference(&inputs)?, &allowed)
            });
        };
        let ([sq, _], [sk, _]) = (matrix(&problem.dims[0]), matrix(&problem.dims[1]));
        let leaves = if reaches { 2 } else { 3 };
        for (which, rows) in [sq, sk, sk].into_iter().enumerate().take(leaves) {
            for row in [0, rows / 2, rows - 1] {
                case(which, row..row + 1, f64::NAN);
                case(which, row..row + 1, f64::INFINITY);
                case(which, row..row + 1, f64::NEG_INFINITY);
            }
        }
        // Of an infinite gradient, the order of the sums would say whether it ends as NaN.
        if problem.tracked != [false; 3] {
            case(3, 0..1, f64::NAN);
            case(3, sq - 1..sq, f64::NAN);
        }
        // Whole blocks of keys without a score that is a number, before and behind such that have one.
        for block in [4, 16, 32, 64, 128, 256].into_iter().filter(|&len| len < sk) {
            case(1, 0..block, f64::NAN);
            case(1, sk - block..sk, f64::NAN);
            // Causal rows that see only −∞ are not the plain formula's NaN on the GPU.
            if !reaches {
                case(1, 0..block, f64::NEG_INFINITY);
            }
            case(1, sk - block..sk, f64::NEG_INFINITY);
        }
    }
    tally.finish();
}

/// Rows whose visible scores are all −∞ are NaN, as in the plain formula. Not so on the GPU.
pub fn all_minus_infinity(device: &Device) {
    let mut tally = Tally::new("flash_attn all -inf", device);
    for problem in grid(&[(&[2], 1, [6, 20, 8, 8]), (&[], 1, [70, 300, 8, 8])]) {
        tally.case(format!("{problem:?}"), || {
            let mut source = Source::new(&format!("{problem:?}"), device);
            let clean = problem.inputs(&mut source)?;
            let allowed = problem.allowed(&clean, &problem.reference(&clean)?)?;
            let mut inputs = clean.clone();
            let ([sq, _], [sk, _]) = (matrix(&problem.dims[0]), matrix(&problem.dims[1]));
            inputs[0] = replace(&clean[0], 0..sq, 1.0)?;
            for keys in [0..sk, 0..sk - 2, 0..sk - sq] {
                inputs[1] = replace(&clean[1], keys, f64::NEG_INFINITY)?;
                problem.compare(&inputs, &problem.reference(&inputs)?, &allowed)?;
            }
            Ok(())
        });
    }
    tally.finish();
}

/// A copy whose first column holds `value` in `rows`, in every head.
fn replace(t: &Tensor, rows: Range<usize>, value: f64) -> Result<Tensor> {
    let mut nd = Nd::of(t)?;
    let [len, cols] = matrix(&nd.dims);
    for (i, row) in nd.data.chunks_mut(cols).enumerate() {
        if rows.contains(&(i % len)) {
            row[0] = value;
        }
    }
    nd.tensor(t.dtype())?.to_device(t.device())
}

/// Gradients, and the closed form that the other suites compare with, against central differences.
pub fn finite_differences(device: &Device) {
    let sizes: [Sizes; 4] = [
        (&[], 1, [1, 3, 2, 2]),
        (&[], 1, [4, 3, 3, 1]),
        (&[4], 2, [3, 5, 2, 3]),
        (&[2, 2], 1, [2, 2, 3, 2]),
    ];
    differences("flash_attn finite differences", device, grid(&sizes));
}

fn differences(suite: &'static str, device: &Device, problems: impl IntoIterator<Item = Problem>) {
    let mut tally = Tally::new(suite, device);
    for problem in problems {
        tally.case(format!("{problem:?}"), || {
            let mut source = Source::new(&format!("{problem:?}"), device);
            let inputs = problem.inputs(&mut source)?;
            let mut want = problem.reference(&inputs)?;
            let x = nds(&problem.views(&inputs[..inputs.len() - 1])?)?;
            let weights = Nd::of(&inputs[inputs.len() - 1])?.data;
            for leaf in 0..x.len() {
                for i in 0..x[leaf].data.len() {
                    let moved = |by: f64| {
                        let mut x = x.clone();
                        x[leaf].data[i] += by;
                        dot(&problem.loops(&x).forward().data, &weights)
                    };
                    let slope = (moved(1e-5) - moved(-1e-5)) / 2e-5;
                    let closed = std::mem::replace(&mut want[1 + leaf].value.data[i], slope);
                    if (slope - closed).abs() > 1e-9 {
                        bail!("the loops' gradient {leaf} at {i} is {closed}, wanted {slope}");
                    }
                }
            }
            problem.compare(&inputs, &want, &problem.allowed(&inputs, &want)?)
        });
    }
    tally.finish();
}

/// Batch dimensions of q, k, v and the result; `[Sq, Sk, D, Dv]`.
type Cross = ([&'static [usize]; 4], [usize; 4]);

const CROSS: [Cross; 16] = [
    ([&[], &[], &[], &[]], [1, 1, 1, 1]),
    ([&[], &[], &[], &[]], [16, 16, 16, 16]),
    ([&[], &[], &[], &[]], [17, 65, 64, 40]),
    ([&[], &[], &[], &[]], [64, 385, 64, 64]),
    ([&[], &[], &[], &[]], [5, 777, 128, 128]),
    ([&[], &[], &[], &[]], [129, 40, 80, 16]),
    ([&[3], &[3], &[3], &[3]], [15, 33, 8, 8]),
    ([&[3], &[], &[], &[3]], [15, 33, 8, 8]),
    ([&[], &[3], &[2, 1], &[2, 3]], [15, 33, 8, 24]),
    ([&[2, 1], &[3], &[3], &[2, 3]], [33, 15, 8, 8]),
    ([&[2, 1, 1], &[3, 1], &[4], &[2, 3, 4]], [7, 9, 5, 3]),
    ([&[2, 2, 2], &[1, 2, 1], &[2, 1, 2], &[2, 2, 2]], [7, 9, 5, 3]),
    ([&[0], &[1], &[0], &[0]], [7, 9, 5, 3]),
    ([&[2], &[2], &[2], &[2]], [0, 9, 5, 3]),
    ([&[2], &[2], &[2], &[2]], [7, 0, 5, 3]),
    ([&[2], &[2], &[2], &[2]], [7, 9, 5, 0]),
];

/// f16 to f32 over broadcast batches, in every layout.
pub fn attention_tc(device: &Device) {
    let mut tally = Tally::new("attention_tc", device);
    for ([q, k, v, batch], [sq, sk, d, dv]) in CROSS {
        let dims = [[q, &[sq, d]].concat(), [k, &[sk, d]].concat(), [v, &[sk, dv]].concat()];
        for (i, layout) in Layout::ALL.into_iter().enumerate() {
            let layouts = [layout, Layout::ALL[(i + 2) % 8], Layout::ALL[(i + 5) % 8]];
            for causal in [false, true] {
                let case = format!("{dims:?} {layouts:?} causal {causal}");
                tally.case(&case, || {
                    let mut source = Source::new(&case, device);
                    let mut input = |i: usize| source.tensor(F16, &dims[i], layouts[i]);
                    let inputs = [input(0)?, input(1)?, input(2)?];
                    let before = nds(&inputs)?;
                    let heads = batch.iter().product();
                    let options = Options { causal, ..Options::default() };
                    let rules = Rules::new(&options, [1, heads, sq, sk], d, None);
                    let out = inputs[0].kaio_attention_tc(&inputs[1], &inputs[2], causal)?;
                    if out.dtype() != F32 {
                        bail!("the result is {:?}", out.dtype());
                    }
                    let wide = |i: usize| {
                        let matrix = &dims[i][dims[i].len() - 2..];
                        let t = inputs[i].broadcast_as([batch, matrix].concat())?;
                        t.to_device(&plain_on(device))
                    };
                    let wide = [wide(0)?, wide(1)?, wide(2)?];
                    let exact = [Nd::of(&wide[0])?, Nd::of(&wide[1])?, Nd::of(&wide[2])?];
                    let want = Loops::new(exact, &rules).forward();
                    let allowed = match want.data.is_empty() || sk == 0 {
                        true => 0.0,
                        false => 2.0 * want.max_error(&plain(&wide, None, &rules)?)?,
                    };
                    close("out", &out, &want, |i| allowed + ulp(F32, want.data[i]))?;
                    (0..3).try_for_each(|i| identical("input", &inputs[i], &before[i]))
                });
            }
        }
    }
    tally.finish();
}

fn run(suite: &'static str, device: &Device, problems: impl IntoIterator<Item = Problem>) {
    let mut tally = Tally::new(suite, device);
    for problem in problems {
        tally.case(format!("{problem:?}"), || problem.check(device));
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
