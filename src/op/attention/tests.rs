//! The backward pass of the CPU: the same with any number of threads.

use candle_core::Device::Cpu;
use candle_core::{DType, Result, Tensor, Var};

use super::arguments;
use super::backward::{Upstream, gradients};
use super::call::Call;
use super::flash::FlashAttention;
use crate::op::eval;
use crate::{AttnLayout, FlashAttnOptions};

/// Calls with each option, over more than one block of keys.
fn calls() -> Result<Vec<(&'static str, [Tensor; 3], FlashAttnOptions)>> {
    let opts = FlashAttnOptions::default();
    let randn = |dims: &[usize]| Tensor::randn(0f32, 1., dims, &Cpu);
    let qkv = |b: usize, sq: usize, sk: usize| -> Result<[Tensor; 3]> {
        Ok([randn(&[b, 4, sq, 12])?, randn(&[b, 2, sk, 12])?, randn(&[b, 2, sk, 20])?])
    };
    let padded = || qkv(2, 70, 300);
    let packed = || -> Result<_> {
        let [q, k, v] = qkv(1, 70, 300)?;
        Ok([q.squeeze(0)?, k.squeeze(0)?, v.squeeze(0)?])
    };
    let rows_first = |t: [Tensor; 3]| -> Result<[Tensor; 3]> {
        let turn = |t: &Tensor| t.transpose(t.rank() - 3, t.rank() - 2);
        Ok([turn(&t[0])?, turn(&t[1])?, turn(&t[2])?])
    };
    let u32s = |values: &[u32]| Tensor::new(values, &Cpu);
    let bias = |dims: &[usize]| {
        Ok::<_, candle_core::Error>(Var::randn(0f32, 1., dims, &Cpu)?.into_inner())
    };
    let hiding = |dims: &[usize]| {
        let bias = Tensor::randn(0f32, 1., dims, &Cpu)?;
        let low = Tensor::full(f32::NEG_INFINITY, dims, &Cpu)?;
        bias.le(-0.8)?.where_cond(&low, &bias)
    };
    let slopes = |dims: &[usize]| Tensor::rand(0f32, 1., dims, &Cpu);
    let of_both = |opts: FlashAttnOptions, q: &[u32], k: &[u32]| {
        Ok::<_, candle_core::Error>(opts.cu_seqlens_q(u32s(q)?).cu_seqlens_k(u32s(k)?))
    };
    let alibi = opts.clone().alibi_slopes(slopes(&[2, 4])?);
    let mut f16 = padded()?;
    for t in &mut f16 {
        *t = t.to_dtype(DType::F16)?;
    }
    Ok(vec![
        ("plain", padded()?, opts.clone()),
        ("blind rows", qkv(2, 300, 70)?, opts.clone().causal(true)),
        ("window", padded()?, opts.clone().window_size_left(40).window_size_right(9)),
        ("softcap", padded()?, opts.clone().softcap(1.5).softmax_scale(0.7)),
        ("slopes", padded()?, alibi.clone()),
        ("bias", padded()?, opts.clone().bias(bias(&[2, 4, 70, 300])?)),
        ("row of bias", padded()?, opts.clone().softcap(2.).bias(bias(&[4, 1, 300])?)),
        ("one bias", padded()?, opts.clone().causal(true).bias(bias(&[300])?)),
        ("−∞", padded()?, opts.clone().bias(hiding(&[70, 300])?)),
        ("f16 to f32", f16, opts.clone().out_dtype(DType::F32)),
        ("rows first", rows_first(padded()?)?, opts.clone().layout(AttnLayout::Bshd)),
        (
            "padded",
            padded()?,
            alibi.clone().causal(true).seqlens_q(u32s(&[70, 9])?).seqlens_k(u32s(&[280, 0])?),
        ),
        ("padded keys", padded()?, alibi.window_size_left(50).seqlens_k(u32s(&[280, 31])?)),
        (
            "packed",
            packed()?,
            of_both(opts.clone().causal(true), &[0, 3, 3, 60], &[0, 9, 19, 270])?
                .alibi_slopes(slopes(&[3, 4])?),
        ),
        (
            "packed rows first",
            rows_first(packed()?)?,
            of_both(opts.layout(AttnLayout::Bshd), &[0, 30, 60, 70], &[0, 0, 40, 300])?
                .window_size_left(60)
                .alibi_slopes(slopes(&[4])?),
        ),
    ])
}

#[test]
fn loops_do_not_depend_on_threads() -> Result<()> {
    let pool = |n| rayon::ThreadPoolBuilder::new().num_threads(n).build().expect("threads");
    let (one, five) = (pool(1), pool(5));
    for (what, [q, k, v], opts) in calls()? {
        let extras = arguments::flash("test", [("q", &q), ("k", &k), ("v", &v)], &opts)?;
        let call = Call::new("test", q.dtype(), &opts, &extras);
        let flash = FlashAttention { call, wants_lse: true, tracked: true };
        let inputs = [[&q, &k, &v].as_slice(), &extras.list()].concat();
        let [out, lse, max, sum]: [_; 4] = eval(&flash, &inputs)?;
        let (grad, lse_grad) = (out.randn_like(0., 1.)?, lse.randn_like(0., 1.)?);
        for lse_grad in [None, Some(&lse_grad)] {
            let upstream = Upstream { out: &out, grad: &grad, lse_grad, stats: [&max, &sum] };
            let run = || {
                let [out, lse, ..]: [_; 4] = eval(&flash, &inputs)?;
                let shapes = [q.shape(), k.shape(), v.shape()];
                let bias = extras.bias.as_ref().filter(|bias| bias.track_op());
                let grads = gradients(&flash, &inputs, upstream, shapes, bias)?;
                let rows = [out, lse.exp()?, grads.q, grads.k, grads.v];
                Ok::<_, candle_core::Error>(rows.into_iter().chain(grads.bias).collect::<Vec<_>>())
            };
            for (i, (a, b)) in one.install(run)?.iter().zip(five.install(run)?).enumerate() {
                let bits = |t: &Tensor| t.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>();
                assert_eq!(bits(a)?, bits(&b)?, "{what}: {i}");
            }
        }
    }
    Ok(())
}
