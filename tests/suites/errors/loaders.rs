//! Tensors of checkpoints that do not belong together, or hold what cannot be.

use std::collections::HashMap;

use super::*;

const ONE: &str = "take all tensors from one layer";
const BITS4: &str = "take all tensors from one layer, of four bits";
const GEMM: &str = "take all tensors from one layer, of four bits and the layout `gemm`";
const LAYER: &str = "take all tensors from the same layer";
const READ: &str = "read it with `candle_core::safetensors`, which keeps the file's dtypes (a `VarBuilder` does not)";
const ANEW: &str = "dequantise the weight with the package that made it, and quantise it anew";

/// Floats with NaN for one element.
fn with_nan(t: &Tensor, element: usize) -> Tensor {
    let mut all = vec![0f32; t.elem_count()];
    all[element] = f32::NAN;
    let with = Tensor::from_vec(all, t.shape(), &Device::Cpu);
    let with = with.and_then(|with| with.to_dtype(t.dtype())?.to_device(t.device()));
    with.expect("a tensor")
}

pub fn gptq(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of GPTQ's tensors", device);
    let (w, z, s) = (on.u32([16, 24]), on.u32([2, 3]), on.f16([2, 24]));
    let load = |w: &Tensor, z: &Tensor, s: &Tensor| QuantWeight::from_gptq(w, z, s, None);
    let by = |g_idx: Vec<i64>| {
        let g_idx = Tensor::new(g_idx, device).expect("indices");
        QuantWeight::from_gptq(&w, &z, &s, Some(&g_idx))
    };
    let threes = Tensor::full(0x3333_3333_u32, (2, 3), device).expect("words");
    let outside = |i: i64| if i == 100 { 5 } else { i / 64 };
    let nan = s
        .to_dtype(F32)
        .and_then(|s| s + f64::NAN)
        .and_then(|s| s.to_dtype(DType::F16))
        .expect("NaN");
    refused! { tally;
        load(&on.f16([16, 24]), &z, &s) => DType, "QuantWeight::from_gptq: `qweight` is f16, wanted i32 or u32; {READ}";
        load(&w, &on.f32([2, 3]), &s) => DType, "QuantWeight::from_gptq: `qzeros` is f32, wanted i32 or u32; {READ}";
        load(&on.u32([16]), &z, &s) => Rank, "QuantWeight::from_gptq: `qweight` has shape [16] (rank 1), wanted [K/8, N]; {BITS4}";
        load(&w, &on.u32([3]), &s) => Rank, "QuantWeight::from_gptq: `qzeros` has shape [3] (rank 1), wanted [groups, N/8]; {BITS4}";
        load(&w, &z, &on.f16([24])) => Rank, "QuantWeight::from_gptq: `scales` has shape [24] (rank 1), wanted [groups, N]; {BITS4}";
        load(&w, &z, &on.f16([2, 23])) => Dimension, "QuantWeight::from_gptq: `scales` has N = 23, wanted 24, the N of `qweight`; {BITS4}";
        load(&w, &on.u32([1, 3]), &s) => Dimension, "QuantWeight::from_gptq: `qzeros` has groups = 1, wanted 2, those of `scales`; {BITS4}";
        load(&w, &on.u32([2, 24]), &s) => Dimension, "QuantWeight::from_gptq: `qzeros` has columns = 24, wanted 3, N/8 for the N = 24 of `qweight`; {BITS4}";
        load(&w, &on.u32([3, 3]), &on.f16([3, 24])) => Dimension, "QuantWeight::from_gptq: `scales` has groups = 3, wanted the groups of 32, 64, a multiple of 128, or all of the 128 rows; {LAYER}";
        load(&w, &on.u32([8, 3]), &on.f16([8, 24])) => Value, "QuantWeight::from_gptq: `scales` is one for 16 rows, wanted one for 32, 64, a multiple of 128, or all rows; {ANEW}";
        load(&w, &z, &on.u32([2, 24])) => DType, "QuantWeight::from_gptq: `scales` is u32, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        load(&w, &z, &nan) => Value, "QuantWeight::from_gptq: `scales` is NaN at element 0, wanted finite numbers; check the file that it comes from";
        load(&w, &threes, &s) => Value, "QuantWeight::from_gptq: `qzeros` is such that the mean of codes less zero points is -4.00 as v1 and -3.00 as v2, wanted about 0 with one of them, as with a layer's weights; see `checkpoint_format` in the file's configuration, and take `from_gptq_with`";
        by((0..120).map(|i| i / 64).collect()) => Dimension, "QuantWeight::from_gptq: `qweight` has rows = 16, wanted 15, K/8 for the K = 120 of `g_idx`; {BITS4}";
        by((0..128).map(outside).collect()) => Value, "QuantWeight::from_gptq: `g_idx` is 5 at row 100, wanted a row of `scales`, of which there are 2; {LAYER}";
        by((0..128).map(|i| i / 64 - 1).collect()) => Value, "QuantWeight::from_gptq: `g_idx` is -1 at row 0, wanted a row of `scales`, of which there are 2; {LAYER}";
        by((0..128).map(|i| i / 96).collect()) => Value, "QuantWeight::from_gptq: `scales` is one for 96 rows, wanted one for 32, 64, a multiple of 128, or all rows; {ANEW}";
        by((0..128).map(|i| i64::from(i > 40)).collect()) => Value, "QuantWeight::from_gptq: `g_idx` is 1 in 87 rows, and 0 in 41, wanted groups of the same number of rows, but for the last; join the parts of a layer that was split before it is loaded";
    }
    tally.finish();
}

