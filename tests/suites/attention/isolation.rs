//! What one batch, sequence or head cannot do to another.

use std::ops::Range;

use candle_core::DType::{F16, F32};
use candle_core::{Device, Result, Tensor};

use super::options::Lengths::{self, Packed, Padded, Whole};
use super::options::{Options, Slopes};
use super::problem::Problem;
use crate::suites::{Nd, Source, Tally, identical, pairs, results_alone};

/// For 70 queries and 66 keys.
fn isolating() -> [Options; 5] {
    let padded = Padded([Some(vec![40, 20]), Some(vec![30, 66])]);
    let packed = Packed([vec![0, 30, 70], vec![0, 33, 66]]);
    [
        Options { left: Some(5), right: Some(9), ..Options::default() },
        Options { softcap: Some(3.0), slopes: Some(Slopes::ByHead), ..Options::default() },
        Options { bshd: true, causal: true, ..Options::default() },
        Options { lengths: padded, causal: true, ..Options::default() },
        Options { lengths: packed, left: Some(20), ..Options::default() },
    ]
}

/// What is NaN or infinite in one batch, sequence or key head, or past the lengths, stays there.
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
            for (rows, special) in
                pairs([0..4, 35..45, 60..66].map(|r| (r.start, r.end)), [f64::NAN, f64::INFINITY])
            {
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

/// Rows of q, k and v in the first matrix that are spoilt, and what of the result and of the gradients they
/// must not change: a dimension, where it begins and how long it is, in what has a row for each query and
/// in what has one for each key.
type Apart = ([Range<usize>; 3], [[usize; 3]; 2]);

/// Another batch, another sequence, what is before the sequence's end.
fn apart(lengths: &Lengths) -> Vec<Apart> {
    let same = |rows: Range<usize>| [rows.clone(), rows.clone(), rows];
    match lengths {
        Packed(_) => {
            // The first sequence, then the second.
            let first = [0..30, 0..33, 0..33];
            vec![
                (first, [[1, 30, 40], [1, 33, 33]]),
                ([30..70, 33..66, 33..66], [[1, 0, 30], [1, 0, 33]]),
            ]
        }
        Padded(_) => {
            // Another batch, then what no sequence has.
            vec![(same(0..30), [[0, 1, 1]; 2]), ([40..70, 30..66, 30..66], [[0, 0, 2]; 2])]
        }
        Whole => vec![(same(0..30), [[0, 1, 1]; 2])],
    }
}

/// On a GPU: what is NaN or infinite in one batch or sequence, or past its end, leaves the bits of the
/// others as they were. In its own it may reach rows that do not see it, as in the plain formula.
fn isolated_bits(name: &'static str, device: &Device) {
    let mut tally = Tally::new(name, device);
    let cases = isolating().into_iter().flat_map(|options| {
        apart(&options.lengths).into_iter().map(move |apart| (options.clone(), apart))
    });
    for (options, (spoilt, kept)) in cases {
        let heads: &[usize] = if matches!(options.lengths, Packed(_)) { &[2] } else { &[2, 2] };
        let tracked = [!results_alone(); 3];
        let problem = Problem { options, tracked, ..Problem::new(F16, (heads, 1, [70, 66, 8, 8])) };
        let results = |inputs: &[Tensor]| {
            let mut lse = None;
            let mut all = problem.run(inputs, |views| {
                let (out, with) = problem.call(views)?;
                lse = with;
                Ok(out)
            })?;
            all.push(lse);
            // The result, the gradients of q, k and v, and the log-sum-exp.
            let others = all.into_iter().zip([0, 0, 1, 1, 0]).map(|(t, side)| {
                let [dim, start, len] = kept[side];
                t.map(|t| t.narrow(dim, start, len)).transpose()
            });
            others.filter_map(Result::transpose).collect::<Result<Vec<_>>>()
        };
        let mut source = Source::new(&format!("{problem:?}"), device);
        let clean = problem.inputs(&mut source).expect("inputs");
        let want = results(&clean).expect("results");
        for (which, special) in pairs([0, 1, 2], [f64::NAN, f64::INFINITY]) {
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
