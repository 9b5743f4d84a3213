//! Seeded inputs in every layout.

use candle_core::{D, DType, Device, Result, Tensor};

use super::Nd;

/// How a tensor's elements lie in its storage. All but `Plain` and the transposed ones leave gaps or
/// repeat elements.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Layout {
    /// Contiguous.
    Plain,
    /// The last two dimensions swapped.
    Transposed,
    /// The middle of a larger tensor, at an odd offset.
    Narrowed,
    /// Every second row.
    Rows,
    /// Every second column.
    Columns,
    /// One row repeated.
    Repeated,
    /// One matrix repeated over the batch.
    Expanded,
    /// The rows outside of the last batch dimension, as `[B, S, H, D]` read as `[B, H, S, D]`.
    Permuted,
}

impl Layout {
    pub const ALL: [Self; 8] = [
        Self::Plain,
        Self::Transposed,
        Self::Narrowed,
        Self::Rows,
        Self::Columns,
        Self::Repeated,
        Self::Expanded,
        Self::Permuted,
    ];

    /// The shape of the storage in which a tensor of shape `dims` lies so.
    pub fn base(self, dims: &[usize]) -> Vec<usize> {
        let (mut base, r) = (dims.to_vec(), dims.len());
        match self {
            Self::Plain => {}
            Self::Transposed => base.swap(r - 2, r - 1),
            Self::Narrowed => base[r - 2..].iter_mut().for_each(|len| *len += 2),
            Self::Rows => base.insert(r - 1, 2),
            Self::Columns => base.push(2),
            Self::Repeated => base[r - 2] = 1,
            Self::Expanded => base[..r - 2].fill(1),
            Self::Permuted if r == 2 => {}
            Self::Permuted => base.swap(r - 3, r - 2),
        }
        base
    }

    /// The tensor of shape `dims` in that storage.
    pub fn view(self, base: &Tensor, dims: &[usize]) -> Result<Tensor> {
        let r = dims.len();
        match self {
            Self::Plain => Ok(base.clone()),
            Self::Transposed => base.t(),
            Self::Narrowed => {
                // An empty view begins past the end.
                let from = |len: usize| if len == 0 { 2 } else { 1 };
                let (rows, cols) = (dims[r - 2], dims[r - 1]);
                base.narrow(r - 2, from(rows), rows)?.narrow(r - 1, from(cols), cols)
            }
            Self::Rows => base.narrow(r - 1, 1, 1)?.squeeze(r - 1),
            Self::Columns => base.narrow(D::Minus1, 1, 1)?.squeeze(D::Minus1),
            Self::Repeated | Self::Expanded => base.broadcast_as(dims),
            Self::Permuted if r == 2 => Ok(base.clone()),
            Self::Permuted => base.transpose(r - 3, r - 2),
        }
    }
}

/// A reproducible source of inputs: the same for the same case on every device.
pub struct Source {
    state: u64,
    device: Device,
}

impl Source {
    pub fn new(case: &str, device: &Device) -> Self {
        let fnv = |h: u64, b: u8| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3);
        Self { state: case.bytes().fold(0xcbf2_9ce4_8422_2325, fnv), device: device.clone() }
    }

    /// SplitMix64.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.state ^ (self.state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// Evenly in −1..1.
    pub fn unit(&mut self) -> f64 {
        (self.bits() >> 11) as f64 / (1u64 << 52) as f64 - 1.0
    }

    /// Like [`unit`](Self::unit), with now and then an infinity, a NaN, a zero or f16's largest.
    pub fn special(&mut self) -> f64 {
        match self.bits() % 64 {
            0 => f64::INFINITY,
            1 => f64::NEG_INFINITY,
            2 => f64::NAN,
            3 => 0.0,
            4 => 65504.0,
            _ => self.unit(),
        }
    }

    /// A tensor of this shape, dtype and layout: floats in −1..1, integers of any value. What the
    /// view does not show is NaN, or for integers a fixed odd number.
    pub fn tensor(&mut self, dtype: DType, dims: &[usize], layout: Layout) -> Result<Tensor> {
        match dtype {
            DType::U8 => self.tensor_of(dtype, dims, layout, |s| f64::from(s.bits() as u8)),
            DType::U32 => self.tensor_of(dtype, dims, layout, |s| f64::from(s.bits() as u32)),
            _ => self.tensor_of(dtype, dims, layout, Self::unit),
        }
    }

    /// [`tensor`](Self::tensor) with elements from `element`.
    pub fn tensor_of(
        &mut self,
        dtype: DType,
        dims: &[usize],
        layout: Layout,
        mut element: impl FnMut(&mut Self) -> f64,
    ) -> Result<Tensor> {
        let base = layout.base(dims);
        let count = base.iter().product::<usize>();
        let places = Tensor::from_vec((0..count as u32).collect(), base.as_slice(), &Device::Cpu)?;
        let places = Nd::of(&layout.view(&places, dims)?)?;
        let hidden = if dtype.is_int() { 77.0 } else { f64::NAN };
        let mut data = vec![hidden; count];
        for place in places.data {
            data[place as usize] = element(self);
        }
        let base = Tensor::from_vec(data, base.as_slice(), &Device::Cpu)?;
        layout.view(&base.to_dtype(dtype)?.to_device(&self.device)?, dims)
    }
}
