//! Attention on the CPU.

mod common;
#[path = "common/attention.rs"]
mod suites;

use candle_core::Device::Cpu;

/// A test for each suite.
macro_rules! on_cpu {
    ($($suite:ident)*) => {$(
        #[test]
        fn $suite() {
            suites::$suite(&Cpu);
        }
    )*};
}

on_cpu! {
    sizes empty layouts upstream scales random specials all_minus_infinity finite_differences attention_tc
}