pub fn awq(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of AWQ's tensors", device);
    let (w, z, s) = (on.u32([128, 3]), on.u32([2, 3]), on.f16([2, 24]));
    let load = QuantWeight::from_awq;
    refused! { tally;
        load(&on.f32([128, 3]), &z, &s) => DType, "QuantWeight::from_awq: `qweight` is f32, wanted i32 or u32; {READ}";
        load(&on.u32([1, 128, 3]), &z, &s) => Rank, "QuantWeight::from_awq: `qweight` has shape [1, 128, 3] (rank 3), wanted [K, N/8]; {GEMM}";
        load(&w, &z, &on.f16([2, 3])) => Dimension, "QuantWeight::from_awq: `scales` has N = 3, wanted 24, eight for each word of `qweight`; {GEMM}";
        load(&w, &on.u32([3, 3]), &s) => Dimension, "QuantWeight::from_awq: `qzeros` has groups = 3, wanted 2, those of `scales`; {GEMM}";
        load(&w, &on.u32([2, 4]), &s) => Dimension, "QuantWeight::from_awq: `qzeros` has columns = 4, wanted 3, the columns of `qweight`; {GEMM}";
        load(&w, &on.u32([0, 3]), &on.f16([0, 24])) => Dimension, "QuantWeight::from_awq: `scales` has groups = 0, wanted the groups of 32, 64, a multiple of 128, or all of the 128 rows; {LAYER}";
    }
    tally.finish();
}

pub fn compressed_tensors(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of compressed-tensors' tensors", device);
    let (w, s, z) = (on.u32([24, 16]), on.bf16([24, 2]), on.u32([3, 2]));
    let shape = |dims: &[i64]| Tensor::new(dims, device).expect("a shape");
    let right = shape(&[24, 128]);
    let load = |w: &Tensor, s: &Tensor, shape: &Tensor, z: &Tensor| {
        QuantWeight::from_compressed_tensors(w, s, shape, Some(z), None)
    };
    let by = |len: i64| {
        let g_idx = Tensor::arange(0, len, device).expect("indices");
        QuantWeight::from_compressed_tensors(&w, &s, &right, None, Some(&g_idx))
    };
    let wrong = "N = 24 and a K of 16 words of eight, as of `weight_packed`";
    refused! { tally;
        load(&on.f32([24, 16]), &s, &right, &z) => DType, "QuantWeight::from_compressed_tensors: `weight_packed` is f32, wanted i32 or u32; {READ}";
        load(&on.u32([24]), &s, &right, &z) => Rank, "QuantWeight::from_compressed_tensors: `weight_packed` has shape [24] (rank 1), wanted [N, K/8]; {BITS4}";
        load(&w, &on.bf16([24]), &right, &z) => Rank, "QuantWeight::from_compressed_tensors: `weight_scale` has shape [24] (rank 1), wanted [N, groups]; {BITS4}";
        load(&w, &on.bf16([23, 2]), &right, &z) => Dimension, "QuantWeight::from_compressed_tensors: `weight_scale` has N = 23, wanted 24, the N of `weight_packed`; {BITS4}";
        load(&w, &s, &on.f32([2]), &z) => DType, "QuantWeight::from_compressed_tensors: `weight_shape` is f32, wanted i32, u32 or i64; {READ}";
        load(&w, &s, &shape(&[24, 129]), &z) => Value, "QuantWeight::from_compressed_tensors: `weight_shape` is [24, 129], wanted {wrong}; {BITS4}";
        load(&w, &s, &shape(&[23, 128]), &z) => Value, "QuantWeight::from_compressed_tensors: `weight_shape` is [23, 128], wanted {wrong}; {BITS4}";
        load(&w, &s, &shape(&[24, -128]), &z) => Value, "QuantWeight::from_compressed_tensors: `weight_shape` is [24, -128], wanted {wrong}; {BITS4}";
        load(&w, &s, &shape(&[24]), &z) => Value, "QuantWeight::from_compressed_tensors: `weight_shape` is [24], wanted {wrong}; {BITS4}";
        load(&w, &s, &right, &on.u32([24, 2])) => Dimension, "QuantWeight::from_compressed_tensors: `weight_zero_point` has rows = 24, wanted 3, N/8 for the N = 24 of `weight_packed`; {BITS4}";
        load(&w, &s, &right, &on.u32([3, 1])) => Dimension, "QuantWeight::from_compressed_tensors: `weight_zero_point` has groups = 1, wanted 2, those of `weight_scale`; {BITS4}";
        load(&w, &on.u32([24, 2]), &right, &z) => DType, "QuantWeight::from_compressed_tensors: `weight_scale` is u32, wanted f16, bf16 or f32; cast it with `.to_dtype(DType::F32)?`";
        load(&w, &with_nan(&s, 3), &right, &z) => Value, "QuantWeight::from_compressed_tensors: `weight_scale` is NaN at element 3, wanted finite numbers; check the file that it comes from";
        by(64) => Dimension, "QuantWeight::from_compressed_tensors: `weight_g_idx` has K = 64, wanted 128, the K of `weight_shape`; {BITS4}";
        by(128) => Value, "QuantWeight::from_compressed_tensors: `weight_g_idx` is 2 at row 2, wanted a row of `weight_scale`, of which there are 2; {LAYER}";
    }
    tally.finish();
}

