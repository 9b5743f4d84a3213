//! Descriptors for TMA.

use cudarc::driver::sys::{self, CUtensorMapDataType as Type, CUtensorMapSwizzle as Swizzle};

use super::raw;
use crate::error::{Error, Result};
use crate::kernel::params::{self, RANK};
use crate::kernel::{Copied, Element};
use crate::ptx::Half;

/// How a tensor of up to five dimensions lies in memory, and the box that one transfer moves, whose
/// lines are swizzled over 64 or 128 bytes of shared memory, as many as they have. For GPUs of compute capability 9.0 and later.
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(sys::CUtensorMap);

impl TensorMap {
    /// `dims` and `boxed` in elements, innermost first; `strides` in bytes, of all dimensions but the
    /// innermost, multiples of 16; `address` a multiple of 16. A box is at most 128 bytes wide (up to 64 are swizzled over
    /// as many) and 256
    /// elements in other dimensions. What a box shows outside the tensor is zero.
    ///
    /// It takes no memory and no time on the GPU: make one for each launch.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] for the numbers, if there are not as many as dimensions or if the driver
    /// refuses them.
    pub fn new(
        element: impl Into<Copied>,
        address: u64,
        dims: &[u64],
        strides: &[u64],
        boxed: &[u32],
    ) -> Result<Self> {
        let refuse = |want: String| Error::Value {
            op: "TensorMap::new",
            name: "dims",
            got: format!("{dims:?} with strides {strides:?} and boxes {boxed:?} at {address:#x}"),
            want,
            fix: "see the rules at `TensorMap::new`",
        };
        let rank = dims.len();
        if !(1..=RANK).contains(&rank) || strides.len() + 1 != rank || boxed.len() != rank {
            return Err(refuse(format!("1 to {RANK} dimensions, as many boxes, a stride less")));
        }
        let element = element.into();
        let kind_size = element.size();
        let kind = match element {
            Copied::Float(Element::F32) => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Copied::Float(Element::Half(Half::F16)) => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Copied::Float(Element::Half(Half::Bf16)) => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            Copied::Byte => Type::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let swizzle = match boxed[0] * kind_size {
            ..=64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
        };
        raw::tensor_map(kind, swizzle, address, dims, strides, boxed)
            .map(Self)
            .map_err(|e| refuse(format!("what the driver takes ({e})")))
    }

    /// As a kernel of this crate wants it.
    pub(in crate::cuda) fn of(map: &params::TensorMap) -> Result<Self> {
        Self::new(map.element, map.address, map.dims(), map.strides(), map.boxed())
    }

    pub(super) fn raw(self) -> sys::CUtensorMap {
        self.0
    }
}
