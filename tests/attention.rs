//! Attention on the CPU.

mod common;

use candle_core::Device::Cpu;

common::tests_on! {
    Cpu, attention: sizes empty layouts upstream scales random specials all_minus_infinity finite_differences attention_tc
}
