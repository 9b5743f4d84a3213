//! What the products with quantised weights refuse.

use candle_core::{DType, Device, bail};
use kaio_candle::Error;
use kaio_candle::prelude::*;

use super::{On, WORDS};
use crate::suites::{Nd, Tally};

pub fn weights(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of quantised weights", device);
    let quantized = |scheme: QuantScheme, k, n| {
        QuantWeight::quantize(&on.f32([k, n]), &scheme).expect("zeros are quantised")
    };
    let nf4 = QuantScheme::Nf4 { block: 64 };
    let (w, narrow) = (&quantized(nf4, 128, 6), &quantized(nf4, 128, 5));
    let int8 = &quantized(QuantScheme::Int8 { per: Per::Channel }, 128, 6);
    let x = &on.bf16([4, 128]);
    let opts = MatmulOptions::default;
    let with = |opts: MatmulOptions| x.kaio_matmul_quant_with(w, &opts);
    let op = "kaio_matmul_quant_with";
    refused! { tally;
        on.bf16([128]).kaio_matmul_quant(w) => Rank, "kaio_matmul_quant: `x` has shape [128] (rank 1), wanted [.., M, K]; add a dimension with `.unsqueeze(0)?`";
        on.f32([4, 128]).kaio_matmul_quant(w) => DType, "kaio_matmul_quant: `x` is f32, wanted f16 or bf16; cast it with `.to_dtype(DType::BF16)?`, which keeps the range of f32, or `.to_dtype(DType::F16)?`, which keeps three more bits but ends at 65504";
        on.bf16([4, 100]).kaio_matmul_quant(w) => Dimension, "kaio_matmul_quant: `weight` has K = 128, wanted 100, the K of `x` [4, 100]; a weight is [K, N]; quantise it transposed";
        with(opts().bias(on.f32([5]))) => Dimension, "{op}: `bias` has N = 5, wanted 6, the N of the weight; give it one element for each column";
        with(opts().bias(on.f16([6]))) => DType, "{op}: `bias` is f16, wanted f32 or bf16; cast it with `.to_dtype(DType::F32)?`";
        with(opts().out_dtype(DType::U8)) => Value, "{op}: `out_dtype` is u8, wanted f32, f16 or bf16; leave it out for the dtype of `x`";
        with(opts().activations(Activations::Int8)) => Value, "{op}: `activations` is Activations::Int8 with a weight in Nf4 {{ block: 64 }}, wanted those of the weight's scheme, Int8 or Fp8, or Activations::Float; quantise the weight to the same";
        x.kaio_matmul_quant_with(int8, &opts().activations(Activations::Fp8)) => Value, "{op}: `activations` is Activations::Fp8 with a weight in Int8 {{ per: Channel }}, wanted those of the weight's scheme, Int8 or Fp8, or Activations::Float; quantise the weight to the same";
        x.kaio_matmul_with(&on.bf16([128, 6]), &opts().activations(Activations::Int8)) => Value, "kaio_matmul_with: `activations` is Activations::Int8, wanted Activations::Float, with a weight that is not quantised; see `kaio_matmul_quant_with`";
        x.kaio_qkv_project([w, w, &quantized(nf4, 64, 6)]) => Dimension, "kaio_qkv_project: `weights[2]` has K = 64, wanted 128, the K of `x` [4, 128]; a weight is [K, N]; quantise it transposed";
        x.kaio_swiglu_project(w, narrow) => Dimension, "kaio_swiglu_project: `up` has N = 5, wanted 6, the N of `gate` (128, 6); gate and up have the same width";
        w.explain(usize::MAX, DType::BF16, &opts()) => TooLarge, "QuantWeight::explain: `m` rows of activations [18446744073709551615, 128] in bf16 would be over 281474976710655 bytes, more than any memory; check its sizes, or work in parts";
        QuantWeight::explain_qkv([w, w, w], 1 << 60, DType::F16) => TooLarge, "QuantWeight::explain_qkv: `m` rows of activations [1152921504606846976, 128] in f16 would be over 281474976710655 bytes, more than any memory; check its sizes, or work in parts";
        w.explain(4, DType::F32, &opts()) => DType, "QuantWeight::explain: `x` is f32, wanted f16 or bf16; cast it with `.to_dtype(DType::BF16)?`, which keeps the range of f32, or `.to_dtype(DType::F16)?`, which keeps three more bits but ends at 65504";
        w.dequantize(DType::U8) => Value, "QuantWeight::dequantize: `dtype` is u8, wanted f32, f16 or bf16; cast what it gives";
    }
    let (words, scales) = (&on.u32([16, 6]), &on.f16([1, 6]));
    let undefined = Nd::full(&[1, 6], f64::NAN).tensor(DType::F32);
    let undefined = &undefined.and_then(|t| t.to_device(device)).expect("a tensor");
    refused! { tally;
        QuantWeight::from_int4(&on.zeros(DType::I32, [16, 6]), scales) => DType, "QuantWeight::from_int4: `packed` is i32, wanted u32; {WORDS}";
        QuantWeight::from_int4(&on.u32([8, 6]), scales) => Dimension, "QuantWeight::from_int4: `packed` has K = 64, wanted a multiple of 128, the rows that share a scale; pad it with zeros, and the weight too before it is quantised";
        QuantWeight::from_int4(words, undefined) => Value, "QuantWeight::from_int4: `scales` is NaN at element 0, wanted finite numbers; check the file that it comes from";
        QuantWeight::from_int8(&on.u8([8]), scales) => Rank, "QuantWeight::from_int8: `codes` has shape [8] (rank 1), wanted [K, N]; a weight is one matrix";
        QuantWeight::from_int8(&on.u8([128, 6]), &on.f32([2, 6])) => Value, "QuantWeight::from_int8: `scales` is of shape [2, 6], wanted one element, [N] or [1, N], of `codes` [128, 6]; reshape it";
        QuantWeight::from_int8(&on.u8([128, 128]), &on.f32([128, 1])) => Value, "QuantWeight::from_int8: `scales` is of shape [128, 1], wanted one element, [N] or [1, N], of `codes` [128, 128]; reshape it";
        QuantWeight::quantize(&on.f32([8, 6]), &QuantScheme::Int8 { per: Per::Block }) => Value, "QuantWeight::quantize: `per` is Per::Block, wanted Per::Tensor or Per::Channel; take `QuantScheme::Fp8` for scales of blocks";
        QuantWeight::quantize(&on.f32([8]), &nf4) => Rank, "QuantWeight::quantize: `weight` has shape [8] (rank 1), wanted [K, N]; quantise one matrix at a time";
        QuantWeight::quantize(&on.f32([8, 6]), &QuantScheme::Nf4 { block: 16 }) => Value, "QuantWeight::quantize: `block` is 16, wanted 32, 64 or 128; 64 is what bitsandbytes has";
        QuantWeight::quantize(&on.f32([8, 6]), &QuantScheme::Int4 { group: 16, zero_points: true }) => Value, "QuantWeight::quantize: `group` is 16, wanted 32, 64, 128, or -1 for a whole column; 128 is what most checkpoints have";
    }
    if !device.is_cpu() {
        refused! { tally;
            with(opts().engine(Engine::KaioOps)) => Unsupported, "{op}: Engine::KaioOps cannot take a `QuantWeight`; leave it to `Engine::Auto`";
        }
    }

    let (a, b) = (&on.u8([2, 3, 8]), &on.u8([8, 6]));
    let int8 = |opts: Int8Options| a.kaio_matmul_int8_with(b, &opts);
    let opts = Int8Options::default;
    let op = "kaio_matmul_int8_with";
    refused! { tally;
        int8(opts().zero_point(128)) => Value, "{op}: `zero_point` is 128, wanted -128 to 127; it is one of the values that the activations can have";
        int8(opts().scale(f32::NAN)) => Value, "{op}: `scale` is NaN, wanted a finite number; check how it was computed";
        int8(opts().lhs_scales(on.f32([6]))) => Value, "{op}: `lhs_scales` is of shape [6], wanted [.., M] or [.., M, 1] of `lhs`; reshape it";
        int8(opts().lhs_scales(on.f16([2, 3]))) => DType, "{op}: `lhs_scales` is f16, wanted f32; cast it with `.to_dtype(DType::F32)?`";
        int8(opts().rhs_scales(on.f32([2, 3]))) => Value, "{op}: `rhs_scales` is of shape [2, 3], wanted one element, [N] or [1, N], of `rhs` [8, 6]; reshape it";
        int8(opts().bias(on.bf16([6]))) => DType, "{op}: `bias` is bf16, wanted f32; cast it with `.to_dtype(DType::F32)?`";
        int8(opts().out_dtype(DType::I64)) => Value, "{op}: `out_dtype` is i64, wanted f32, f16 or bf16; leave it out for f32";
    }

    let e4m3 = |dims: &[usize]| {
        let zeros = Nd::full(dims, 0.0).tensor(DType::F32).and_then(|t| t.to_dtype(DType::F8E4M3));
        zeros.and_then(|t| t.to_device(device)).expect("zeros")
    };
    let (a, b) = (&e4m3(&[2, 3, 200]), &e4m3(&[200, 6]));
    let fp8 = |opts: Fp8Options| a.kaio_matmul_fp8(b, &opts);
    let (opts, op) = (Fp8Options::default, "kaio_matmul_fp8");
    let blocks = "[N], [1, N] or [K/128, N/128] rounded up";
    let shape = "`lhs_scales` is of shape [2, 3, 3], wanted one element, [.., M], [.., M, 1] or [.., M, K/128 rounded up] of `lhs`; reshape it";
    refused! { tally;
        x.kaio_matmul_fp8(b, &opts()) => DType, "{op}: `lhs` is bf16, wanted f8e4m3; cast it with `.to_dtype(DType::F8E4M3)?`";
        a.kaio_matmul_fp8(&e4m3(&[100, 6]), &opts()) => Dimension, "{op}: `rhs` has K = 100, wanted 200, the K of `lhs` [2, 3, 200]; transpose the weight with `.t()?`";
        fp8(opts().lhs_scales(on.f32([2, 3, 3]))) => Value, "{op}: {shape}";
        QuantWeight::from_fp8(&on.f32([200, 6]), &on.f32([1, 6])) => DType, "QuantWeight::from_fp8: `codes` is f32, wanted f8e4m3; cast it with `.to_dtype(DType::F8E4M3)?`";
        QuantWeight::from_fp8(a, &on.f32([1, 6])) => Rank, "QuantWeight::from_fp8: `codes` has shape [2, 3, 200] (rank 3), wanted [K, N]; a weight is one matrix";
        QuantWeight::from_fp8(b, &on.f32([3, 1])) => Value, "QuantWeight::from_fp8: `scales` is of shape [3, 1], wanted one element, {blocks}, of `codes` [200, 6]; reshape it";
        QuantWeight::from_fp8(b, &on.u8([1, 6])) => DType, "QuantWeight::from_fp8: `scales` is u8, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        QuantWeight::from_fp8(b, undefined) => Value, "QuantWeight::from_fp8: `scales` is NaN at element 0, wanted finite numbers; check the file that it comes from";
        fp8(opts().rhs_scales(on.f32([3, 1]))) => Value, "{op}: `rhs_scales` is of shape [3, 1], wanted one element, {blocks}, of `rhs` [200, 6]; reshape it";
    }
    tally.finish();
}
