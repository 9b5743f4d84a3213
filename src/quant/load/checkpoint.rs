//! Which format a layer of a checkpoint has, by the names of its tensors.

use std::collections::HashMap;

use candle_core::safetensors::MmapedSafetensors;
use candle_core::{DType, Device, Result, Tensor};

use crate::error::Error;
use crate::quant::{QuantWeight, scheme::NF4};

const OP: &str = "QuantWeight::from_checkpoint";

/// Tensors by name, each in the dtype that the file has.
///
/// A `VarBuilder` of candle-nn converts what it reads, which destroys words unless it is told each tensor's dtype; so read
/// files with [`candle_core::safetensors`].
pub trait Checkpoint {
    /// The tensor of that name, if there is one.
    fn tensor(&self, name: &str) -> Result<Option<Tensor>>;
}

/// What [`candle_core::safetensors::load`] gives.
impl Checkpoint for HashMap<String, Tensor> {
    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        Ok(self.get(name).cloned())
    }
}

/// Files, and the device to which what is wanted of them is brought.
impl Checkpoint for (&MmapedSafetensors, &Device) {
    fn tensor(&self, name: &str) -> Result<Option<Tensor>> {
        let (files, device) = self;
        match files.get(name) {
            Ok(_) => files.load(name, device).map(Some),
            Err(_) => Ok(None),
        }
    }
}

impl QuantWeight {
    /// The weight of the layer `prefix` of a checkpoint, whatever its format:
    ///
    /// | tensors below `prefix` | format |
    /// |---|---|
    /// | `weight_packed`, `weight_scale`, `weight_shape`, perhaps `weight_zero_point` and `weight_g_idx` | [compressed-tensors](Self::from_compressed_tensors) |
    /// | `qweight`, `qzeros`, `scales`, perhaps `g_idx` | [GPTQ](Self::from_gptq), or [AWQ](Self::from_awq) if eight columns are in a word |
    /// | `weight`, `weight.absmax`, `weight.quant_state.bitsandbytes__nf4`, perhaps `weight.nested_absmax` and `weight.nested_quant_map` | [bitsandbytes' nf4](Self::from_nf4) |
    /// | `weight` `[N, K]` in f8e4m3, `weight_scale_inv` or `weight_scale` | [fp8](Self::from_fp8): DeepSeek's blocks; compressed-tensors' `float-quantized` |
    /// | `format`, `codes`, `scales`, perhaps `zeros` and `order` | [this crate's](Self::to_tensors), the prefix of whose tensors ended in a dot |
    ///
    /// Not read are scales of activations, and biases, which belong to
    /// [`MatmulOptions`](crate::MatmulOptions::bias).
    ///
    /// # Errors
    ///
    /// None of these formats, a tensor of them that is missing, and the errors of the constructor that the format has.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// # use std::collections::HashMap;
    /// use kaio_candle::quant::{Per, QuantScheme, QuantWeight};
    ///
    /// # let weight = Tensor::zeros((256, 128), DType::F32, &Device::Cpu)?.to_dtype(DType::F8E4M3)?;
    /// # let scale = Tensor::ones((2, 1), DType::F32, &Device::Cpu)?;
    /// # let file = [("down_proj.weight", weight), ("down_proj.weight_scale_inv", scale)];
    /// # let tensors: HashMap<String, Tensor> = file.map(|(name, t)| (name.into(), t)).into();
    /// // let tensors = candle_core::safetensors::load("model.safetensors", &Device::Cpu)?;
    /// let weight = QuantWeight::from_checkpoint(&tensors, "down_proj")?;
    /// assert_eq!(weight.dims2(), (128, 256));
    /// assert_eq!(weight.scheme(), QuantScheme::Fp8 { per: Per::Block });
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_checkpoint(tensors: &impl Checkpoint, prefix: &str) -> Result<Self> {
        let layer = Layer { tensors, prefix };
        if let Some(packed) = layer.maybe("weight_packed")? {
            let (scale, shape) = (layer.tensor("weight_scale")?, layer.tensor("weight_shape")?);
            let (zero, g_idx) = (layer.maybe("weight_zero_point")?, layer.maybe("weight_g_idx")?);
            let (zero, g_idx) = (zero.as_ref(), g_idx.as_ref());
            return Self::from_compressed_tensors(&packed, &scale, &shape, zero, g_idx);
        }
        if let Some(qweight) = layer.maybe("qweight")? {
            let (qzeros, scales) = (layer.tensor("qzeros")?, layer.tensor("scales")?);
            let columns = |t: &Tensor| t.dims().last().copied().unwrap_or(0);
            if columns(&qweight) < columns(&scales) {
                return Self::from_awq(&qweight, &qzeros, &scales);
            }
            return Self::from_gptq(&qweight, &qzeros, &scales, layer.maybe("g_idx")?.as_ref());
        }
        let fp4 = "weight.quant_state.bitsandbytes__fp4";
        if layer.maybe(fp4)?.is_some() {
            return Err(Error::Unsupported {
                op: OP,
                what: "this crate".into(),
                limit: format!("cannot multiply with bitsandbytes' fp4 (`{}`)", layer.name(fp4)),
                fix: "quantise the weight to nf4".into(),
            }
            .into());
        }
        if let Some(state) = layer.maybe("weight.quant_state.bitsandbytes__nf4")? {
            return layer.nf4(&state);
        }
        if layer.maybe("format")?.is_some() {
            return layer.ours();
        }
        layer.fp8()
    }
}

