//! What engines and kernels cannot take, and the largest that they can.

use candle_core::{DType, Result, Tensor};
use kaio_candle::{Error, prelude::*};

use super::gpu;
use super::streams::bits;
use super::suites::{Layout, Source};

/// A head dimension that no kaio-ops kernel takes: the error names the engine and its limit.
#[test]
fn head_dimension_limit() {
    let Some(device) = gpu() else { return };
    let x = Tensor::zeros((4, 264), DType::F16, &device).unwrap();
    for (op, result) in [
        ("kaio_flash_attn", x.kaio_flash_attn(&x, &x, false)),
        ("kaio_attention_tc", x.kaio_attention_tc(&x, &x, false)),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::Unsupported { .. })));
        assert_eq!(
            error.to_string(),
            format!(
                "{op}: Engine::KaioOps cannot take a head dimension of 264 (at most 256); run it on \
                 the CPU, or use narrower heads"
            )
        );
    }
}

/// Options that no kaio-ops kernel takes: the error names the engine and the option.
#[test]
fn option_limits() {
    let Some(device) = gpu() else { return };
    let x = Tensor::zeros((1, 2, 4, 8), DType::F16, &device).unwrap();
    let packed = x.squeeze(0).unwrap();
    let zeros = |len: usize, dtype| Tensor::zeros(len, dtype, &device).unwrap();
    let u32s = |len| zeros(len, DType::U32);
    let opts = || FlashAttnOptions::default().engine(Engine::KaioOps);
    for (option, q, opts) in [
        ("window_size_left", &x, opts().window_size_left(1)),
        ("window_size_right", &x, opts().window_size_right(1)),
        ("softcap", &x, opts().softcap(1.0)),
        ("alibi_slopes", &x, opts().alibi_slopes(zeros(2, DType::F32))),
        ("bias", &x, opts().bias(zeros(4, DType::F32))),
        ("cu_seqlens_q", &packed, opts().cu_seqlens_q(u32s(2)).cu_seqlens_k(u32s(2))),
        ("seqlens_q", &x, opts().seqlens_q(u32s(1))),
        ("seqlens_k", &x, opts().seqlens_k(u32s(1))),
    ] {
        let error = q.kaio_flash_attn_with(q, q, &opts).unwrap_err();
        assert!(matches!(Error::of(&error), Some(Error::Unsupported { .. })));
        assert_eq!(
            error.to_string(),
            format!(
                "kaio_flash_attn_with: Engine::KaioOps cannot take `{option}`; run it on the CPU, or \
                 leave it out"
            )
        );
    }
}

/// Views make sizes that no memory holds: refused before anything is allocated.
#[test]
fn sizes_over_the_kernels_limits() {
    let Some(gpu) = gpu() else { return };
    let view = |from: &[usize], to: &[usize]| {
        Tensor::zeros(from, DType::F16, &gpu).unwrap().broadcast_as(to).unwrap()
    };
    let b = view(&[8, 8], &[8, 8]);
    let opts = MatmulOptions::default().engine(Engine::Native);
    for (a, got) in [
        (view(&[1, 8], &[3_000_000_000, 8]), "M of 3000000000 (at most 2147483647)"),
        (
            view(&[1, 1, 8], &[40_000_000, 1, 8]),
            "a result of 40000000 tiles of 64 x 64 (at most 33554431)",
        ),
    ] {
        let b = if a.rank() == 3 { b.broadcast_left(40_000_000).unwrap() } else { b.clone() };
        assert_eq!(
            a.kaio_matmul_with(&b, &opts).unwrap_err().to_string(),
            format!(
                "kaio_matmul_with: Engine::Native cannot take {got}; split it and join the results \
                 with `Tensor::cat`"
            )
        );
    }
}

/// Queries and keys of more than 2³¹ elements: the last of a long sequence are the same as on their own,
/// and keys in two halves, joined by their log-sum-exp, as all of them.
#[test]
fn attention_over_two_to_the_31_elements() -> Result<()> {
    let Some(gpu) = gpu() else { return Ok(()) };
    let (dim, rows, times) = (128, 1 << 16, 257);
    let source = &mut Source::new("2^31 elements", &gpu);
    let short = source.tensor(DType::BF16, &[rows, dim], Layout::Plain)?;
    let long = short.repeat((times, 1))?;
    assert!(long.elem_count() > 1 << 31);
    let few = source.tensor(DType::BF16, &[70, dim], Layout::Plain)?;

    let opts = FlashAttnOptions::default().engine(Engine::Native);
    let (all, lse) = long.kaio_flash_attn_with_lse(&few, &few, &opts)?;
    let (part, part_lse) = short.kaio_flash_attn_with_lse(&few, &few, &opts)?;
    for turn in [0, times / 2, times - 1] {
        let same = bits(&all.narrow(0, turn * rows, rows)?.to_dtype(DType::F32)?)
            == bits(&part.to_dtype(DType::F32)?);
        assert!(same, "the results of queries from {} on", turn * rows);
        let same = bits(&lse.narrow(0, turn * rows, rows)?) == bits(&part_lse);
        assert!(same, "the log-sum-exp of queries from {} on", turn * rows);
    }
    drop((all, lse));

    let (out, lse) = few.kaio_flash_attn_with_lse(&long, &long, &opts)?;
    let (part, part_lse) = few.kaio_flash_attn_with_lse(&short, &short, &opts)?;
    // So often the same keys: the same result, and a sum so many times as large.
    let differs = |a: &Tensor, b: &Tensor| {
        (a.to_dtype(DType::F32)? - b.to_dtype(DType::F32)?)?.abs()?.max_all()?.to_scalar::<f32>()
    };
    let grown = (lse - (times as f64).ln())?;
    let (out, lse) = (differs(&out, &part)?, differs(&grown, &part_lse)?);
    assert!(out < 4e-3 && lse < 1e-3, "differ by {out}, log-sum-exp by {lse}");
    Ok(())
}