pub fn nf4(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of nf4's tensors", device);
    let json = |shape: &str, block: usize, more: &str| {
        let json =
            format!(r#"{{"quant_type": "nf4", "blocksize": {block}, "shape": {shape}{more}}}"#);
        Tensor::new(json.into_bytes(), device).expect("bytes")
    };
    let (w, absmax) = (on.u8([384, 1]), on.f32([12]));
    let state = json("[6, 128]", 64, "");
    let load =
        |w: &Tensor, absmax: &Tensor, state: &Tensor| QuantWeight::from_nf4(w, absmax, state, None);
    let with = r#", "nested_blocksize": 256, "nested_offset": 0.5"#;
    let nested = |with: &str, codes: &Tensor, absmax: usize, map: &Tensor| {
        let state = json("[6, 128]", 64, with);
        QuantWeight::from_nf4(&w, codes, &state, Some((&on.f32([absmax]), map)))
    };
    let (codes, map) = (on.u8([12]), on.f32([256]));
    let file = "take the tensor `weight.quant_state.bitsandbytes__nf4` as it is in the file";
    let infinite = (map.ones_like().expect("ones") / 0.0).expect("infinity");
    refused! { tally;
        load(&on.f16([384, 1]), &absmax, &state) => DType, "QuantWeight::from_nf4: `weight` is f16, wanted u8; {READ}";
        load(&w, &on.f16([12]), &state) => DType, "QuantWeight::from_nf4: `absmax` is f16, wanted f32; {READ}";
        load(&w, &codes, &state) => DType, "QuantWeight::from_nf4: `absmax` is u8, wanted f32; {READ}";
        load(&w, &absmax, &on.f32([9])) => DType, "QuantWeight::from_nf4: `quant_state` is f32, wanted u8; {READ}";
        load(&w, &absmax, &on.u8([0])) => Value, "QuantWeight::from_nf4: `quant_state` is no JSON object (EOF while parsing a value at line 1 column 0), wanted one; {file}";
        load(&w, &absmax, &json("[6]", 64, "")) => Value, "QuantWeight::from_nf4: `quant_state` is of `shape` [6], wanted [N, K]; {file}";
        load(&w, &absmax, &json("[8, 96]", 64, "")) => Value, "QuantWeight::from_nf4: `quant_state` is of `shape` [8,96], wanted blocks of 64 within rows: a multiple of it as K; {file}";
        load(&w, &on.f32([48]), &json("[6, 128]", 16, "")) => Value, "QuantWeight::from_nf4: `absmax` is one for 16 rows, wanted one for 32, 64, a multiple of 128, or all rows; {ANEW}";
        load(&on.u8([383, 1]), &absmax, &state) => Dimension, "QuantWeight::from_nf4: `weight` has bytes = 383, wanted 384, two of the 6 × 128 of `quant_state` in each; {ONE}";
        load(&w, &on.f32([11]), &state) => Dimension, "QuantWeight::from_nf4: `absmax` has elements = 11, wanted 12, one for 64 of the 6 × 128 of `quant_state`; {ONE}";
        nested("", &codes, 1, &map) => Conflict, "QuantWeight::from_nf4: `nested` and `quant_state` exclude each other; the latter says nothing of nested scales: {ONE}";
        nested(with, &on.f32([12]), 1, &map) => DType, "QuantWeight::from_nf4: `absmax` is f32, wanted u8; {READ}";
        nested(with, &codes, 2, &map) => Dimension, "QuantWeight::from_nf4: `nested_absmax` has elements = 2, wanted 1, one for 256 of `absmax`; {ONE}";
        nested(with, &codes, 1, &on.f32([255])) => Dimension, "QuantWeight::from_nf4: `nested_quant_map` has elements = 255, wanted 256, one for each code of `absmax`; {ONE}";
        load(&w, &codes, &json("[6, 128]", 64, with)) => Value, "QuantWeight::from_nf4: `nested` is missing, wanted the scales of `absmax`, which `quant_state` says is quantised itself; take `weight.nested_absmax` and `weight.nested_quant_map` as well";
        load(&w, &with_nan(&absmax, 3), &state) => Value, "QuantWeight::from_nf4: `absmax` is NaN at element 3, wanted finite numbers; check the file that it comes from";
        nested(with, &codes, 1, &infinite) => Value, "QuantWeight::from_nf4: `absmax` is NaN at element 0, wanted finite numbers; check the file that it comes from";
    }
    tally.finish();
}

pub fn checkpoints(device: &Device) {
    let on = On(device);
    let mut tally = Tally::new("errors of checkpoints", device);
    let layer = |tensors: &[(&str, Tensor)]| {
        let tensors = tensors.iter().map(|(name, t)| (format!("up.{name}"), t.clone()));
        QuantWeight::from_checkpoint(&tensors.collect::<HashMap<_, _>>(), "up")
    };
    let names = "look at the names in the checkpoint; a prefix ends before `.weight` or `.qweight`";
    let formats = "one with `weight_packed`, `qweight`, `weight.quant_state.bitsandbytes__nf4`, `format`, or `weight` in f8e4m3";
    let more = "a layer whose format has one tensor more than the checkpoint";
    let state = ("weight.quant_state.bitsandbytes__nf4", on.u8([9]));
    let (weight, absmax) = (("weight", on.u8([384])), ("weight.absmax", on.u8([12])));
    let e4m3 = Tensor::zeros((4, 4), F32, &Device::Cpu).and_then(|t| t.to_dtype(DType::F8E4M3));
    let e4m3 = e4m3.and_then(|t| t.to_device(device)).expect("e4m3");
    refused! { tally;
        layer(&[]) => Value, "QuantWeight::from_checkpoint: `prefix` is `up`, which is no layer of a known format, wanted {formats}; {names}";
        layer(&[("weight", on.f16([4, 4]))]) => Value, "QuantWeight::from_checkpoint: `prefix` is `up`, which is no layer of a known format, wanted {formats}; {names}";
        layer(&[("weight", e4m3.clone())]) => Value, "QuantWeight::from_checkpoint: `prefix` is {more}, wanted also `up.weight_scale`; {names}";
        layer(&[("qweight", on.u32([16, 24]))]) => Value, "QuantWeight::from_checkpoint: `prefix` is {more}, wanted also `up.qzeros`; {names}";
        layer(&[("weight_packed", on.u32([24, 16]))]) => Value, "QuantWeight::from_checkpoint: `prefix` is {more}, wanted also `up.weight_scale`; {names}";
        layer(&[state.clone(), weight.clone()]) => Value, "QuantWeight::from_checkpoint: `prefix` is {more}, wanted also `up.weight.absmax`; {names}";
        layer(&[state.clone(), weight.clone(), absmax.clone(), ("weight.nested_absmax", on.f32([1]))]) => Value, "QuantWeight::from_checkpoint: `prefix` is {more}, wanted also `up.weight.nested_quant_map`; {names}";
        layer(&[state.clone(), weight.clone(), absmax.clone(), ("weight.quant_map", on.f32([2]))]) => Value, "QuantWeight::from_checkpoint: `prefix` is a layer whose `up.weight.quant_map` is [0.0, 0.0], wanted the values of nf4; {names}";
        layer(&[weight.clone(), ("weight.quant_state.bitsandbytes__fp4", on.u8([9]))]) => Unsupported, "QuantWeight::from_checkpoint: this crate cannot multiply with bitsandbytes' fp4 (`up.weight.quant_state.bitsandbytes__fp4`); quantise the weight to nf4";
        layer(&[("weight", e4m3), ("weight_scale_inv", on.f32([2, 2]))]) => Value, "QuantWeight::from_fp8: `scales` is of shape [2, 2], wanted one element, [N], [1, N] or [K/128, N/128] rounded up, of `codes` [4, 4]; reshape it";
    }
    tally.finish();
}
