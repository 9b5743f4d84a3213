//! A quantised weight as tensors: the plain form, which the CPU multiplies with and files hold, and that which kernels
//! read.

use candle_core::{CpuStorage, DType, Device, Result, Storage, Tensor};

use super::order::Order;
use super::scheme::QuantScheme;
use crate::error::Error;
use crate::kernel::encode::{FARTHEST, NEAREST};
use crate::op::cast;
use crate::{check, cuda};

/// Codes, scales and what else a weight `[k, n]` consists of, on one device.
#[derive(Clone)]
pub(crate) struct Planes {
    pub scheme: QuantScheme,
    pub dims: [usize; 2],
    /// Of four bits: u32 `[⌈k/8⌉, n]`, eight rows of a column in a word, the first one lowest; rows past the last
    /// have the code of 0. Of eight bits: `[k, n]`, u8 that holds int8, or e4m3.
    pub codes: Tensor,
    /// `[⌈k/gk⌉, ⌈n/gn⌉]` of the scheme's groups, f16, bf16 or f32.
    pub scales: Tensor,
    /// u8 like the scales, 0 to 16; [`Form::Packed`] has them in an order of its own.
    pub zeros: Option<Tensor>,
    /// Where the rows of the codes are those of the weight in another order.
    pub order: Option<Order>,
    /// Whether f16 may not have the weight's elements: see [`is_far`].
    pub far: bool,
}

impl Planes {
    /// Shapes and dtypes fit together. Their elements are for [`check_values`](Self::check_values).
    pub fn check(&self, op: &'static str) -> Result<()> {
        let Self { scheme, dims: dims @ [k, n], codes, scales, zeros, order, .. } = self;
        let (scheme, dims, k, n) = (*scheme, *dims, *k, *n);
        scheme.check(op)?;
        let words = if scheme.is_4bit() { k.div_ceil(8) } else { k };
        let dtype = match scheme {
            QuantScheme::Fp8 { .. } => DType::F8E4M3,
            QuantScheme::Int8 { .. } => DType::U8,
            _ => DType::U32,
        };
        check::dtype(op, ("codes", codes), &[dtype])?;
        let [rows, cols] = groups(scheme, dims);
        let mut args = vec![("codes", codes), ("scales", scales)];
        args.extend(zeros.as_ref().map(|t| ("zeros", t)));
        args.extend(order.as_ref().map(|order| ("order", &order.rows)));
        check::tensors(op, &args)?;
        check::untracked(op, &args)?;
        shape(op, ("codes", codes), &[words, n])?;
        check::dtype(op, ("scales", scales), &check::FLOATS)?;
        shape(op, ("scales", scales), &[rows, cols])?;
        let zero_points = scheme.has_zero_points();
        if zero_points != zeros.is_some() {
            return Err(Error::Value {
                op,
                name: "zeros",
                got: if zero_points { "missing" } else { "there" }.into(),
                want: format!("what {scheme:?} says"),
                fix: "give zero points exactly where the scheme has them",
            }
            .into());
        }
        if let Some(zeros) = zeros {
            check::dtype(op, ("zeros", zeros), &[DType::U8])?;
            shape(op, ("zeros", zeros), &[rows, cols])?;
        }
        if let Some(order) = order {
            shape(op, ("order", &order.rows), &[k])?;
        }
        check::copies(op, &args)?;
        Ok(())
    }

    /// Row-major, each tensor in memory of its own. Codes of eight bits on a GPU, whose kernels want them by columns, may lie
    /// so already.
    pub fn alone(self, op: &'static str) -> Result<Self> {
        let Self { scheme, codes, scales, zeros, .. } = self;
        let by_columns =
            !scheme.is_4bit() && codes.device().is_cuda() && codes.t()?.is_contiguous();
        Ok(Self {
            codes: if by_columns { alone(op, &codes.t()?)?.t()? } else { alone(op, &codes)? },
            scales: alone(op, &scales)?,
            zeros: zeros.as_ref().map(|zeros| alone(op, zeros)).transpose()?,
            ..self
        })
    }

    /// Their elements are what kernels and the formula rely on: finite scales, zero points up to 16. On a GPU the largest are
    /// found there, and what is bad is read for the message alone. Says how large the scales are.
    pub fn check_values(self, op: &'static str) -> Result<Self> {
        let largest = largest_scale(op, ("scales", &self.scales))?;
        if let Some(zeros) = &self.zeros {
            const MOST: u8 = 16;
            if peak(op, &cast(zeros, DType::F32)?)? > MOST.into() {
                let zeros = host(zeros, DType::U8)?.to_vec1::<u8>()?;
                let i = zeros.iter().position(|&zero| zero > MOST).unwrap_or(0);
                let (got, want) = (format!("{} at element {i}", zeros[i]), "0 to 16".into());
                let fix = "unpack words of zero points first";
                return Err(Error::Value { op, name: "zeros", got, want, fix }.into());
            }
        }
        Ok(Self { far: is_far(self.scheme, largest), ..self })
    }

