//! Products with int8 and int4 on the CPU, and the helpers that make their weights.

mod common;

use candle_core::Device::Cpu;

common::tests_on! {
    Cpu, quantized:
    int8 int8_random int4 qkv_int8 qkv_int4 quantize_int8 quantize_int4 pack_int4
}
