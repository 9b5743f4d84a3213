//! The list of suites, as tests on the device of the binary that they are compiled into.

use crate::suites::{
    add, attention, cross_entropy, differences, embedding, empty, errors, glu,
    linear_cross_entropy, loaders, matmul, norm, quantized, rope, softmax, train, weights,
};

macro_rules! tables {
    ($($name:ident: $suite:path;)*) => {$(
        #[test]
        fn $name() {
            if let Some(device) = crate::device() {
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
    matmul_biases: matmul::biases;
    matmul_activations: matmul::activations;
    matmul_activated_specials: matmul::activated_specials;
    matmul_epilogue_gradients: matmul::epilogue_gradients;
    matmul_activation_kinds: matmul::activation_kinds;
    matmul_compute_dtypes: matmul::computed;
    matmul_kinds: matmul::kinds;
    matmul_random_products: matmul::random_products;
    add: add::add;
    glu: glu::glu;
    rope: rope::rope;
    softmax: softmax::softmax;
    norm: norm::norm;
    norm_long_rows: norm::long_rows;
    cross_entropy: cross_entropy::values;
    embedding: embedding::values;
    linear_cross_entropy: linear_cross_entropy::values;
    cross_entropy_specials: cross_entropy::specials;
    int8: quantized::int8;
    int8_random: quantized::int8_random;
    int4: quantized::int4;
    qkv_int8: quantized::qkv_int8;
    qkv_int4: quantized::qkv_int4;
    quantize_int8: quantized::quantize_int8;
    quantize_int4: quantized::quantize_int4;
    pack_int4: quantized::pack_int4;
    loaders_packages: loaders::packages;
    loaders_bytes: loaders::bytes;
    loaders_gptq_formats: loaders::gptq_formats;
    loaders_small: loaders::small;
    loaders_mapped_files: loaders::mapped_files;
    loaders_damaged: loaders::damaged;
    weights_products: weights::products;
    weights_extreme_scales: weights::extreme_scales;
    weights_deterministic: weights::deterministic;
    weights_dequantized: weights::dequantized;
    weights_projections: weights::projections;
    weights_explained: weights::explained;
    weights_gradients: weights::gradients;
    weights_activations: weights::activations;
    weights_int8: weights::int8;
    weights_fp8: weights::fp8;
    weights_quantisers: weights::quantisers;
    weights_random: weights::random;
    weights_refusals: weights::refusals;
    weights_files: weights::files;
    weights_bad_files: weights::bad_files;
    differences: differences::ops;
    train_checkpoint: train::checkpoint;
    train_block: train::block;
    attention_sizes: attention::sizes;
    attention_empty: attention::empty;
    attention_layouts: attention::layouts;
    attention_upstream: attention::upstream;
    attention_upstream_views: attention::upstream_views;
    attention_scales: attention::scales;
    attention_random: attention::random;
    attention_specials: attention::specials;
    attention_all_minus_infinity: attention::all_minus_infinity;
    attention_finite_differences: attention::finite_differences;
    attention_tc: attention::attention_tc;
    attention_engines: attention::engines;
    attention_options: attention::options;
    attention_softcap: attention::softcap;
    attention_alibi: attention::alibi;
    attention_windows: attention::windows;
    attention_biases: attention::biases;
    attention_lengths: attention::lengths;
    attention_large_logits: attention::large_logits;
    attention_option_layouts: attention::option_layouts;
    attention_isolation: attention::isolation;
    attention_option_differences: attention::option_differences;
    attention_random_options: attention::random_options;
    attention_log_sum_exp: attention::log_sum_exp;
    attention_log_sum_exp_gradients: attention::log_sum_exp_gradients;
    attention_random_log_sum_exp_gradients: attention::random_log_sum_exp_gradients;
    attention_stand_ins: attention::stand_ins;
    attention_shared_graph: attention::shared_graph;
    attention_kinds: attention::kinds;
    attention_gradient_kinds: attention::gradient_kinds;
    attention_many_tiles: attention::many_tiles;
    attention_gradients_of_many_tiles: attention::gradients_of_many_tiles;
    attention_accuracy: attention::accuracy;
    train_adamw_formula: train::formula;
    train_adamw_beside_torch: train::beside_torch;
    train_adamw_options: train::options;
    train_adamw_sixteen_bits: train::sixteen_bits;
    train_adamw_layouts: train::layouts;
    train_adamw_accumulation: train::accumulation;
    train_adamw_moments_in_8_bits: train::moments_in_8_bits;
    train_adamw_clipped: train::clipped_steps;
    train_adamw_resume: train::resume;
    train_adamw_bytes: train::kept_bytes;
    train_clip: train::clip;
    empty_products: empty::products;
    empty_norms: empty::norms;
    empty_attention: empty::attention;
    empty_quantisers: empty::quantisers;
    errors_matmul: errors::matmul;
    errors_add: errors::add;
    errors_glu: errors::glu;
    errors_norm: errors::norm;
    errors_rope: errors::rope;
    errors_losses: errors::losses;
    errors_int8: errors::int8;
    errors_int4: errors::int4;
    errors_qkv: errors::qkv;
    errors_weights: errors::weights;
    errors_attention_tc: errors::attention_tc;
    errors_flash_attn: errors::flash_attn;
    errors_flash_options: errors::flash_options;
    errors_gptq: errors::gptq;
    errors_awq: errors::awq;
    errors_compressed_tensors: errors::compressed_tensors;
    errors_nf4: errors::nf4;
    errors_checkpoints: errors::checkpoints;
    errors_sizes: errors::sizes;
    errors_tracked: errors::tracked;
    errors_train: errors::train;
    errors_variants: errors::variants;
    errors_layers: errors::layers;
    errors_devices: errors::devices;
}
