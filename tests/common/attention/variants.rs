//! Tables of what `FlashAttnOptions` add.

use std::ops::Range;

use candle_core::DType::{BF16, F16, F32};
use candle_core::{Device, Error, Result, Tensor, Var, bail};
use kaio_candle::prelude::*;
use proptest::prelude::*;

use super::options::Lengths::{self, Packed, Padded, Whole};
use super::options::{Bias, Options, Slopes};
use super::problem::{Leaves, Loss, Problem};
use super::{DTYPES, Sizes, differences, grid, run, summable};
use crate::common::Layout::{self, *};
use crate::common::{Nd, Source, Tally, identical, property, results_alone};

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

const SMALL: Sizes = (&[2, 4], 2, [9, 13, 8, 24]);

/// Each of `options` over all sizes and dtypes.
fn each(sizes: &[Sizes], options: &[Options]) -> Vec<Problem> {
    let problems = sizes.iter().flat_map(|&sizes| {
        let dtypes = DTYPES.into_iter().map(move |dtype| Problem::new(dtype, sizes));
        dtypes
            .flat_map(|p| options.iter().map(move |o| Problem { options: o.clone(), ..p.clone() }))
    });
    problems.collect()
}

fn defaults() -> Options {
    Options::default()
}

/// Each option by itself, and many together.
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
        ..defaults()
    };
    let options = [
        Options { bshd: true, ..defaults() },
        Options { wide: true, ..defaults() },
        Options { softcap: Some(0.3), ..defaults() },
        Options { softcap: Some(30.0), scale: Some(20.0), causal: true, ..defaults() },
        Options { slopes: Some(Slopes::ByHead), ..defaults() },
        Options { slopes: Some(Slopes::ByBatch), causal: true, ..defaults() },
        Options { bias: Some(Bias::default()), ..defaults() },
        Options { left: Some(40), right: Some(3), ..defaults() },
        all,
    ];
    run("flash_attn options", device, each(&MIXED, &options));
}

/// Windows narrower than a tile, as wide as all keys, and before the first key.
pub fn windows(device: &Device) {
    let sizes: [[usize; 2]; 8] =
        [[64, 64], [65, 63], [63, 65], [1, 129], [129, 1], [200, 50], [50, 300], [128, 176]];
    let bounds = [None, Some(0), Some(1), Some(7), Some(63), Some(100), Some(usize::MAX)];
    let problems = sizes.into_iter().flat_map(|[sq, sk]| {
        // 16 bits on a GPU: `options` has windows of f32, too.
        let dtype = if device.is_cpu() { F32 } else { BF16 };
        let p = Problem::new(dtype, (&[2], 1, [sq, sk, 8, 8]));
        crate::common::pairs(bounds, bounds).map(move |(left, right)| {
            let options = Options { left, right, causal: right == Some(0), ..defaults() };
            Problem { options, ..p.clone() }
        })
    });
    run("flash_attn windows", device, problems);
}

/// Every form of a bias, its gradient alone and among others.
pub fn biases(device: &Device) {
    let owns = [false, true].into_iter().flat_map(|b| {
        [false, true].into_iter().flat_map(move |h| [false, true].map(|sq| [b, h, sq]))
    });
    let forms = owns.flat_map(|own| {
        [1, 2, 4].into_iter().map(move |rank| Bias { own, rank, ..Bias::default() })
    });
    let views = Layout::ALL.map(|layout| Bias { layout, ..Bias::default() });
    let shared =
        Layout::ALL.map(|layout| Bias { layout, own: [false, true, false], ..Bias::default() });
    let others = [
        Bias { hides: true, ..Bias::default() },
        Bias { hides: true, own: [true, false, true], narrow: true, ..Bias::default() },
        Bias { narrow: true, ..Bias::default() },
        Bias { tracked: false, ..Bias::default() },
    ];
    let all = forms.chain(views).chain(shared).chain(others);
    let options: Vec<_> = all
        .enumerate()
        .map(|(i, bias)| Options {
            bias: Some(bias),
            causal: i.is_multiple_of(2),
            softcap: i.is_multiple_of(3).then_some(2.0),
            bshd: i.is_multiple_of(5),
            ..defaults()
        })
        .collect();
    let mut problems = each(&[SMALL, (&[4], 2, [5, 7, 8, 8])], &options);
    problems.extend(options.into_iter().map(|options| {
        let blocks: Sizes = (&[2, 2], 1, [70, 300, 8, 8]);
        Problem { options, ..Problem::new(F32, blocks) }
    }));
    // The bias alone, and beside one other.
    for tracked in [[false; 3], [true, false, false], [false, false, true]] {
        let options = Options { bias: Some(Bias::default()), ..defaults() };
        problems.push(Problem { tracked, options, ..Problem::new(F32, SMALL) });
    }
    run("flash_attn biases", device, problems);
}

