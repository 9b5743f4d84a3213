//! NaN and infinities in one row, and rows whose scores are all −∞.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};

use super::grid;
use super::loops::matrix;
use crate::suites::{Nd, Source, Tally, results_alone};

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
        // Whole blocks of keys without a score that is a number, before and after such that have one.
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
    if device.is_cuda() {
        return tally.inapplicable("kernels take such a row for one that sees no key");
    }
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
