//! A quantised weight as users hold it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use candle_core::{DType, Device, Result, Tensor};

use super::planes::{Form, Planes, alone};
use super::quantize::quantize;
use super::scheme::{BLOCK, Per, QuantScheme};
use crate::check::{self, Arg, INT4_GROUP};
use crate::{MatmulOptions, cuda, op};

/// A weight `[K, N]` in quantised form, for [`kaio_matmul_quant`](crate::KaioTensorExt::kaio_matmul_quant) and the
/// other products with quantised weights.
///
/// It is a constant: no gradient is computed for it, and none kept. Those of what is multiplied with it go
/// through.
///
/// A clone shares the tensors of the original. On a GPU a weight is brought into the form that the kernels read once,
/// by [`prepare`](Self::prepare) or by the first product, and kept in that form alone. `Debug` shows sizes and the
/// scheme, no data.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use kaio_candle::{prelude::*, quant::QuantScheme, quant::QuantWeight};
///
/// let w = Tensor::randn(0f32, 1., (256, 64), &Device::Cpu)?;
/// let quantized = QuantWeight::quantize(&w, &QuantScheme::Int4 { group: 128, zero_points: false })?;
/// assert_eq!((quantized.dims2(), quantized.bytes()), ((256, 64), 256 * 64 / 2 + 2 * 64 * 4));
///
/// let x = Tensor::randn(0f32, 1., (3, 256), &Device::Cpu)?.to_dtype(DType::BF16)?;
/// assert_eq!(x.kaio_matmul_quant(&quantized)?.dims(), [3, 64]);
/// # Ok::<(), candle_core::Error>(())
/// ```
#[derive(Clone)]
pub struct QuantWeight(Arc<Shared>);

struct Shared {
    scheme: QuantScheme,
    dims: [usize; 2],
    device: Device,
    /// As it was made, until it is prepared.
    made: Mutex<Option<Form>>,
    /// As products read it: on a CPU from the beginning.
    prepared: OnceLock<Form>,
}

impl QuantWeight {
    /// Rounds a weight to the nearest codes.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `weight` | `[K, N]` of any size and layout | f32, f16 or bf16 |
    ///
    /// The scale of a group is its largest magnitude by that of the codes, or with zero points its range, 0 included,
    /// by 15. Scales of codes of four bits have the weight's dtype, those of eight bits are f32. They are rounded up,
    /// so that each element is within half a step of its code (of nf4 and e4m3, at the nearest code).
    ///
    /// # Errors
    ///
    /// Another dtype or rank, a scheme that there is not, a tracked input, an infinite or NaN element.
    pub fn quantize(weight: &Tensor, scheme: &QuantScheme) -> Result<Self> {
        const OP: &str = "QuantWeight::quantize";
        let planes = quantize(OP, ("weight", weight), *scheme)?;
        Ok(Self::of(Form::Plain(planes.check_values(OP)?)))
    }

    /// From the layout of [`quantize_int4`](super::quantize_int4): int4 in groups of 128, without zero points.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `packed` | `[K/8, N]`, two's complement, lowest nibble = lowest k | u32 |
    /// | `scales` | `[K/128, N]` | f16, bf16 or f32 |
    ///
    /// # Errors
    ///
    /// Another dtype or shape, a tracked input, a scale that is infinite or NaN.
    pub fn from_int4(packed: &Tensor, scales: &Tensor) -> Result<Self> {
        const OP: &str = "QuantWeight::from_int4";
        let args = [("packed", packed), ("scales", scales)];
        check::tensors(OP, &args)?;
        check::untracked(OP, &args)?;
        check::int4_words(OP, args[0])?;
        check::rank(OP, args[0], 2..=2, "[K/8, N]", "a weight is one matrix")?;
        let k = packed.dims()[0].saturating_mul(8);
        check::int4_weight(OP, ("packed", k), args[0], args[1])?;
        check::dtype(OP, args[1], &check::FLOATS)?;
        check::copies(OP, &args)?;
        let planes = Planes {
            scheme: QuantScheme::Int4 { group: INT4_GROUP as i32, zero_points: false },
            dims: [k, packed.dims()[1]],
            codes: packed.clone(),
            scales: alone(OP, scales)?,
            zeros: None,
            order: None,
            far: false,
        }
        .check_values(OP)?;
        if packed.device().is_cuda() && packed.elem_count() > 0 {
            return Ok(Self::of(cuda::pack_signed(OP, &planes)?));
        }
        // Eight more, as a number of four bits, is another topmost bit.
        let words = packed.flatten_all()?.to_vec1::<u32>()?.into_iter();
        let words = words.map(|word| word ^ 0x8888_8888).collect();
        let codes = Tensor::from_vec(words, packed.dims2()?, packed.device())?;
        Ok(Self::of(Form::Plain(Planes { codes, ..planes })))
    }

