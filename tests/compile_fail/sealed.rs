use candle_core::{Result, Tensor};
use kaio_candle::prelude::*;

struct Mine;

macro_rules! stubs {
    ($($name:ident($($arg:ty),*) -> $result:ty;)*) => {
        $(fn $name(&self, $(_: $arg),*) -> Result<$result> { todo!() })*
    };
}

impl KaioTensorExt for Mine {
    stubs! {
        kaio_matmul_tc(&Tensor) -> Tensor;
        kaio_matmul_tc_async(&Tensor) -> Tensor;
        kaio_matmul_with(&Tensor, &MatmulOptions) -> Tensor;
        kaio_matmul_int8(&Tensor, f32) -> Tensor;
        kaio_matmul_int4(&Tensor, &Tensor) -> Tensor;
        kaio_matmul_quant(&QuantWeight) -> Tensor;
        kaio_matmul_quant_with(&QuantWeight, &MatmulOptions) -> Tensor;
        kaio_qkv_project([&QuantWeight; 3]) -> (Tensor, Tensor, Tensor);
        kaio_swiglu_project(&QuantWeight, &QuantWeight) -> Tensor;
        kaio_matmul_int8_with(&Tensor, &Int8Options) -> Tensor;
        kaio_matmul_fp8(&Tensor, &Fp8Options) -> Tensor;
        kaio_attention_tc(&Tensor, &Tensor, bool) -> Tensor;
        kaio_flash_attn(&Tensor, &Tensor, bool) -> Tensor;
        kaio_flash_attn_with(&Tensor, &Tensor, &FlashAttnOptions) -> Tensor;
        kaio_flash_attn_with_lse(&Tensor, &Tensor, &FlashAttnOptions) -> (Tensor, Tensor);
        kaio_qkv_project_int8([&Tensor; 3], [f32; 3]) -> (Tensor, Tensor, Tensor);
        kaio_qkv_project_int4([&Tensor; 3], [&Tensor; 3]) -> (Tensor, Tensor, Tensor);
        kaio_swiglu(&Tensor) -> Tensor;
        kaio_geglu(&Tensor) -> Tensor;
        kaio_add(&Tensor) -> Tensor;
        kaio_rms_norm(&Tensor, f32) -> Tensor;
        kaio_layer_norm(&Tensor, Option<&Tensor>, f32) -> Tensor;
        kaio_add_rms_norm(&Tensor, &Tensor, f32) -> (Tensor, Tensor);
        kaio_add_layer_norm(&Tensor, &Tensor, Option<&Tensor>, f32) -> (Tensor, Tensor);
        kaio_rope(&Tensor, &Tensor, RopeLayout) -> Tensor;
        kaio_softmax() -> Tensor;
        kaio_cross_entropy(&Tensor, &CrossEntropyOptions) -> Tensor;
        kaio_linear_cross_entropy(&Tensor, &Tensor, &CrossEntropyOptions) -> Tensor;
        kaio_embedding(&Tensor) -> Tensor;
    }
}

fn main() {}
