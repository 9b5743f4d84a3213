//! Products with quantised weights, projections, quantisers on the CPU; the tables are in `common/quantized.rs`.

mod common;

use candle_core::Device;

/// One test for each suite.
macro_rules! suites {
    ($($suite:ident)*) => {$(
        #[test]
        fn $suite() {
            common::quantized::$suite(&Device::Cpu);
        }
    )*};
}

suites! {
    int8 int8_random int4 qkv_int8 qkv_int4 quantize_int8 quantize_int4 pack_int4
}
