//! Biases and their gradients.

use candle_core::DType::{BF16, F32};
use candle_core::{Device, Error, Result, Tensor, Var};
use kaio_candle::prelude::*;

use super::options::{Bias, Options};
use super::problem::Problem;
use super::{MIXED, SMALL, Sizes, each, run};
use crate::suites::Layout::{self, *};
use crate::suites::{Nd, Source, Tally, identical};

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
            ..Options::default()
        })
        .collect();
    let mut problems = each(&[SMALL, (&[4], 2, [5, 7, 8, 8])], &options);
    problems.extend(options.into_iter().map(|options| {
        let blocks: Sizes = (&[2, 2], 1, [70, 300, 8, 8]);
        Problem { options, ..Problem::new(F32, blocks) }
    }));
    // The bias alone, and beside one other.
    for tracked in [[false; 3], [true, false, false], [false, false, true]] {
        let options = Options { bias: Some(Bias::default()), ..Options::default() };
        problems.push(Problem { tracked, options, ..Problem::new(F32, SMALL) });
    }
    let plain = Options { bias: Some(Bias::default()), ..Options::default() };
    problems.extend(each(&MIXED, &[plain]));
    run("flash_attn biases", device, problems);
}

/// One graph with a tracked bias serves several backward passes, one after the other and in several threads.
pub fn shared_graph(device: &Device) {
    let name = "flash_attn shared graph";
    let mut tally = Tally::new(name, device);
    let sizes = [(F32, [2, 2, 33, 40, 8]), (BF16, [4, 2, 200, 300, 64])];
    for (dtype, [heads, kv_heads, sq, sk, d]) in sizes {
        tally.case(format!("{dtype:?}, four threads"), || {
            let mut source = Source::new(name, device);
            let mut var = |dims: &[usize]| Var::from_tensor(&source.tensor(dtype, dims, Plain)?);
            let q = var(&[heads, sq, d])?;
            let (k, v) = (var(&[kv_heads, sk, d])?, var(&[kv_heads, sk, d])?);
            let bias = var(&[sq, sk])?;
            let opts =
                FlashAttnOptions::default().bias(bias.as_tensor().clone()).deterministic(true);
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
    }
    tally.finish();
}
