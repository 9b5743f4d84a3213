//! Sizes that wrap, as broadcast views have them without memory.

use candle_core::DType::{self, BF16, F8E4M3, F16, F32, U8, U32};
use candle_core::{Device, Tensor, bail};
use kaio_candle::quant::{GptqFormat, QuantWeight};
use kaio_candle::{Error, prelude::*, quant};

use crate::suites::Tally;

/// Arguments and results that no memory holds: the same words on CPU and GPU, before anything is
/// allocated or read.
pub fn sizes(device: &Device) {
    let mut tally = Tally::new("errors of sizes", device);
    // One element, repeated.
    let view = |dtype: DType, dims: &[usize]| {
        let one = Tensor::zeros(vec![1; dims.len()], dtype, device).expect("zeros");
        one.broadcast_as(dims).expect("a view")
    };
    let over = "would be over 281474976710655 bytes, more than any memory; check its sizes, or work in parts";
    let product = |dtype, a: &[usize], b: &[usize]| view(dtype, a).kaio_matmul_tc(&view(dtype, b));
    let with =
        |a: &[usize], b: &[usize], opts| view(BF16, a).kaio_matmul_with(&view(BF16, b), &opts);
    let (matmul, int8, int4) = ("kaio_matmul_tc", "kaio_matmul_int8", "kaio_matmul_int4");
    // Times 20 it is 4 more than 2⁶⁴.
    let fifth = ((1usize << 62) + 1) / 5;
    let (t46, t40) = (1usize << 46, 1usize << 40);
    refused! { tally;
        product(F16, &[fifth, 1], &[1, 20]) => TooLarge, "{matmul}: `lhs` [{fifth}, 1] in f16 {over}";
        product(F16, &[20, 1], &[1, fifth]) => TooLarge, "{matmul}: `rhs` [1, {fifth}] in f16 {over}";
        product(BF16, &[1, usize::MAX], &[usize::MAX, 1]) => TooLarge, "{matmul}: `lhs` [1, {}] in bf16 {over}", usize::MAX;
        product(F16, &[0, usize::MAX], &[usize::MAX, 1]) => TooLarge, "{matmul}: `lhs` [0, {}] in f16 {over}", usize::MAX;
        product(F16, &[t40, 1], &[1, t40]) => TooLarge, "{matmul}: the result [{t40}, {t40}] in f32 {over}";
        product(F16, &[t46, 1], &[1, 1]) => TooLarge, "{matmul}: the result [{t46}, 1] in f32 {over}";
        product(F16, &[t40, 1, 1, 1], &[t40, 1, 1]) => TooLarge, "{matmul}: the result [{t40}, {t40}, 1, 1] in f32 {over}";
        product(F16, &[t40, 0], &[0, t40]) => TooLarge, "{matmul}: the result [{t40}, {t40}] in f32 {over}";
        with(&[t40, 1], &[1, t40], MatmulOptions::default().out_dtype(BF16)) => TooLarge, "kaio_matmul_with: the result [{t40}, {t40}] in f32 {over}";
        with(&[1, 1], &[1, t46], MatmulOptions::default().bias(view(F32, &[t46]))) => TooLarge, "kaio_matmul_with: `bias` [{t46}] in f32 {over}";
        view(U8, &[fifth, 1]).kaio_matmul_int8(&view(U8, &[1, 20]), 1.0) => TooLarge, "{int8}: `lhs` [{fifth}, 1] in u8 {over}";
        view(U8, &[t40, 1]).kaio_matmul_int8(&view(U8, &[1, t40]), 1.0) => TooLarge, "{int8}: the result [{t40}, {t40}] in f32 {over}";
        view(F16, &[fifth, 128]).kaio_matmul_int4(&view(U32, &[16, 20]), &view(F16, &[1, 20])) => TooLarge, "{int4}: `lhs` [{fifth}, 128] in f16 {over}";
        view(F16, &[1 << 39, 128]).kaio_matmul_int4(&view(U32, &[16, t40]), &view(F16, &[1, t40])) => TooLarge, "{int4}: the result [{}, {t40}] in f32 {over}", 1usize << 39;
    }

    let qkv8 = |x: &Tensor, w: &Tensor| x.kaio_qkv_project_int8([w; 3], [1.0; 3]);
    let qkv4 = |x: &Tensor, w: &Tensor, s: &Tensor| x.kaio_qkv_project_int4([w; 3], [s; 3]);
    refused! { tally;
        qkv8(&view(F16, &[1, 1]), &view(U8, &[1, fifth])) => TooLarge, "kaio_qkv_project_int8: `weights[0]` [1, {fifth}] in u8 {over}";
        qkv8(&view(F16, &[t40, 1]), &view(U8, &[1, t40])) => TooLarge, "kaio_qkv_project_int8: the result [{t40}, {t40}] in f32 {over}";
        qkv4(&view(F16, &[1, 128]), &view(U32, &[16, 20]), &view(F16, &[1, fifth])) => TooLarge, "kaio_qkv_project_int4: `scales[0]` [1, {fifth}] in f16 {over}";
        qkv4(&view(F16, &[1 << 39, 128]), &view(U32, &[16, t40]), &view(F16, &[1, t40])) => TooLarge, "kaio_qkv_project_int4: the result [{}, {t40}] in f32 {over}", 1usize << 39;
    }

    let flash = |[q, k, v]: [&[usize]; 3]| {
        view(F16, q).kaio_flash_attn(&view(F16, k), &view(F16, v), false)
    };
    let tc = |[q, k, v]: [&[usize]; 3]| {
        view(F16, q).kaio_attention_tc(&view(F16, k), &view(F16, v), false)
    };
    let biased = |bias: &[usize]| {
        let (q, opts) = (view(F16, &[1, 1, 1, 8]), FlashAttnOptions::default());
        q.kaio_flash_attn_with(&q, &q, &opts.bias(view(F32, bias)))
    };
    refused! { tally;
        flash([&[fifth, 20], &[1, 20], &[1, 20]]) => TooLarge, "kaio_flash_attn: `q` [{fifth}, 20] in f16 {over}";
        flash([&[1, 20], &[fifth, 20], &[fifth, 20]]) => TooLarge, "kaio_flash_attn: `k` [{fifth}, 20] in f16 {over}";
        flash([&[t46, 1, 1], &[1, 1, 1], &[1, 1, 1]]) => TooLarge, "kaio_flash_attn: the result [{t46}, 1, 1] in f32 {over}";
        flash([&[t40, 1], &[1, 1], &[1, t40]]) => TooLarge, "kaio_flash_attn: the result [{t40}, {t40}] in f32 {over}";
        biased(&[usize::MAX, 1, 1, 1]) => TooLarge, "kaio_flash_attn_with: `bias` [{}, 1, 1, 1] in f32 {over}", usize::MAX;
        tc([&[fifth, 20], &[1, 20], &[1, 20]]) => TooLarge, "kaio_attention_tc: `q` [{fifth}, 20] in f16 {over}";
        tc([&[t40, 1, 1, 1], &[t40, 1, 1], &[1, 1]]) => TooLarge, "kaio_attention_tc: the result [{t40}, {t40}, 1, 1] in f32 {over}";
    }

    refused! { tally;
        quant::quantize_int8(&view(F16, &[fifth, 20])) => TooLarge, "quantize_int8: `t` [{fifth}, 20] in f16 {over}";
        quant::quantize_int8(&view(F16, &[t46])) => TooLarge, "quantize_int8: what is made of `t`, [{t46}] in f32 {over}";
        quant::dequantize_int8(&view(U8, &[t46]), 1.0) => TooLarge, "dequantize_int8: what is made of `q`, [{t46}] in f32 {over}";
        quant::quantize_int4(&view(F32, &[128, fifth])) => TooLarge, "quantize_int4: `weight` [128, {fifth}] in f32 {over}";
        quant::pack_int4(&view(U8, &[8, 1 << 43])) => TooLarge, "pack_int4: what is made of `values`, [8, {}] in f32 {over}", 1usize << 43;
        quant::unpack_int4(&view(U32, &[1 << 43, 1])) => TooLarge, "unpack_int4: what is made of `packed`, [{t46}, 1] in f32 {over}";
        quant::unpack_int4(&view(U32, &[usize::MAX, 0])) => TooLarge, "unpack_int4: `packed` [{}, 0] in u32 {over}", usize::MAX;
        quant::dequantize_int4(&view(U32, &[1 << 43, 1]), &view(F16, &[1 << 39, 1])) => TooLarge, "dequantize_int4: what is made of `packed`, [{t46}, 1] in f32 {over}";
    }

    // Rows and columns of no tensor: what no file has an element of says how many there are.
    let gptq = |w: &[usize], z: &[usize], s: &[usize]| {
        QuantWeight::from_gptq(&view(U32, w), &view(U32, z), &view(F16, s), None)
    };
    let awq = |w: &[usize], z: &[usize], s: &[usize]| {
        QuantWeight::from_awq(&view(U32, w), &view(U32, z), &view(F16, s))
    };
    let nf4 = |shape: &str| {
        let json = format!(r#"{{"quant_type": "nf4", "blocksize": 64, "shape": {shape}}}"#);
        let json = Tensor::new(json.into_bytes(), device).expect("bytes");
        QuantWeight::from_nf4(&view(U8, &[0]), &view(F32, &[0]), &json, None)
    };
    let (t44, t57) = (1usize << 44, 1usize << 57);
    refused! { tally;
        gptq(&[t46, 8], &[1, 1], &[1, 8]) => TooLarge, "QuantWeight::from_gptq: `qweight` [{t46}, 8] in u32 {over}";
        gptq(&[t46, 0], &[1, 0], &[1, 0]) => TooLarge, "QuantWeight::from_gptq: `qweight` [{t46}, 0] in u32 {over}";
        awq(&[t40, t40], &[1, 1], &[1, 8]) => TooLarge, "QuantWeight::from_awq: `qweight` [{t40}, {t40}] in u32 {over}";
        nf4("[0, 1152921504606846976]") => TooLarge, "QuantWeight::from_nf4: `codes` [{t57}, 0] in u32 {over}";
        nf4("[9223372036854775808, 0]") => TooLarge, "QuantWeight::from_nf4: `codes` [0, {}] in u32 {over}", 1usize << 63;
    }
    tally.case("no columns", || {
        let weight = gptq(&[t44, 0], &[2, 0], &[2, 0])?;
        assert_eq!(weight.dims2(), (8 * t44, 0));
        assert_eq!(awq(&[t44, 0], &[2, 0], &[2, 0])?.dims2(), (t44, 0));
        assert_eq!(gptq(&[0, 8], &[1, 1], &[1, 8])?.dims2(), (0, 8));
        assert_eq!(awq(&[0, 8], &[1, 8], &[1, 64])?.dims2(), (0, 64));
        Ok(())
    });

    if device.is_cpu() {
        // More than the 2⁴⁷ bytes that a process can map, whatever it is promised.
        let (rows, cols, bytes) = (1usize << 23, 3usize << 21, 3usize << 46);
        let no = format!(
            "needs {bytes} bytes, which cannot be allocated; check its sizes, or work in parts"
        );
        refused! { tally;
            product(F16, &[rows, 1], &[1, cols]) => TooLarge, "{matmul}: the result [{rows}, {cols}] in f32 {no}";
            view(U8, &[rows, 1]).kaio_matmul_int8(&view(U8, &[1, cols]), 1.0) => TooLarge, "{int8}: the result [{rows}, {cols}] in f32 {no}";
            tc([&[rows, 1], &[1, 1], &[1, cols]]) => TooLarge, "kaio_attention_tc: the result [{rows}, {cols}] in f32 {no}";
            quant::quantize_int8(&view(F32, &[rows, cols])) => TooLarge, "quantize_int8: what is made of `t`, [{rows}, {cols}] in f32 {no}";
        }
    }

    // What is cast or copied before this crate's ops begin.
    let cast = MatmulOptions::default().compute_dtype(BF16);
    let cast_losses = CrossEntropyOptions::default().compute_dtype(BF16);
    let losses = |x: &Tensor, weight: DType, opts: &CrossEntropyOptions| {
        let targets = view(U32, &x.dims()[..1]);
        x.kaio_linear_cross_entropy(&view(weight, &[2, x.dims()[1]]), &targets, opts)
    };
    let (with, linear) = ("kaio_matmul_with", "kaio_linear_cross_entropy");
    if device.is_cpu() {
        let (rows, bytes) = (3usize << 44, 3usize << 46);
        let no = format!(
            "needs {bytes} bytes, which cannot be allocated; check its sizes, or work in parts"
        );
        let of = |arg: &str| format!("what is made of `{arg}`, [{rows}, 1] in f32 {no}");
        let (x, one) = (view(F32, &[rows, 1]), view(F32, &[1, 1]));
        let weight = |scheme| QuantWeight::quantize(&one, &scheme);
        let opts = cast.clone().activations(Activations::Int8);
        let ids = view(U32, &[rows, 1]);
        let fp8 = |x: &Tensor| x.kaio_matmul_fp8(&view(F8E4M3, &[1, 1]), &Fp8Options::default());
        let none = CrossEntropyOptions::default().reduction(Reduction::None);
        let (codes, nothing) = (
            |dtype| view(dtype, &[rows, 1]),
            |dtype| Tensor::zeros((1, 0), dtype, device).unwrap(),
        );
        let (int8, floats) = (Int8Options::default(), Fp8Options::default());
        let eight = QuantScheme::Int8 { per: Per::Channel };
        let ends = |ends: &Tensor| {
            let (q, opts) = (view(F16, &[1, 0, 1]), FlashAttnOptions::default());
            let opts = opts.cu_seqlens_q(ends.clone()).cu_seqlens_k(ends.clone());
            q.kaio_flash_attn_with(&q, &q, &opts)
        };
        // Rows in groups that are not sorted, 32 of each.
        let gather = |x: &Tensor| {
            let words = |dims: &[usize]| view(U32, dims);
            let groups = Tensor::from_iter((0..64u32).map(|row| row % 2), device)?;
            let scales = view(F16, &[2, 8]);
            let weight = QuantWeight::from_gptq_with(
                &words(&[8, 8]),
                &words(&[2, 1]),
                &scales,
                Some(&groups),
                GptqFormat::V2,
            )?;
            x.kaio_matmul_quant(&weight)
        };
        refused! { tally;
            x.kaio_matmul_with(&one, &cast) => TooLarge, "{with}: {}", of("lhs");
            one.kaio_matmul_with(&view(F32, &[1, rows]), &cast) => TooLarge, "{with}: what is made of `rhs`, [1, {rows}] in f32 {no}";
            x.kaio_matmul_quant_with(&weight(QuantScheme::Int8 { per: Per::Tensor })?, &opts) => TooLarge, "kaio_matmul_quant_with: {}", of("x");
            gather(&view(F16, &[rows >> 6, 64])) => TooLarge, "kaio_matmul_quant: what is made of `x`, [{}, 64] in f32 {no}", rows >> 6;
            fp8(&view(F8E4M3, &[rows, 1])) => TooLarge, "kaio_matmul_fp8: {}", of("lhs");
            losses(&x, F32, &cast_losses) => TooLarge, "{linear}: {}", of("hidden");
            losses(&view(BF16, &[rows, 1]), BF16, &none) => TooLarge, "{linear}: {}", of("hidden");
            view(F32, &[1, 0]).kaio_embedding(&ids) => TooLarge, "kaio_embedding: {}", of("ids");
            ends(&view(U32, &[rows])) => TooLarge, "kaio_flash_attn_with: what is made of `cu_seqlens_q`, [{rows}] in f32 {no}";
            codes(U8).kaio_matmul_int8_with(&nothing(U8), &int8.clone().lhs_scales(x.clone())) => TooLarge, "kaio_matmul_int8_with: {}", of("lhs_scales");
            nothing(U8).t()?.kaio_matmul_int8_with(&codes(U8).t()?, &int8.clone().rhs_scales(x.t()?)) => TooLarge, "kaio_matmul_int8_with: what is made of `rhs_scales`, [1, {rows}] in f32 {no}";
            codes(F8E4M3).kaio_matmul_fp8(&nothing(F8E4M3), &floats.clone().lhs_scales(x.clone())) => TooLarge, "kaio_matmul_fp8: {}", of("lhs_scales");
            nothing(F8E4M3).t()?.kaio_matmul_fp8(&codes(F8E4M3).t()?, &floats.clone().rhs_scales(x.t()?)) => TooLarge, "kaio_matmul_fp8: what is made of `rhs_scales`, [1, {rows}] in f32 {no}";
            QuantWeight::quantize(&x, &eight) => TooLarge, "QuantWeight::quantize: {}", of("weight");
            QuantWeight::quantize(&view(F32, &[0, rows >> 1]), &eight) => TooLarge, "QuantWeight::quantize: the scales [1, {}] in f64 {no}", rows >> 1;
            QuantWeight::from_int8(&codes(U8), &view(F32, &[1])) => TooLarge, "QuantWeight::from_int8: {}", of("codes");
            QuantWeight::from_int8(&view(U8, &[0, rows]), &x.t()?) => TooLarge, "QuantWeight::from_int8: what is made of `scales`, [1, {rows}] in f32 {no}";
            QuantWeight::from_int4(&view(U32, &[16, rows >> 4]), &view(F16, &[1, rows >> 4])) => TooLarge, "QuantWeight::from_int4: what is made of `packed`, [16, {}] in f32 {no}", rows >> 4;
            QuantWeight::from_fp8(&codes(F8E4M3), &view(F32, &[1])) => TooLarge, "QuantWeight::from_fp8: {}", of("codes");
            view(F32, &[rows, 1, 0]).kaio_cross_entropy(&ids, &none) => TooLarge, "kaio_cross_entropy: {}", of("targets");
        }
    } else {
        // More elements than candle's kernels count.
        let rows = 1usize << 32;
        let no = format!(
            "this crate cannot copy or convert {rows} elements at once (at most {}); split the batch and join the results with `Tensor::cat`",
            u32::MAX
        );
        let (x, one) = (view(F32, &[rows, 1]), view(F32, &[1, 1]));
        refused! { tally;
            x.kaio_matmul_with(&one, &cast) => Unsupported, "{with}: {no}";
            losses(&x, F32, &cast_losses) => Unsupported, "{linear}: {no}";
            losses(&view(BF16, &[rows, 1]), BF16, &CrossEntropyOptions::default()) => Unsupported, "{linear}: {no}";
            view(F32, &[1, 0]).kaio_embedding(&view(U32, &[rows])) => Unsupported, "kaio_embedding: {no}";
        }
    }
    tally.finish();
}
