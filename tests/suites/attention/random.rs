//! Random shapes, layouts and options.

use candle_core::DType::{self, F32};
use candle_core::{Device, Error};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::options::Lengths::{Packed, Padded, Whole};
use super::options::{Bias, Options, Slopes};
use super::problem::{Leaves, Problem};
use super::{DTYPES, SMALL};
use crate::suites::Layout::{self, *};
use crate::suites::{Tally, property};

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

/// Random shapes, layouts and options.
pub fn random_options(device: &Device) {
    let name = "flash_attn random options";
    let mut tally = Tally::new(name, device);
    let layout = || prop::sample::select(Layout::ALL.as_slice());
    let bias = (any::<[bool; 3]>(), 1..5usize, any::<[bool; 3]>(), layout());
    let bias = bias.prop_map(|(own, rank, [narrow, hides, tracked], layout)| {
        let layout = if rank == 1 { Plain } else { layout };
        Bias { own, rank, narrow, layout, hides, tracked }
    });
    use prop::option::of as maybe;
    let bound = || maybe(prop_oneof![0..8usize, 0..100usize]);
    let slopes = prop::sample::select(vec![Slopes::ByHead, Slopes::ByBatch]);
    let softcap = prop::sample::select(vec![0.3f32, 2.0, 30.0]);
    let shapes = (
        prop::sample::select(DTYPES.as_slice()),
        (0..3usize, 0..3usize, 1..3usize, 1..4usize),
        [0..150usize, 0..150, 1..40, 0..40],
        [layout(), layout(), layout()],
        any::<[bool; 3]>(),
    );
    let options = (
        any::<[bool; 3]>(),
        (bound(), bound()),
        (maybe(softcap), maybe(slopes), maybe(bias)),
        (0..3usize, prop::collection::vec([0..151u32, 0..151u32], 4)),
    );
    property(&mut tally, (shapes, options), |(shapes, options)| {
        let (dtype, (leading, batch, hkv, group), [sq, sk, d, dv], leaves, tracked) = shapes;
        let ([causal, bshd, wide], (left, right), (softcap, slopes, bias), (form, values)) =
            options;
        let dims = |heads, rows, cols| [batch, heads, rows, cols][2 - leading..].to_vec();
        let dims = [dims(hkv * group, sq, d), dims(hkv, sk, d), dims(hkv, sk, dv)];
        let most = |i: usize| [sq, sk][i] as u32;
        let of = |i: usize| values.iter().map(move |pair| pair[i].min(most(i)));
        let lengths = match (form, leading) {
            (1, 2) => {
                let padded = |i: usize| Some(of(i).take(batch).collect());
                Padded([padded(0).filter(|_| causal || bshd), padded(1)])
            }
            (2, 1) => {
                let packed = |i: usize| {
                    let mut ends: Vec<_> = [0].into_iter().chain(of(i)).collect();
                    ends.sort_unstable();
                    ends
                };
                Packed([packed(0), packed(1)])
            }
            _ => Whole,
        };
        let summable = |layout| summable(layout, dtype);
        let leaves = Leaves::Each(leaves.map(summable));
        let bias = bias.filter(|_| !matches!(lengths, Packed(_)));
        let bias = bias.map(|bias| Bias { layout: summable(bias.layout), ..bias });
        let right = if causal { None } else { right };
        let options = Options {
            causal,
            scale: None,
            bshd,
            left,
            right,
            softcap,
            slopes,
            bias,
            lengths,
            wide,
        };
        let problem = Problem { dims, leaves, options, tracked, ..Problem::new(dtype, SMALL) };
        problem.check(device).map_err(|e| Error::msg(format!("{problem:?}: {e}")))
    });
    tally.finish();
}

/// What a broadcast view repeats, candle sums in the dtype itself: not to be held against the op.
fn summable(layout: Layout, dtype: DType) -> Layout {
    match layout {
        Repeated | Expanded if dtype != F32 => Rows,
        layout => layout,
    }
}
