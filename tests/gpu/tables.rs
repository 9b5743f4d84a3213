//! The tables of the CPU suites on the first GPU.

use super::common::{attention, epilogue, errors, matmul, quantized};
use super::{gpu, second_gpu};
use candle_core::Device;

macro_rules! tables {
    ($($name:ident: $suite:path;)*) => {$(
        #[test]
        fn $name() {
            if let Some(device) = gpu() {
                $suite(&device);
            }
        }
    )*};
}

tables! {
    matmul_sizes: matmul::sizes;
    matmul_empty: matmul::empty;
    matmul_layouts: matmul::layouts;
    matmul_specials: matmul::specials;
    matmul_random: matmul::random;
    matmul_gradients: matmul::gradients;
    matmul_scaled_gradients: matmul::scaled_gradients;
    matmul_training: matmul::training;
    matmul_biases: epilogue::biases;
    matmul_activations: epilogue::activations;
    matmul_activated_specials: epilogue::activated_specials;
    matmul_epilogue_gradients: epilogue::epilogue_gradients;
    int8: quantized::int8;
    int8_random: quantized::int8_random;
    int4: quantized::int4;
    qkv_int8: quantized::qkv_int8;
    qkv_int4: quantized::qkv_int4;
    quantize_int8: quantized::quantize_int8;
    quantize_int4: quantized::quantize_int4;
    pack_int4: quantized::pack_int4;
    attention_sizes: attention::sizes;
    attention_empty: attention::empty;
    attention_layouts: attention::layouts;
    attention_upstream: attention::upstream;
    attention_scales: attention::scales;
    attention_random: attention::random;
    attention_specials: attention::specials;
    attention_finite_differences: attention::finite_differences;
    attention_tc: attention::attention_tc;
    attention_options: attention::options;
    attention_windows: attention::windows;
    attention_biases: attention::biases;
    attention_lengths: attention::lengths;
    attention_large_logits: attention::large_logits;
    attention_option_layouts: attention::option_layouts;
    attention_isolation: attention::isolation;
    attention_option_differences: attention::option_differences;
    attention_random_options: attention::random_options;
    attention_log_sum_exp: attention::log_sum_exp;
    attention_shared_graph: attention::shared_graph;
    attention_kinds: attention::every_kind;
    attention_many_tiles: attention::many_tiles;
    attention_accuracy: attention::accuracy;
    errors_matmul: errors::matmul;
    errors_int8: errors::int8;
    errors_int4: errors::int4;
    errors_qkv: errors::qkv;
    errors_attention_tc: errors::attention_tc;
    errors_flash_attn: errors::flash_attn;
    errors_flash_options: errors::flash_options;
    errors_tracked: errors::tracked;
    errors_layers: errors::layers;
}

#[test]
fn errors_devices() {
    let Some(device) = gpu() else { return };
    let others: Vec<_> = [Some(Device::Cpu), second_gpu()].into_iter().flatten().collect();
    errors::devices(&device, &others);
}

/// A head dimension that no kaio-ops kernel takes: the error names the engine and its limit.
#[test]
fn head_dimension_limit() {
    use candle_core::{DType, Tensor};
    use kaio_candle::{Error, prelude::*};
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
    use candle_core::{DType, Tensor};
    use kaio_candle::{Error, prelude::*};
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