/// Padded and packed batches, with sequences of length zero and rows of no sequence.
pub fn lengths(device: &Device) {
    let variants = |lengths: super::options::Lengths, biased: bool| {
        let bias = biased.then(|| Bias { own: [true, false, true], ..Bias::default() });
        [
            Options { lengths: lengths.clone(), ..defaults() },
            Options { lengths: lengths.clone(), causal: true, bshd: true, ..defaults() },
            Options {
                lengths: lengths.clone(),
                left: Some(9),
                right: Some(2),
                wide: true,
                ..defaults()
            },
            Options {
                lengths,
                causal: true,
                left: Some(70),
                softcap: Some(2.0),
                slopes: Some(Slopes::ByBatch),
                bias,
                ..defaults()
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

/// Scores of some ±10⁴.
pub fn large_logits(device: &Device) {
    let scales = [1e4, -1e4].into_iter().flat_map(|scale| {
        let options = Options { scale: Some(scale), ..defaults() };
        [
            Options { causal: true, ..options.clone() },
            Options { left: Some(20), bias: Some(Bias::default()), ..options.clone() },
            Options { softcap: Some(1e4), slopes: Some(Slopes::ByHead), ..options },
        ]
    });
    let sizes = [SMALL, (&[2], 2, [40, 300, 8, 8])];
    run("flash_attn large logits", device, each(&sizes, &scales.collect::<Vec<_>>()));
}

/// Upstream gradients and views of all kinds through the other layout and a bias.
pub fn option_layouts(device: &Device) {
    let options = |i: usize| Options {
        bshd: i.is_multiple_of(2),
        causal: i.is_multiple_of(3),
        wide: i.is_multiple_of(5),
        bias: i.is_multiple_of(4).then(Bias::default),
        ..defaults()
    };
    let ranks: [Sizes; 3] = [(&[], 1, [9, 13, 8, 24]), (&[4], 2, [9, 13, 8, 24]), SMALL];
    let mut problems = vec![];
    for p in grid(&ranks) {
        for (i, layout) in Layout::ALL.into_iter().enumerate() {
            let leaves = Leaves::Each([layout, Layout::ALL[(i + 2) % 8], Layout::ALL[(i + 5) % 8]]);
            let loss = [Loss::Weighted, Loss::Sum, Loss::Transposed, Loss::Cast(F16)][i % 4];
            problems.push(Problem { leaves, loss, options: options(i), ..p.clone() });
        }
    }
    for p in grid(&[(&[2, 3], 3, [17, 17, 16, 16])]) {
        for leaves in [Leaves::Fused, Leaves::Shared] {
            problems.push(Problem { leaves, options: options(0), ..p.clone() });
        }
    }
    run("flash_attn option layouts", device, problems);
}

/// For 70 queries and 66 keys.
fn isolating() -> [Options; 5] {
    let padded = Padded([Some(vec![40, 20]), Some(vec![30, 66])]);
    let packed = Packed([vec![0, 30, 70], vec![0, 33, 66]]);
    [
        Options { left: Some(5), right: Some(9), ..defaults() },
        Options { softcap: Some(3.0), slopes: Some(Slopes::ByHead), ..defaults() },
        Options { bshd: true, causal: true, ..defaults() },
        Options { lengths: padded, causal: true, ..defaults() },
        Options { lengths: packed, left: Some(20), ..defaults() },
    ]
}

/// What is NaN or infinite in one batch, sequence or key head, or behind the lengths, stays there.
pub fn isolation(device: &Device) {
    let name = "flash_attn isolation";
    if device.is_cuda() {
        return isolated_bits(name, device);
    }
    let mut tally = Tally::new(name, device);
    for options in isolating() {
        let heads: &[usize] = if matches!(options.lengths, Packed(_)) { &[2] } else { &[2, 2] };
        let problem = Problem { options, ..Problem::new(F32, (heads, 1, [70, 66, 8, 8])) };
        let clean =
            problem.inputs(&mut Source::new(&format!("{problem:?}"), device)).expect("inputs");
        let want = problem.reference(&clean);
        let allowed = want.and_then(|want| problem.allowed(&clean, &want)).expect("plain formula");
        for which in 0..3 {
            for (rows, special) in crate::common::pairs(
                [0..4, 35..45, 60..66].map(|r| (r.start, r.end)),
                [f64::NAN, f64::INFINITY],
            ) {
                // In the first matrix alone.
                tally.case(format!("{special} in {which} {rows:?}, {problem:?}"), || {
                    let mut inputs = clean.clone();
                    let mut nd = Nd::of(&clean[which])?;
                    (rows.0..rows.1).for_each(|row| nd.data[row * 8 + 3] = special);
                    inputs[which] = nd.tensor(F32)?.to_device(device)?;
                    problem.compare(&inputs, &problem.reference(&inputs)?, &allowed)
                });
            }
        }
    }
    tally.finish();
}

/// Rows of q, k and v in the first matrix that are spoilt, and what of the result they must not change: a
/// dimension, where it begins and how long it is. And whether gradients keep to that, too.
type Apart = ([Range<usize>; 3], [usize; 3], bool);

/// Another batch, another sequence, what is before the sequence's end.
fn apart(lengths: &Lengths) -> Vec<Apart> {
    let same = |rows: Range<usize>| [rows.clone(), rows.clone(), rows];
    match lengths {
        Packed(_) => {
            vec![(same(0..30), [1, 30, 40], false), ([30..70, 33..66, 33..66], [1, 0, 30], false)]
        }
        Padded(_) => {
            vec![(same(0..30), [0, 1, 1], true), ([40..70, 30..66, 30..66], [0, 0, 2], false)]
        }
        Whole => vec![(same(0..30), [0, 1, 1], true)],
    }
}

/// On a GPU: what is NaN or infinite in one batch or sequence, or behind its end, leaves the bits of the
/// others as they were. In its own it may reach rows that do not see it, as in the plain formula.
fn isolated_bits(name: &'static str, device: &Device) {
    let mut tally = Tally::new(name, device);
    let cases = isolating().into_iter().flat_map(|options| {
        apart(&options.lengths).into_iter().map(move |apart| (options.clone(), apart))
    });
    for (options, (spoilt, [dim, start, len], tracked)) in cases {
        let heads: &[usize] = if matches!(options.lengths, Packed(_)) { &[2] } else { &[2, 2] };
        let tracked = [tracked && !results_alone(); 3];
        let problem = Problem { options, tracked, ..Problem::new(F16, (heads, 1, [70, 66, 8, 8])) };
        let results = |inputs: &[Tensor]| {
            let mut lse = None;
            let mut all = problem.run(inputs, |views| {
                let (out, with) = problem.call(views)?;
                lse = with;
                Ok(out)
            })?;
            all.push(lse);
            let others = all.into_iter().flatten().map(|t| t.narrow(dim, start, len));
            others.collect::<Result<Vec<_>>>()
        };
        let mut source = Source::new(&format!("{problem:?}"), device);
        let clean = problem.inputs(&mut source).expect("inputs");
        let want = results(&clean).expect("results");
        for (which, special) in crate::common::pairs([0, 1, 2], [f64::NAN, f64::INFINITY]) {
            let rows = spoilt[which].clone();
            tally.case(format!("{special} in {which} {rows:?}, {problem:?}"), || {
                let mut inputs = clean.clone();
                let mut nd = Nd::of(&clean[which])?;
                rows.for_each(|row| nd.data[row * 8 + 3] = special);
                inputs[which] = nd.tensor(F16)?.to_device(device)?;
                for (got, want) in results(&inputs)?.iter().zip(&want) {
                    identical("what it is apart from", got, &Nd::of(want)?)?;
                }
                Ok(())
            });
        }
    }
    tally.finish();
}

/// Gradients of tiny problems, of which that of the bias too, against central differences.
pub fn option_differences(device: &Device) {
    let name = "flash_attn option differences";
    let bias = |own| Some(Bias { own, ..Bias::default() });
    let padded = Padded([Some(vec![2, 1]), Some(vec![3, 2])]);
    let options = [
        Options { softcap: Some(0.6), ..defaults() },
        Options { slopes: Some(Slopes::ByBatch), left: Some(1), ..defaults() },
        Options { bias: bias([true; 3]), softcap: Some(0.6), ..defaults() },
        Options { bias: bias([false, true, false]), causal: true, bshd: true, ..defaults() },
        Options { bias: bias([false; 3]), lengths: padded, ..defaults() },
    ];
    let mut problems = each(&[(&[2, 2], 1, [2, 3, 3, 2])], &options);
    let packed =
        Options { lengths: Packed([vec![0, 2, 4], vec![0, 1, 5]]), causal: true, ..defaults() };
    problems.extend(each(&[(&[2], 1, [5, 5, 2, 3])], &[packed]));
    differences(name, device, problems);
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

/// The log-sum-exp puts results over parts of the keys together, and is a constant.
pub fn log_sum_exp(device: &Device) {
    let name = "flash_attn log-sum-exp";
    let mut tally = Tally::new(name, device);
    for (dtype, causal) in crate::common::pairs([F32, F16, BF16], [false, true]) {
        tally.case(format!("{dtype:?} causal {causal}"), || {
            let mut source = Source::new(name, device);
            let q = source.tensor(dtype, &[2, 4, 70, 16], Plain)?;
            let [k, v] = [0; 2].map(|_| source.tensor(dtype, &[2, 2, 90, 16], Plain));
            let (k, v) = (k?, v?);
            let opts = FlashAttnOptions::default().out_dtype(F32);
            let part = |from: usize, len: usize, causal: bool| {
                let (k, v) = (k.narrow(2, from, len)?, v.narrow(2, from, len)?);
                q.kaio_flash_attn_with_lse(&k, &v, &opts.clone().causal(causal))
            };
            // All queries see the first 20 keys; the others are a square and a row.
            let parts = [part(0, 20, false)?, part(20, 70, causal)?];
            let (out, lse) = part(0, 90, causal)?;
            let mut sum = out.zeros_like()?;
            for (part, part_lse) in parts {
                let weight = (part_lse - &lse)?.exp()?.unsqueeze(3)?;
                sum = (sum + part.broadcast_mul(&weight)?)?;
            }
            // Tensor cores round exponentials to the operands' dtype.
            let bound = match dtype {
                _ if device.is_cpu() => 1e-5,
                F16 => 5e-4,
                BF16 => 4e-3,
                _ => 1e-5,
            };
            crate::common::close("sum of parts", &sum, &Nd::of(&out)?, |_| bound)
        });
    }
    tally.case("constant", || {
        let q = Var::zeros((4, 8), F32, device)?;
        let (_, lse) = q.kaio_flash_attn_with_lse(&q, &q, &FlashAttnOptions::default())?;
        match lse.track_op() || lse.sum_all()?.backward()?.get(&q).is_some() {
            true => bail!("it tracks a gradient"),
            false => Ok(()),
        }
    });
    tally.finish();
}

/// One graph with a tracked bias serves several backward passes, in several threads.
pub fn shared_graph(device: &Device) {
    let name = "flash_attn shared graph";
    let mut tally = Tally::new(name, device);
    tally.case("four threads", || {
        let mut source = Source::new(name, device);
        let mut var = |dims: &[usize]| Var::from_tensor(&source.tensor(F32, dims, Plain)?);
        let (q, k, v) = (var(&[2, 33, 8])?, var(&[2, 40, 8])?, var(&[2, 40, 8])?);
        let bias = var(&[33, 40])?;
        let opts = FlashAttnOptions::default().bias(bias.as_tensor().clone());
        let out = q.kaio_flash_attn_with(&k, &v, &opts)?;
        let gradients = |factor: f64| -> Result<Vec<Tensor>> {
            let grads = (&out * factor)?.sqr()?.sum_all()?.backward()?;
            let of = |var: &Var| grads.get(var).cloned().ok_or(Error::msg("no gradient"));
            [&q, &k, &v, &bias].into_iter().map(of).collect()
        };
        let alone = (1..5).map(|i| gradients(f64::from(i))).collect::<Result<Vec<_>>>()?;
        std::thread::scope(|scope| {
            let check = |i: usize| {
                for _ in 0..20 {
                    for (got, want) in gradients(i as f64 + 1.0)?.iter().zip(&alone[i]) {
                        identical("gradient", got, &Nd::of(want)?)?;
                    }
                }
                Ok(())
            };
            let threads: Vec<_> = (0..4).map(|i| scope.spawn(move || check(i))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
        })
    });
    tally.finish();
}
