//! A quantised weight as tensors: the plain form, which the CPU multiplies with and files hold.

use candle_core::{DType, Device, Result, Tensor};

use super::scheme::QuantScheme;
use crate::check;
use crate::error::Error;
use crate::op::cast;

/// Codes, scales and what else a weight `[k, n]` consists of, row-major and on one device.
#[derive(Clone)]
pub(crate) struct Planes {
    pub scheme: QuantScheme,
    pub dims: [usize; 2],
    /// Of four bits: u32 `[⌈k/8⌉, n]`, eight rows of a column in a word, the first one lowest; rows past the last
    /// have the code of 0. Of eight bits: `[k, n]`, u8 that holds int8, or e4m3; on a GPU of any strides.
    pub codes: Tensor,
    /// `[⌈k/gk⌉, ⌈n/gn⌉]` of the scheme's groups, f16, bf16 or f32.
    pub scales: Tensor,
    /// u8 like the scales, 0 to 16.
    pub zeros: Option<Tensor>,
    /// u32 `[k]`: row `i` of the codes is row `order[i]` of the weight.
    pub order: Option<Tensor>,
}

impl Planes {
    /// Checked shapes and dtypes, contiguous but for bytes on a GPU. Their elements are for [`check_values`](Self::check_values).
    pub fn new(op: &'static str, planes: Self) -> Result<Self> {
        let Self { scheme, dims: dims @ [k, n], codes, scales, zeros, order } = planes;
        scheme.check(op)?;
        let words = if scheme.is_4bit() { k.div_ceil(8) } else { k };
        let dtype = match scheme {
            QuantScheme::Fp8 { .. } => DType::F8E4M3,
            QuantScheme::Int8 { .. } => DType::U8,
            _ => DType::U32,
        };
        check::dtype(op, ("codes", &codes), &[dtype])?;
        let [rows, cols] = groups(scheme, dims);
        let mut args = vec![("codes", &codes), ("scales", &scales)];
        args.extend(zeros.as_ref().map(|t| ("zeros", t)));
        args.extend(order.as_ref().map(|t| ("order", t)));
        check::tensors(op, &args)?;
        check::untracked(op, &args)?;
        shape(op, ("codes", &codes), &[words, n])?;
        check::dtype(op, ("scales", &scales), &[DType::F16, DType::BF16, DType::F32])?;
        shape(op, ("scales", &scales), &[rows, cols])?;
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
        if let Some(zeros) = &zeros {
            check::dtype(op, ("zeros", zeros), &[DType::U8])?;
            shape(op, ("zeros", zeros), &[rows, cols])?;
        }
        if let Some(order) = &order {
            check::dtype(op, ("order", order), &[DType::U32])?;
            shape(op, ("order", order), &[k])?;
        }
        let whole = |t: Tensor| if t.elem_count() == 0 { Ok(t) } else { t.contiguous() };
        // Bytes on a GPU are read as they lie, and laid otherwise where the kernels want that.
        let as_they_lie = !scheme.is_4bit() && codes.device().is_cuda();
        Ok(Self {
            scheme,
            dims,
            codes: if as_they_lie { codes } else { whole(codes)? },
            scales: whole(scales)?,
            zeros: zeros.map(whole).transpose()?,
            order: order.map(whole).transpose()?,
        })
    }

