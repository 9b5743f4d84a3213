//! The recipes of docs/recipes.md: each model's attention by the options named there, beside its plain formula; and which functions of
//! candle-nn leave what is upstream of them without a gradient.

use candle_core::quantized::{GgmlDType, QMatMul, QTensor};
use candle_core::{D, DType, Device, Module, Result, Tensor, Var};
use candle_nn::attention::{
    AttnMask, flash_attn, flash_attn_varlen_cpu, flash_attn_varlen_unfused,
};
use candle_nn::{LayerNorm, RmsNorm, ops, rotary_emb};
use kaio_candle::prelude::*;

const CPU: &Device = &Device::Cpu;

fn random(dims: &[usize]) -> Tensor {
    Tensor::randn(0f32, 1., dims, CPU).unwrap()
}

#[track_caller]
fn assert_close(a: &Tensor, b: &Tensor) {
    assert_eq!(a.dims(), b.dims());
    let difference = (a - b).unwrap().abs().unwrap().max_all().unwrap();
    let difference = difference.to_scalar::<f32>().unwrap();
    assert!(difference < 1e-5, "they differ by {difference}");
}

/// q·kᵀ·scale, with the heads of keys repeated.
fn scores(q: &Tensor, k: &Tensor, scale: f64) -> Result<Tensor> {
    q.matmul(&repeated(k, q.dim(1)?)?.t()?)? * scale
}

fn repeated(x: &Tensor, heads: usize) -> Result<Tensor> {
    let (b, h, s, d) = x.dims4()?;
    x.unsqueeze(2)?.broadcast_as((b, h, heads / h, s, d))?.reshape((b, heads, s, d))
}

/// The softmax of the scores that `hidden(i, j)` leaves, times v.
fn plain(scores: &Tensor, v: &Tensor, hidden: impl Fn(i32, i32) -> bool) -> Result<Tensor> {
    let (_, heads, sq, sk) = scores.dims4()?;
    let entry = |at| hidden((at / sk) as i32, (at % sk) as i32);
    let mask = (0..sq * sk).map(|at| if entry(at) { f32::NEG_INFINITY } else { 0. });
    let mask = Tensor::from_vec(mask.collect::<Vec<_>>(), (sq, sk), CPU)?;
    ops::softmax(&scores.broadcast_add(&mask)?, D::Minus1)?.matmul(&repeated(v, heads)?)
}

#[test]
fn llama() -> Result<()> {
    // 3 new tokens after 7 in the cache.
    let (q, k, v) = (random(&[1, 8, 3, 16]), random(&[1, 2, 10, 16]), random(&[1, 2, 10, 16]));
    let expected = plain(&scores(&q, &k, 0.25)?, &v, |i, j| j > i + 7)?;
    assert_close(&q.kaio_flash_attn(&k, &v, true)?, &expected);
    Ok(())
}

#[test]
fn bert() -> Result<()> {
    let [q, k, v] = std::array::from_fn(|_| random(&[2, 4, 6, 16]));
    let mask = Tensor::new(&[[1u8, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]], CPU)?;
    let (visible, hidden) =
        (Tensor::zeros((2, 6), DType::F32, CPU)?, Tensor::full(f32::NEG_INFINITY, (2, 6), CPU)?);
    let bias = mask.where_cond(&visible, &hidden)?.reshape((2, 1, 1, 6))?;
    let expected = plain(&scores(&q, &k, 0.25)?.broadcast_add(&bias)?, &v, |_, _| false)?;
    let opts = FlashAttnOptions::default().bias(bias);
    assert_close(&q.kaio_flash_attn_with(&k, &v, &opts)?, &expected);

    let lengths = mask.to_dtype(DType::F32)?.sum(1)?.to_dtype(DType::U32)?;
    let opts = FlashAttnOptions::default().seqlens_q(lengths.clone()).seqlens_k(lengths);
    let out = q.kaio_flash_attn_with(&k, &v, &opts)?;
    let tokens = |x: &Tensor| x.get(1)?.narrow(1, 0, 4);
    assert_close(&out.get(0)?, &expected.get(0)?);
    assert_close(&tokens(&out)?, &tokens(&expected)?);
    assert_eq!(out.get(1)?.narrow(1, 4, 2)?.abs()?.max_all()?.to_scalar::<f32>()?, 0.);
    Ok(())
}