    pub fn device(&self) -> &Device {
        self.codes.device()
    }

    /// All tensors, by the names under which files have them.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = vec![("codes", &self.codes), ("scales", &self.scales)];
        all.extend(self.zeros.as_ref().map(|t| ("zeros", t)));
        all.extend(self.order.as_ref().map(|order| ("order", &order.rows)));
        all
    }

    /// The same on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        let to = |t: &Tensor| t.to_device(device);
        Ok(Self {
            codes: to(&self.codes)?,
            scales: to(&self.scales)?,
            zeros: self.zeros.as_ref().map(to).transpose()?,
            order: self.order.as_ref().map(|order| order.to_device(device)).transpose()?,
            ..*self
        })
    }

    /// The bytes of all tensors, of which none shares its memory.
    pub fn bytes(&self) -> usize {
        let bytes = |t: &Tensor| t.elem_count() * t.dtype().size_in_bytes();
        let order = self.order.as_ref().map_or(0, |order| bytes(&order.inverse));
        self.tensors().into_iter().map(|(_, t)| bytes(t)).sum::<usize>() + order
    }
}

/// How the tensors of a weight lie.
#[derive(Clone)]
pub(crate) enum Form {
    /// As [`Planes`] says.
    Plain(Planes),
    /// On a CPU, of the layout of [`quantize_int4`](super::quantize_int4), whose nibbles are two's complement; strides are
    /// any.
    Signed(Planes),
    /// On a GPU, with codes as its kernels read them. Of four bits: words, and rows of zero points, in the order of
    /// [`crate::kernel::w4`]. Of eight: `[n, k]`, each row with as many elements more as make a multiple of 16 bytes, and f32
    /// scales, one for each column where the scheme has one for all.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // Made on a GPU alone.
    Packed(Planes),
}

impl Form {
    pub fn planes(&self) -> &Planes {
        match self {
            Self::Plain(planes) | Self::Signed(planes) | Self::Packed(planes) => planes,
        }
    }

    fn facts(&self) -> Facts {
        let &Planes { scheme, dims, far, .. } = self.planes();
        let (signed, packed) = (matches!(self, Self::Signed(_)), matches!(self, Self::Packed(_)));
        Facts { scheme, dims, signed, packed, far, unit: false }
    }

    /// What a product reads: all but the order of rows, which the columns of the other operand take on instead. Codes of
    /// eight bits are `[k, n]` in either form.
    pub fn operands(&self) -> Result<Operands> {
        let Planes { scheme, codes, scales, zeros, .. } = self.planes();
        let codes = match self {
            Self::Packed(planes) if !scheme.is_4bit() => planes.across()?,
            _ => codes.clone(),
        };
        let tensors = [Some(codes), Some(scales.clone()), zeros.clone()];
        Ok(Operands { facts: self.facts(), tensors: tensors.into_iter().flatten().collect() })
    }

    /// On a device, in the form that files hold: of a weight that a user has, which is never signed.
    pub fn plain(&self, op: &'static str, device: &Device) -> Result<Planes> {
        match self {
            Self::Plain(planes) | Self::Signed(planes) => {
                let planes = planes.to_device(device)?;
                match device.is_cpu() {
                    true => Ok(Planes { codes: planes.codes.contiguous()?, ..planes }),
                    false => Ok(planes),
                }
            }
            Self::Packed(planes) if planes.scheme.is_4bit() => {
                cuda::unpack(op, planes)?.to_device(device)
            }
            Self::Packed(planes) => {
                let planes = planes.to_device(device)?;
                let [_, cols] = groups(planes.scheme, planes.dims);
                let scales = planes.scales.narrow(1, 0, cols)?.contiguous()?;
                let across = planes.across()?;
                let codes = match device.is_cpu() {
                    true => across.contiguous()?,
                    false => cuda::copy(op, &across)?,
                };
                Ok(Planes { codes, scales, ..planes })
            }
        }
    }
}

impl Planes {
    /// Packed codes of eight bits as a matrix `[k, n]`.
    fn across(&self) -> Result<Tensor> {
        self.codes.narrow(1, 0, self.dims[0])?.t()
    }
}

/// A weight as an op has it: what it is, and its inputs.
pub(crate) struct Operands {
    pub facts: Facts,
    pub tensors: Vec<Tensor>,
}

impl Operands {
    /// Codes of eight bits that stand for themselves.
    pub fn of_codes(scheme: QuantScheme, codes: &Tensor) -> Result<Self> {
        let dims = codes.dims2()?.into();
        let (signed, packed, far, unit) = (false, false, false, true);
        let facts = Facts { scheme, dims, signed, packed, far, unit };
        Ok(Self { facts, tensors: vec![codes.clone()] })
    }
}

