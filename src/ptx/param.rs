//! Parameters of a kernel.

use super::Scalar;

/// Bytes of a TMA descriptor (`CUtensorMap`).
pub const TENSOR_MAP_BYTES: usize = 128;

/// A parameter of a kernel.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Param {
    /// Its name in the text.
    pub name: String,
    /// What a launch passes.
    pub kind: ParamKind,
}

/// What a launch passes for a parameter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ParamKind {
    /// A number, of a type as PTX names it by its bits (`b32`, `f32`), and its bytes.
    Value(&'static str, usize),
    /// An address in global memory.
    Pointer,
    /// A TMA descriptor.
    TensorMap,
}

impl ParamKind {
    /// A number of a type.
    pub fn value<T: Scalar>() -> Self {
        Self::Value(T::BITS, T::SIZE)
    }

    /// Bytes.
    pub fn size(self) -> usize {
        match self {
            Self::Value(_, size) => size,
            Self::Pointer => size_of::<u64>(),
            Self::TensorMap => TENSOR_MAP_BYTES,
        }
    }
}