#[test]
fn t5() -> Result<()> {
    let [q, k, v] = std::array::from_fn(|_| random(&[2, 4, 5, 16]));
    let bias = Var::from_tensor(&random(&[1, 4, 5, 5]))?;
    let biased = scores(&q, &k, 1.)?.broadcast_add(&bias)?;
    for causal in [false, true] {
        let opts = FlashAttnOptions::default().softmax_scale(1.).bias(bias.as_tensor().clone());
        let out = q.kaio_flash_attn_with(&k, &v, &opts.causal(causal))?;
        let expected = plain(&biased, &v, |i, j| causal && j > i)?;
        assert_close(&out, &expected);
        let gradient = |loss: Tensor| Ok(loss.backward()?.get(&bias).cloned());
        let gradients: Result<Vec<_>> =
            [out, expected].map(|x| gradient(x.sqr()?.sum_all()?)).into_iter().collect();
        let [ours, plain] = &gradients?[..] else { unreachable!() };
        let (ours, plain) = (ours.as_ref().unwrap(), plain.as_ref().unwrap());
        assert!((ours - plain)?.abs()?.max_all()?.to_scalar::<f32>()? < 1e-4);
    }
    Ok(())
}

#[test]
fn gemma2() -> Result<()> {
    let (q, k, v) = (random(&[1, 4, 9, 16]), random(&[1, 2, 9, 16]), random(&[1, 2, 9, 16]));
    let window = 4;
    for layer in 0..2 {
        let mut opts = FlashAttnOptions::default().causal(true).softcap(50.);
        if layer % 2 == 0 {
            opts = opts.window_size_left(window as usize - 1);
        }
        let out = q.kaio_flash_attn_with(&k, &v, &opts.softmax_scale(256f32.powf(-0.5)))?;
        let capped = ((scores(&q, &k, 1. / 16.)? / 50.)?.tanh()? * 50.)?;
        let hidden = |i, j| j > i || layer % 2 == 0 && j <= i - window;
        assert_close(&out, &plain(&capped, &v, hidden)?);
    }
    Ok(())
}

#[test]
fn phi3() -> Result<()> {
    let [q, k, v] = std::array::from_fn(|_| random(&[1, 2, 9, 96]));
    let window = 4;
    let opts = FlashAttnOptions::default().causal(true).window_size_left(window as usize - 1);
    let out = q.kaio_flash_attn_with(&k, &v, &opts)?;
    let scores = scores(&q, &k, 96f64.powf(-0.5))?;
    assert_close(&out, &plain(&scores, &v, |i, j| j > i || j <= i - window)?);
    Ok(())
}

#[test]
fn whisper() -> Result<()> {
    let (frames, tokens) = (random(&[1, 6, 50, 64]), random(&[1, 6, 7, 64]));
    for (q, kv, causal) in
        [(&frames, &frames, false), (&tokens, &tokens, true), (&tokens, &frames, false)]
    {
        let expected = plain(&scores(q, kv, 0.125)?, kv, |i, j| causal && j > i)?;
        assert_close(&q.kaio_flash_attn(kv, kv, causal)?, &expected);
    }
    Ok(())
}

#[test]
fn packed() -> Result<()> {
    let x = random(&[6, 3, 16]);
    let ends = Tensor::new(&[0u32, 4, 6], CPU)?;
    let opts = FlashAttnOptions::default().layout(AttnLayout::Bshd).causal(true);
    let opts = opts.cu_seqlens_q(ends.clone()).cu_seqlens_k(ends);
    let out = x.kaio_flash_attn_with(&x, &x, &opts)?;
    for (first, rows) in [(0, 4), (4, 2)] {
        let part = x.narrow(0, first, rows)?.transpose(0, 1)?.contiguous()?.unsqueeze(0)?;
        let expected = plain(&scores(&part, &part, 0.25)?, &part, |i, j| j > i)?;
        assert_close(&out.narrow(0, first, rows)?, &expected.get(0)?.transpose(0, 1)?);
    }
    Ok(())
}

type Function<'a> = Box<dyn Fn(&Tensor) -> Result<Tensor> + 'a>;

fn function<'a>(f: impl Fn(&Tensor) -> Result<Tensor> + 'a) -> Function<'a> {
    Box::new(f)
}

