//! Attention on the CPU.

mod common;

use candle_core::Device::Cpu;

common::tests_on! {
    Cpu, attention: sizes empty layouts upstream scales random specials all_minus_infinity finite_differences attention_tc
        options windows biases lengths large_logits option_layouts isolation option_differences random_options
        log_sum_exp shared_graph every_kind accuracy
}
