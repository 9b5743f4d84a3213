//! The wording and the types of errors on the CPU.

mod common;

use candle_core::Device::Cpu;

/// A test for each suite.
macro_rules! on_cpu {
    ($($suite:ident)*) => {$(
        #[test]
        fn $suite() {
            common::errors::$suite(&Cpu);
        }
    )*};
}

on_cpu! { matmul int8 int4 qkv attention_tc flash_attn tracked layers }

#[test]
fn devices() {
    common::errors::devices(&Cpu, &[]);
}
