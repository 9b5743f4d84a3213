//! The engine in a build without the feature `cuda`. No CUDA tensor exists there, so that none of
//! these functions is ever reached.

use candle_core::{CudaStorage, Error, Result};

use super::Operand;
use crate::Engine;
use crate::op::{AttentionInputs, AttentionProblem, Epilogue, MatmulProblem, View};

/// Defines functions with the engine's signatures that report the missing feature.
macro_rules! absent {
    ($(fn $name:ident($($arg:ty),*) -> $result:ty;)*) => {$(
        #[allow(clippy::too_many_arguments)] // As many as the engine's.
        pub(crate) fn $name($(_: $arg),*) -> Result<$result> {
            Err(Error::NotCompiledWithCudaSupport)
        }
    )*};
}

type Name = &'static str;

absent! {
    fn matmul(
        Name, &MatmulProblem, Engine, Epilogue,
        &CudaStorage, &CudaStorage, Option<View<CudaStorage>>
    ) -> CudaStorage;
    fn matmul_int8(Name, Operand, Operand, f32) -> CudaStorage;
    fn matmul_int4(Name, Operand, Operand, Operand) -> CudaStorage;
    fn qkv_int8(Name, Operand, &[Operand], [f32; 3]) -> [CudaStorage; 3];
    fn qkv_int4(Name, Operand, &[Operand], &[Operand]) -> [CudaStorage; 3];
    fn attention_tc(Name, &AttentionProblem, [&CudaStorage; 3]) -> CudaStorage;
    fn flash_attn(
        Name, &AttentionProblem, Engine, bool, &AttentionInputs<CudaStorage>
    ) -> (CudaStorage, Option<CudaStorage>);
}

/// No weight, of any width.
pub(crate) fn takes_int4(_: usize) -> bool {
    false
}
