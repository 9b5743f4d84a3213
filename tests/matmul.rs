//! f16 and bf16 products on the CPU; the tables are in `common/matmul.rs`.

mod common;

use candle_core::Device;

/// One test for each suite.
macro_rules! suites {
    ($($suite:ident)*) => {$(
        #[test]
        fn $suite() {
            common::matmul::$suite(&Device::Cpu);
        }
    )*};
}

suites! { sizes empty layouts specials random gradients scaled_gradients training }
