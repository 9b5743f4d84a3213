//! `kaio_attention_tc`.

use candle_core::DType::{F16, F32};
use candle_core::{Device, bail};
use kaio_candle::prelude::*;

use super::loops::{Loops, nds};
use super::options::{Options, Rules};
use super::plain::plain;
use crate::suites::Layout;
use crate::suites::{Nd, Source, Tally, close, identical, plain_on, ulp};

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