    /// From int8 bytes, as [`quantize_int8`](super::quantize_int8) makes them, with a scale for all or one for each
    /// column.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `codes` | `[K, N]`, two's complement | u8 |
    /// | `scales` | one element, `[N]` or `[1, N]` | f32, f16 or bf16 |
    ///
    /// # Errors
    ///
    /// Another dtype or shape, a tracked input, a scale that is infinite or NaN.
    pub fn from_int8(codes: &Tensor, scales: &Tensor) -> Result<Self> {
        const OP: &str = "QuantWeight::from_int8";
        let (per, scales) = scales_of(OP, ("codes", codes), ("scales", scales), false)?;
        Self::of_bytes(OP, QuantScheme::Int8 { per }, codes, scales)
    }

    /// From floats of eight bits (e4m3) with a scale for all, one for each column, or one for each block of 128 × 128
    /// (DeepSeek-V3).
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `codes` | `[K, N]` | f8e4m3 |
    /// | `scales` | one element, `[N]` or `[1, N]`, `[⌈K/128⌉, ⌈N/128⌉]` | f32, f16 or bf16 |
    ///
    /// # Errors
    ///
    /// Another dtype or shape, a tracked input, a scale that is infinite or NaN.
    pub fn from_fp8(codes: &Tensor, scales: &Tensor) -> Result<Self> {
        const OP: &str = "QuantWeight::from_fp8";
        let (per, scales) = scales_of(OP, ("codes", codes), ("scales", scales), true)?;
        Self::of_bytes(OP, QuantScheme::Fp8 { per }, codes, scales)
    }

    fn of_bytes(
        op: &'static str,
        scheme: QuantScheme,
        codes: &Tensor,
        scales: Tensor,
    ) -> Result<Self> {
        let (dims, codes) = (codes.dims2()?.into(), codes.clone());
        let (zeros, order, far) = (None, None, false);
        Self::from_planes(op, Planes { scheme, dims, codes, scales, zeros, order, far })
    }

    /// A weight of tensors that are checked here: what every constructor from tensors ends in.
    pub(crate) fn from_planes(op: &'static str, planes: Planes) -> Result<Self> {
        planes.check(op)?;
        Ok(Self::of(Form::Plain(planes.check_values(op)?.alone(op)?)))
    }

    fn of(form: Form) -> Self {
        let planes = form.planes();
        let (scheme, dims, device) = (planes.scheme, planes.dims, planes.device().clone());
        let (made, prepared) = match form {
            Form::Plain(_) if device.is_cuda() => (Some(form), OnceLock::new()),
            _ => (None, OnceLock::from(form)),
        };
        Self(Arc::new(Shared { scheme, dims, device, made: Mutex::new(made), prepared }))
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
        &self.0.device
    }

    /// The bytes of all that it holds.
    pub fn bytes(&self) -> usize {
        self.form().planes().bytes()
    }

    /// The same weight on another device.
    ///
    /// # Errors
    ///
    /// What the driver refuses.
    pub fn to_device(&self, device: &Device) -> Result<Self> {
        if device.same_device(&self.0.device) {
            return Ok(self.clone());
        }
        Ok(Self::of(Form::Plain(self.form().plain("QuantWeight::to_device", device)?)))
    }

    /// The weight `[K, N]` in floats: `scale · (code − zero)`, computed in f32 and rounded once.
    ///
    /// # Errors
    ///
    /// Another dtype than f32, f16 or bf16, and those of [`prepare`](Self::prepare).
    pub fn dequantize(&self, dtype: DType) -> Result<Tensor> {
        op::dequantize("QuantWeight::dequantize", self, dtype)
    }

    /// Brings a weight on a GPU into the form that the kernels read, which its first product would do else. The rest
    /// of its life it takes no more memory than that.
    ///
    /// A product that is captured in a CUDA graph needs a weight that is prepared: what is allocated in a capture
    /// belongs to the graph, and nothing is computed there.
    ///
    /// # Errors
    ///
    /// A weight that is not prepared, while its stream is captured; what the driver refuses.
    pub fn prepare(&self) -> Result<()> {
        self.prepared("QuantWeight::prepare").map(drop)
    }