/// What a weight is, without its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Facts {
    pub scheme: QuantScheme,
    pub dims: [usize; 2],
    /// [`Form::Signed`].
    pub signed: bool,
    /// [`Form::Packed`].
    pub packed: bool,
    /// [`Planes::far`].
    pub far: bool,
    /// Whether all scales are 1, and no tensor has them.
    pub unit: bool,
}

impl Facts {
    /// The weight, whose operands are the next of `inputs`.
    pub fn read<T: Copy>(self, inputs: &mut impl Iterator<Item = T>) -> Weight<T> {
        let mut next = || inputs.next().expect("the operands of a weight are inputs");
        let codes = next();
        let scales = if self.unit { codes } else { next() };
        let zeros = self.scheme.has_zero_points().then(next);
        Weight { facts: self, codes, scales, zeros }
    }
}

/// A weight in some view of its tensors.
#[derive(Clone, Copy)]
pub(crate) struct Weight<T> {
    pub facts: Facts,
    pub codes: T,
    /// Nobody's to read if they are all 1: see [`Facts::unit`].
    pub scales: T,
    pub zeros: Option<T>,
}

/// Rows and columns of the scales of a weight. What spans a whole side has one, even if that is empty.
pub(crate) fn groups(scheme: QuantScheme, dims: [usize; 2]) -> [usize; 2] {
    let group = scheme.group(dims);
    std::array::from_fn(|i| match scheme.spans()[i] {
        true => 1,
        false => dims[i].div_ceil(group[i]),
    })
}

fn shape(op: &'static str, arg: check::Arg, want: &[usize]) -> Result<()> {
    if arg.1.dims() == want {
        return Ok(());
    }
    let fix = "see the layouts of `QuantWeight`";
    Err(check::another_shape(op, arg, format!("{want:?}"), fix).into())
}

/// The largest magnitude of a matrix of scales, if all are finite.
pub(super) fn largest_scale(op: &'static str, (name, scales): check::Arg) -> Result<f32> {
    let largest = peak(op, scales)?;
    if largest.is_finite() {
        return Ok(largest);
    }
    let all = host(scales, DType::F32)?.to_vec1::<f32>()?;
    let i = all.iter().position(|x| !x.is_finite()).unwrap_or(0);
    let (got, want) = (format!("{} at element {i}", all[i]), "finite numbers".into());
    Err(Error::Value { op, name, got, want, fix: "check the file that it comes from" }.into())
}

/// The largest magnitude of a matrix of floats; infinite or NaN if any is.
fn peak(op: &'static str, matrix: &Tensor) -> Result<f32> {
    if matrix.device().is_cuda() {
        return cuda::peak(op, matrix);
    }
    let all = host(matrix, DType::F32)?.to_vec1::<f32>()?;
    // Of the bits of magnitudes, those of NaN are the largest.
    Ok(f32::from_bits(all.into_iter().map(|x| x.abs().to_bits()).max().unwrap_or(0)))
}

/// Whether the largest scale takes elements beyond what f16 can have, or all of them to where it has few digits. Products of f16
/// then multiply with scales that a power of two divides, and the sums by it.
pub(crate) fn is_far(scheme: QuantScheme, largest: f32) -> bool {
    largest != 0.0 && !(NEAREST..=FARTHEST).contains(&(largest * scheme.farthest()))
}

/// All elements on the CPU.
pub(super) fn host(t: &Tensor, dtype: DType) -> Result<Tensor> {
    cast(&t.to_device(&Device::Cpu)?, dtype)?.flatten_all()
}

/// A tensor whose memory holds its elements, row by row, and nothing else: a view would keep all of what it is of.
pub(super) fn alone(op: &'static str, t: &Tensor) -> Result<Tensor> {
    if t.elem_count() == 0 {
        return Tensor::zeros(t.shape(), t.dtype(), t.device());
    }
    let held = {
        let (storage, _) = t.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => cpu_elements(storage),
            Storage::Cuda(storage) => Some(cuda::elements(storage)),
            Storage::Metal(_) => None,
        }
    };
    match held == Some(t.elem_count()) && t.is_contiguous() {
        true => Ok(t.clone()),
        false if t.device().is_cuda() => cuda::copy(op, t),
        false => t.force_contiguous(),
    }
}

/// Elements of a storage of what codes, scales and zero points are.
fn cpu_elements(storage: &CpuStorage) -> Option<usize> {
    match storage {
        CpuStorage::U8(all) => Some(all.len()),
        CpuStorage::U32(all) => Some(all.len()),
        CpuStorage::F8E4M3(all) => Some(all.len()),
        CpuStorage::F16(all) => Some(all.len()),
        CpuStorage::BF16(all) => Some(all.len()),
        CpuStorage::F32(all) => Some(all.len()),
        _ => None,
    }
}
