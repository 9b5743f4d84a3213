//! The wording and the types of errors on the CPU.

mod common;

use candle_core::Device::Cpu;

common::tests_on! {
    Cpu, errors: matmul int8 int4 qkv attention_tc flash_attn flash_options tracked layers
}

#[test]
fn devices() {
    common::errors::devices(&Cpu, &[]);
}