    /// Their elements are what kernels and the formula rely on, read on the host: finite scales, zero points up to 16,
    /// and an order in which each row comes once.
    pub fn check_values(&self, op: &'static str) -> Result<()> {
        let bad = |name, got, want: &str, fix| -> Result<()> {
            Err(Error::Value { op, name, got, want: want.into(), fix }.into())
        };
        let scales = host(&self.scales, DType::F32)?.to_vec1::<f32>()?;
        if let Some(i) = scales.iter().position(|x| !x.is_finite()) {
            let got = format!("{} at element {i}", scales[i]);
            return bad("scales", got, "finite numbers", "check the file that it comes from");
        }
        if let Some(zeros) = &self.zeros {
            let zeros = host(zeros, DType::U8)?.to_vec1::<u8>()?;
            if let Some(i) = zeros.iter().position(|&z| z > 16) {
                let got = format!("{} at element {i}", zeros[i]);
                return bad("zeros", got, "0 to 16", "unpack words of zero points first");
            }
        }
        if let Some(order) = &self.order {
            let order = host(order, DType::U32)?.to_vec1::<u32>()?;
            let mut seen = vec![false; order.len()];
            for (i, &row) in order.iter().enumerate() {
                match seen.get_mut(row as usize) {
                    Some(seen) if !*seen => *seen = true,
                    _ => {
                        let got = format!("{row} at element {i}");
                        let want = format!("each of 0 to {} once", order.len() - 1);
                        return bad("order", got, &want, "check the file that it comes from");
                    }
                }
            }
        }
        Ok(())
    }

    pub fn device(&self) -> &Device {
        self.codes.device()
    }

    /// All tensors, by the names under which files have them.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut all = vec![("codes", &self.codes), ("scales", &self.scales)];
        all.extend(self.zeros.as_ref().map(|t| ("zeros", t)));
        all.extend(self.order.as_ref().map(|t| ("order", t)));
        all
    }

    /// The same on another device.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|t| t.to_device(device))
    }

    /// The same with all tensors changed.
    pub fn map(&self, change: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self {
            codes: change(&self.codes)?,
            scales: change(&self.scales)?,
            zeros: self.zeros.as_ref().map(&change).transpose()?,
            order: self.order.as_ref().map(&change).transpose()?,
            ..*self
        })
    }
}

/// How the tensors of a weight lie.
#[derive(Clone)]
pub(crate) enum Form {
    /// As [`Planes`] says.
    Plain(Planes),
    /// Of the layout of [`quantize_int4`](super::quantize_int4), whose nibbles are two's complement; strides are any.
    Signed(Planes),
    /// On a GPU, with codes of four bits as its kernels read them: words in the order of [`crate::kernel::w4`].
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // Made on a GPU alone.
    Packed(Planes),
}

impl Form {
    pub fn planes(&self) -> &Planes {
        match self {
            Self::Plain(planes) | Self::Signed(planes) | Self::Packed(planes) => planes,
        }
    }

    pub fn facts(&self) -> Facts {
        let &Planes { scheme, dims, .. } = self.planes();
        let (signed, packed) = (matches!(self, Self::Signed(_)), matches!(self, Self::Packed(_)));
        Facts { scheme, dims, signed, packed }
    }

    /// What a product reads: all but the order of rows, which the columns of the other operand take on instead.
    pub fn operands(&self) -> Vec<&Tensor> {
        let Planes { codes, scales, zeros, .. } = self.planes();
        [Some(codes), Some(scales), zeros.as_ref()].into_iter().flatten().collect()
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
}

impl Facts {
    /// The weight, whose operands are the next of `inputs`.
    pub fn read<T>(self, inputs: &mut impl Iterator<Item = T>) -> Weight<T> {
        let mut next = || inputs.next().expect("the operands of a weight are inputs");
        let (codes, scales) = (next(), next());
        let zeros = self.scheme.has_zero_points().then(next);
        Weight { facts: self, codes, scales, zeros }
    }
}

/// A weight in some view of its tensors.
#[derive(Clone, Copy)]
pub(crate) struct Weight<T> {
    pub facts: Facts,
    pub codes: T,
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

fn shape(op: &'static str, (arg, t): check::Arg, want: &[usize]) -> Result<()> {
    if t.dims() == want {
        return Ok(());
    }
    Err(Error::Value {
        op,
        name: arg,
        got: format!("of shape {:?}", t.dims()),
        want: format!("{want:?}"),
        fix: "see the layouts of `QuantWeight`",
    }
    .into())
}

/// All elements on the CPU.
fn host(t: &Tensor, dtype: DType) -> Result<Tensor> {
    cast(&t.to_device(&Device::Cpu)?, dtype)?.flatten_all()
}