    /// Says which kernels [`kaio_matmul_quant_with`](crate::KaioTensorExt::kaio_matmul_quant_with) takes for `m` rows of
    /// activations of a dtype, for bug reports and the curious. On a GPU it multiplies zeros to see. `KAIO_LOG=1` prints those of
    /// all products of a process.
    ///
    /// # Errors
    ///
    /// Those of the product.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let w = Tensor::randn(0f32, 1., (64, 8), &Device::Cpu)?;
    /// let w = QuantWeight::quantize(&w, &QuantScheme::Nf4 { block: 64 })?;
    /// let text = w.explain(1, DType::BF16, &MatmulOptions::default())?;
    /// assert!(text.ends_with("the CPU path, block by block"), "{text}");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn explain(&self, m: usize, dtype: DType, opts: &MatmulOptions) -> Result<String> {
        const OP: &str = "QuantWeight::explain";
        explain(OP, [self], m, dtype, |x| op::matmul_quant(OP, x, self, opts).map(drop))
    }

    /// The same of [`kaio_qkv_project`](crate::KaioTensorExt::kaio_qkv_project): one kernel for all three weights, or those of a
    /// product for each.
    ///
    /// # Errors
    ///
    /// Those of the projections.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// let w = Tensor::randn(0f32, 1., (64, 8), &Device::Cpu)?;
    /// let w = QuantWeight::quantize(&w, &QuantScheme::Nf4 { block: 64 })?;
    /// let text = QuantWeight::explain_qkv([&w, &w, &w], 1, DType::BF16)?;
    /// assert!(text.starts_with("bf16 [1, 64] x Nf4 { block: 64 } [64, 8], Nf4"), "{text}");
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn explain_qkv(weights: [&Self; 3], m: usize, dtype: DType) -> Result<String> {
        const OP: &str = "QuantWeight::explain_qkv";
        explain(OP, weights, m, dtype, |x| op::qkv_project(x, weights).map(drop))
    }

    /// The same of [`kaio_swiglu_project`](crate::KaioTensorExt::kaio_swiglu_project).
    ///
    /// # Errors
    ///
    /// Those of the gated linear unit.
    pub fn explain_swiglu(gate: &Self, up: &Self, m: usize, dtype: DType) -> Result<String> {
        const OP: &str = "QuantWeight::explain_swiglu";
        explain(OP, [gate, up], m, dtype, |x| op::swiglu_project(x, gate, up).map(drop))
    }

    /// As it is held now.
    pub(crate) fn form(&self) -> Form {
        if let Some(form) = self.0.prepared.get() {
            return form.clone();
        }
        match &*self.made() {
            Some(form) => form.clone(),
            None => self.0.prepared.get().expect("what was made is given up for it").clone(),
        }
    }

    fn made(&self) -> MutexGuard<'_, Option<Form>> {
        self.0.made.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In the form that products read.
    pub(crate) fn prepared(&self, op: &'static str) -> Result<&Form> {
        let prepared = &self.0.prepared;
        if let Some(form) = prepared.get() {
            return Ok(form);
        }
        // One thread prepares it, and others wait for what they need as well.
        let mut made = self.made();
        if let Some(form) = &*made {
            let other = cuda::repack(op, form.planes())?;
            prepared.get_or_init(|| other.unwrap_or_else(|| form.clone()));
            *made = None;
        }
        Ok(prepared.get().expect("what was made is given up for it"))
    }
}

/// What work with `m` rows of zeros and some weights, on the device of the first, takes.
fn explain<const N: usize>(
    op: &'static str,
    weights: [&QuantWeight; N],
    m: usize,
    dtype: DType,
    work: impl Fn(&Tensor) -> Result<()>,
) -> Result<String> {
    let (device, (k, _)) = (weights[0].device(), weights[0].dims2());
    check::size(op, "`m` rows of activations", &[m, k], dtype)?;
    // A CPU has one way for all rows, which one of them goes as well.
    let rows = if device.is_cpu() { m.min(1) } else { m };
    let multiply = || work(&Tensor::zeros((rows, k), dtype, device)?);
    let how = match device {
        Device::Cpu => {
            multiply()?;
            "the CPU path, block by block".into()
        }
        _ => {
            weights.iter().try_for_each(|w| w.prepare())?;
            match cuda::kernels(multiply)?.as_slice() {
                [] => "no kernel of this crate".into(),
                kernels => kernels.join("; then "),
            }
        }
    };
    let of = |w: &QuantWeight| {
        let (k, n) = w.dims2();
        format!("{:?} [{k}, {n}]", w.scheme())
    };
    let all = weights.map(of).join(", ");
    Ok(format!("{} [{m}, {k}] x {all}: {how}", dtype.as_str()))
}

/// What shares a scale of a matrix of bytes, by the shape of its scales, which become a matrix. Not all codes can have those of
/// blocks.
pub(crate) fn scales_of(
    op: &'static str,
    codes @ (of, matrix): Arg,
    arg @ (_, scales): Arg,
    blocks: bool,
) -> Result<(Per, Tensor)> {
    check::rank(op, codes, 2..=2, "[K, N]", "a weight is one matrix")?;
    check::tensor(op, arg)?;
    check::copies(op, &[arg])?;
    let (k, n) = matrix.dims2()?;
    match *scales.dims() {
        _ if scales.elem_count() == 1 => Ok((Per::Tensor, scales.reshape((1, 1))?)),
        [len] | [1, len] if len == n => Ok((Per::Channel, scales.reshape((1, n))?)),
        [rows, cols] if blocks && [rows, cols] == [k, n].map(|len| len.div_ceil(BLOCK)) => {
            Ok((Per::Block, scales.clone()))
        }
        _ => {
            let each =
                if blocks { "[N], [1, N] or [K/128, N/128] rounded up" } else { "[N] or [1, N]" };
            let want = format!("one element, {each}, of `{of}` {:?}", matrix.dims());
            Err(check::another_shape(op, arg, want, "reshape it").into())
        }
    }
}

impl fmt::Debug for QuantWeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (scheme, (k, n), device) = (self.scheme(), self.dims2(), self.device().location());
        write!(f, "QuantWeight([{k}, {n}], {scheme:?}, {} bytes, {device:?})", self.bytes())
    }
}
