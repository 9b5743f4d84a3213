//! Products of f16 and bf16 on the CPU.

mod common;

use candle_core::Device::Cpu;

common::tests_on! {
    Cpu, matmul: sizes empty layouts specials random gradients scaled_gradients training
}

common::tests_on! {
    Cpu, epilogue: biases activations activated_specials epilogue_gradients
}