struct Layer<'a, T> {
    tensors: &'a T,
    prefix: &'a str,
}

impl<T: Checkpoint> Layer<'_, T> {
    fn name(&self, suffix: &str) -> String {
        match self.prefix {
            "" => suffix.into(),
            prefix => format!("{prefix}.{suffix}"),
        }
    }

    fn maybe(&self, suffix: &str) -> Result<Option<Tensor>> {
        self.tensors.tensor(&self.name(suffix))
    }

    fn tensor(&self, suffix: &str) -> Result<Tensor> {
        let missing = || {
            let want = format!("also `{}`", self.name(suffix));
            self.error("a layer whose format has one tensor more than the checkpoint".into(), want)
        };
        self.maybe(suffix)?.ok_or_else(missing)
    }

    fn error(&self, got: String, want: String) -> candle_core::Error {
        let fix =
            "look at the names in the checkpoint; a prefix ends before `.weight` or `.qweight`";
        Error::Value { op: OP, name: "prefix", got, want, fix }.into()
    }

    fn nf4(&self, state: &Tensor) -> Result<QuantWeight> {
        let (weight, absmax) = (self.tensor("weight")?, self.tensor("weight.absmax")?);
        if let Some(map) = self.maybe("weight.quant_map")? {
            let map = super::host(&map)?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
            if map != NF4 {
                let got = format!("a layer whose `{}` is {map:?}", self.name("weight.quant_map"));
                return Err(self.error(got, "the values of nf4".into()));
            }
        }
        let nested = match self.maybe("weight.nested_absmax")? {
            Some(absmax) => Some((absmax, self.tensor("weight.nested_quant_map")?)),
            None => None,
        };
        let nested = nested.as_ref().map(|(absmax, map)| (absmax, map));
        QuantWeight::from_nf4(&weight, &absmax, state, nested)
    }

    fn ours(&self) -> Result<QuantWeight> {
        let mut tensors = HashMap::new();
        for name in ["format", "codes", "scales", "zeros", "order"] {
            tensors.extend(self.maybe(name)?.map(|t| (self.name(name), t)));
        }
        QuantWeight::from_tensors(&self.name(""), &tensors)
    }

    fn fp8(&self) -> Result<QuantWeight> {
        let Some(weight) = self.maybe("weight")?.filter(|t| t.dtype() == DType::F8E4M3) else {
            let got = format!("`{}`, which is no layer of a known format", self.prefix);
            let want = "one with `weight_packed`, `qweight`, `weight.quant_state.bitsandbytes__nf4`, \
                        `format`, or `weight` in f8e4m3";
            return Err(self.error(got, want.into()));
        };
        let scales = match self.maybe("weight_scale_inv")? {
            Some(scales) => scales,
            None => self.tensor("weight_scale")?,
        };
        // [N, K], and scales of the same order.
        let turned = |t: Tensor| if t.rank() == 2 { t.t() } else { Ok(t) };
        QuantWeight::from_fp8(&turned(weight)?, &turned(scales)?)
    }
}
