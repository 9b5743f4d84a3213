//! Random shapes, layouts and options.

use candle_core::DType::{self, F32};
use candle_core::{Device, Error};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use super::options::Lengths::{Packed, Padded, Whole};
use super::options::{Bias, Options, Slopes};
use super::problem::{Leaves, Loss, Problem};
use super::{DTYPES, SMALL};
use crate::suites::Layout::{self, *};
use crate::suites::{Tally, property, random_cases};

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

/// Random shapes, layouts, options and losses, with all gradients.
pub fn random_options(device: &Device) {
    let mut tally = Tally::new("flash_attn random options", device);
    let cases = random_cases(device, 128, 3000);
    property(&mut tally, cases, problems(device), |problem| {
        problem.check(device).map_err(|e| Error::msg(format!("{problem:?}: {e}")))
    });
    tally.finish();
}

/// Widths of heads: a column more or less, and on a GPU all for which there is another kernel.
fn widths(device: &Device, least: usize) -> BoxedStrategy<usize> {
    let few = least..40usize;
    match device.is_cpu() {
        true => few.boxed(),
        false => {
            prop_oneof![2 => few, 1 => (1..33usize).prop_map(|units| 8 * units), 1 => 40..257usize]
                .boxed()
        }
    }
}

/// Also what is empty, or sees nothing.
pub fn problems(device: &Device) -> impl Strategy<Value = Problem> + use<> {
    use prop::option::of as maybe;
    let layout = || prop::sample::select(Layout::ALL.as_slice());
    let bias = (any::<[bool; 3]>(), 1..5usize, any::<[bool; 3]>(), layout());
    let bias = bias.prop_map(|(own, rank, [narrow, hides, tracked], layout)| {
        let layout = if rank == 1 { Plain } else { layout };
        Bias { own, rank, narrow, layout, hides, tracked }
    });
    let bound = || maybe(prop_oneof![0..8usize, 0..100usize]);
    let slopes = prop::sample::select(vec![Slopes::ByHead, Slopes::ByBatch]);
    let softcap = prop::sample::select(vec![0.3f32, 2.0, 30.0]);
    let losses = vec![Loss::Weighted, Loss::Sum, Loss::Transposed, Loss::Cast(F32)];
    let most: usize = if device.is_cpu() { 150 } else { 260 };
    let shapes = (
        prop::sample::select(DTYPES.as_slice()),
        (0..3usize, 0..3usize, 1..3usize, 1..4usize),
        ([0..most, 0..most], (widths(device, 1), widths(device, 0))),
        [layout(), layout(), layout()],
        any::<[bool; 3]>(),
        prop::sample::select(losses),
    );
    let options = (
        any::<[bool; 4]>(),
        (bound(), bound()),
        (maybe(softcap), maybe(slopes), maybe(bias)),
        (0..3usize, prop::collection::vec([0..most as u32 + 1, 0..most as u32 + 1], 4)),
    );
    (shapes, options).prop_map(|(shapes, options)| {
        let (dtype, (leading, batch, hkv, group), ([sq, sk], (d, dv)), leaves, tracked, loss) =
            shapes;
        let ([causal, bshd, wide, deterministic], (left, right), scores, (form, values)) = options;
        let (softcap, slopes, bias) = scores;
        let dims = |heads, rows, cols| [batch, heads, rows, cols][2 - leading..].to_vec();
        let dims = [dims(hkv * group, sq, d), dims(hkv, sk, d), dims(hkv, sk, dv)];
        // candle's CUDA kernels do not cast what has no elements.
        let empty = dims.iter().flatten().any(|&len| len == 0);
        let loss = if empty && matches!(loss, Loss::Cast(_)) { Loss::Weighted } else { loss };
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
            deterministic,
        };
        Problem { dims, leaves, options, tracked, loss, ..Problem::new(dtype, SMALL) }
    })
}

/// What a broadcast view repeats, candle sums in the dtype itself: not to be held against the op.
fn summable(layout: Layout, dtype: DType) -> Layout {
    match layout {
        Repeated | Expanded if dtype != F32 => Rows,
        layout => layout,
    }
}
