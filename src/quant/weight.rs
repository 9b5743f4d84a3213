//! A quantised weight as users hold it.

use std::fmt;
use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::planes::Planes;
use super::scheme::{Per, QuantScheme};
use crate::check;

/// A weight `[K, N]` in quantised form.
///
/// A clone shares the tensors of the original. `Debug` shows sizes and the scheme, no data.
#[derive(Clone)]
pub struct QuantWeight(Arc<Planes>);

impl QuantWeight {
    /// A weight of tensors that are checked here: what every constructor ends in.
    pub(crate) fn from_planes(op: &'static str, planes: Planes) -> Result<Self> {
        let planes = Planes::new(op, planes)?;
        planes.check_values(op)?;
        Ok(Self(Arc::new(planes)))
    }

    /// From floats of eight bits (e4m3) with scales: of one element, for all; `[N]` or `[1, N]`, for each column; or
    /// `[⌈K/128⌉, ⌈N/128⌉]`, for each block of 128 × 128 (DeepSeek-V3).
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `codes` | `[K, N]` | f8e4m3 |
    /// | `scales` | see above | f32, f16 or bf16 |
    ///
    /// # Errors
    ///
    /// Another dtype or shape, a tracked input, a scale that is infinite or NaN.
    pub fn from_fp8(codes: &Tensor, scales: &Tensor) -> Result<Self> {
        const OP: &str = "from_fp8";
        check::rank(OP, ("codes", codes), 2..=2, "[K, N]", "a weight is one matrix")?;
        let (k, n) = codes.dims2()?;
        let per = match *scales.dims() {
            _ if scales.elem_count() == 1 => Per::Tensor,
            [len] | [1, len] if len == n => Per::Channel,
            _ => Per::Block,
        };
        let scales = match per {
            Per::Tensor => scales.reshape((1, 1))?,
            Per::Channel => scales.reshape((1, n))?,
            Per::Block => scales.clone(),
        };
        let (scheme, codes) = (QuantScheme::Fp8 { per }, codes.clone());
        let planes = Planes { scheme, dims: [k, n], codes, scales, zeros: None, order: None };
        Self::from_planes(OP, planes)
    }

    /// How it is quantised.
    pub fn scheme(&self) -> QuantScheme {
        self.0.scheme
    }

    /// K and N.
    pub fn dims2(&self) -> (usize, usize) {
        self.0.dims.into()
    }

    /// Where it is.
    pub fn device(&self) -> &Device {
        self.0.device()
    }

    /// The bytes of all its tensors.
    pub fn bytes(&self) -> usize {
        let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        self.0.tensors().iter().map(|(_, t)| bytes(t)).sum()
    }

    /// The same weight on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        Ok(Self(Arc::new(self.0.map(|t| t.to_device(device))?)))
    }
}

impl fmt::Debug for QuantWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, (k, n), device) = (self.scheme(), self.dims2(), self.device().location());
        write!(f, "QuantWeight([{k}, {n}], {scheme:?}, {} bytes, {device:?})", self.bytes())
    }
}
