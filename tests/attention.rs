//! Attention on the CPU.

mod common;

use candle_core::Device::Cpu;

/// A test for each suite.
macro_rules! on_cpu {
    ($($suite:ident)*) => {$(
        #[test]
        fn $suite() {
            common::attention::$suite(&Cpu);
        }
    )*};
}

on_cpu! {
    sizes empty layouts upstream scales random specials all_minus_infinity finite_differences attention_tc
}