/// What freezes, what to use instead, and that both compute the same (`None`: within the rounding of quantised weights).
#[test]
fn frozen_by_candle_nn() -> Result<()> {
    let (ones, zeros) = (Tensor::ones(8, DType::F32, CPU)?, Tensor::zeros(8, DType::F32, CPU)?);
    let (rms, layer) =
        (RmsNorm::new(ones.clone(), 1e-6), LayerNorm::new(ones.clone(), zeros.clone(), 1e-6));
    let angles = random(&[4, 4]);
    let (cos, sin) = (angles.cos()?, angles.sin()?);
    let swapped = |x: &Tensor| x.transpose(1, 2)?.contiguous();
    let lengths = Tensor::new(&[4u32], CPU)?;
    // [1, 2, 4, 8] as [T, H, D].
    let thd = |x: &Tensor| swapped(x)?.squeeze(0);
    let varlen = |x: &Tensor| {
        let opts = FlashAttnOptions::default().softmax_scale(0.5).causal(true);
        thd(&x.kaio_flash_attn_with(x, &x.detach(), &opts)?)
    };
    let weight = QMatMul::from_qtensor(QTensor::quantize(&random(&[4, 32]), GgmlDType::Q8_0)?)?;
    let rows = |x: &Tensor| x.reshape((2, 32));

    let pairs: Vec<(&str, Function, Function)> = vec![
        ("RmsNorm", function(|x| rms.forward(x)), function(|x| rms.forward_diff(x))),
        (
            "rms_norm",
            function(|x| ops::rms_norm(x, &ones, 1e-6)),
            function(|x| ops::rms_norm_slow(x, &ones, 1e-6)),
        ),
        (
            "LayerNorm",
            function(|x| layer.forward(x)),
            function(|x| ops::layer_norm_slow(x, &ones, &zeros, 1e-6)),
        ),
        (
            "layer_norm",
            function(|x| ops::layer_norm(x, &ones, &zeros, 1e-6)),
            function(|x| ops::layer_norm_slow(x, &ones, &zeros, 1e-6)),
        ),
        (
            "rope",
            function(|x| rotary_emb::rope(x, &cos, &sin)),
            function(|x| rotary_emb::rope_slow(x, &cos, &sin)),
        ),
        (
            "rope_i",
            function(|x| rotary_emb::rope_i(x, &cos, &sin)),
            function(|x| rotary_emb::rope_i_slow(x, &cos, &sin)),
        ),
        (
            "rope_thd",
            function(|x| rotary_emb::rope_thd(&swapped(x)?, &cos, &sin)),
            function(|x| swapped(&rotary_emb::rope_slow(x, &cos, &sin)?)),
        ),
        (
            "softmax_last_dim",
            function(ops::softmax_last_dim),
            function(|x| ops::softmax(x, D::Minus1)),
        ),
        (
            "flash_attn",
            function(|x| {
                let x = swapped(x)?;
                flash_attn::<f32>(&x, &x, &x, 0.5, AttnMask::causal(), None, None)
            }),
            function(|x| {
                x.kaio_flash_attn_with(
                    x,
                    x,
                    &FlashAttnOptions::default().softmax_scale(0.5).causal(true),
                )
            }),
        ),
        (
            "flash_attn_varlen_unfused",
            function(|x| {
                let (q, v) = (thd(x)?, thd(&x.detach())?);
                let n = &lengths;
                flash_attn_varlen_unfused(&q, &q, &v, None, n, n, 4, 4, 0.5, true, None, None)
            }),
            function(varlen),
        ),
        (
            "flash_attn_varlen_cpu",
            function(|x| {
                let (q, v) = (thd(x)?, thd(&x.detach())?);
                let n = &lengths;
                flash_attn_varlen_cpu(&q, &q, &v, None, n, n, 4, 4, 0.5, true, None, None)
            }),
            function(varlen),
        ),
        (
            "QMatMul",
            function(|x| weight.forward(&rows(x)?)),
            function(|x| {
                let w = weight.dequantize_f16()?.to_dtype(DType::F32)?;
                rows(x)?.matmul(&w.t()?)
            }),
        ),
    ];
    for (name, frozen, instead) in &pairs {
        let x = Var::from_tensor(&random(&[1, 2, 4, 8]))?;
        let run = |f: &Function| -> Result<(Tensor, bool)> {
            let y = f(&x)?;
            let reached = y.sqr()?.sum_all()?.backward()?.get(&x).is_some();
            Ok((y, reached))
        };
        let ((fast, frozen_reaches), (slow, instead_reaches)) = (run(frozen)?, run(instead)?);
        assert!(
            !frozen_reaches,
            "{name} has a gradient now: README and docs/recipes.md warn of it"
        );
        assert!(instead_reaches, "what stands in for {name} has no gradient");
        let bound = if *name == "QMatMul" { 0.1 } else { 1e-5 };
        let off = (fast - slow)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(off < bound, "{name}: results differ by {off}");
    }
    Ok(())
}
