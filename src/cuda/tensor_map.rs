//! Descriptors for the copy engine (TMA).
#![allow(unsafe_code)]

use std::ffi::c_void;
use std::mem::MaybeUninit;

use cudarc::driver::sys::{
    self, CUtensorMapDataType as Type, CUtensorMapFloatOOBfill, CUtensorMapInterleave,
    CUtensorMapL2promotion, CUtensorMapSwizzle,
};

use crate::error::{Error, Result};
use crate::kernel::{Element, params};
use crate::ptx::Half;

/// How a tensor of up to five dimensions lies in memory, and the box that one transfer moves, whose
/// lines are swizzled over 128 bytes of shared memory. For GPUs of compute capability 9.0 and later.
#[derive(Clone, Copy, Debug)]
pub struct TensorMap(sys::CUtensorMap);

/// The most dimensions.
const RANK: usize = 5;

impl TensorMap {
    /// `dims` and `boxed` in elements, innermost first; `strides` in bytes, of all dimensions but the
    /// innermost, multiples of 16; `address` a multiple of 16. A box is at most 128 bytes wide and 256
    /// elements in other dimensions. What a box shows outside the tensor is zero.
    ///
    /// It takes no memory and no time on the GPU: make one for each launch.
    ///
    /// # Errors
    ///
    /// [`Error::Value`] for the numbers, if there are not as many as dimensions or if the driver
    /// refuses them.
    pub fn new(
        element: Element,
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
        let kind = match element {
            Element::F32 => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            Element::Half(Half::F16) => Type::CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
            Element::Half(Half::Bf16) => Type::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
        };
        let ones = [1u32; RANK];
        let mut map = MaybeUninit::uninit();
        // SAFETY: the arrays have as many entries as the rank says; the driver only reads them, and
        // writes the map if it reports success.
        let result = unsafe {
            sys::cuTensorMapEncodeTiled(
                map.as_mut_ptr(),
                kind,
                rank as u32, // at most RANK
                address as *mut c_void,
                dims.as_ptr(),
                strides.as_ptr(),
                boxed.as_ptr(),
                ones.as_ptr(),
                CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                // H200, 2026-11-23, weights from memory: 256 B is 4 % slower (248 against 239 µs for
                // 128256×4096 at M = 1), none and 64 B are the same.
                CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        result.result().map_err(|e| refuse(format!("what the driver takes ({e})")))?;
        // SAFETY: the driver reported success.
        Ok(Self(unsafe { map.assume_init() }))
    }

    /// As a kernel of this crate wants it.
    pub(super) fn of(map: &params::TensorMap) -> Result<Self> {
        Self::new(map.element, map.address, map.dims(), map.strides(), map.boxed())
    }

    pub(super) fn raw(self) -> sys::CUtensorMap {
        self.0
    }
}
