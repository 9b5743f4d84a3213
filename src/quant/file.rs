//! Weights in safetensors files.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Result, Tensor, safetensors};

use super::order::Order;
use super::planes::Planes;
use super::scheme::{Per, QuantScheme};
use super::weight::QuantWeight;
use crate::error::Error;

/// The tensor that says what the others are, as text.
const FORMAT: &str = "format";

impl QuantWeight {
    /// Writes a safetensors file with the tensors of [`to_tensors`](Self::to_tensors), without a prefix.
    ///
    /// # Errors
    ///
    /// Those of the file system.
    ///
    /// ```no_run
    /// # use candle_core::{Device, Tensor};
    /// # use kaio_candle::prelude::*;
    /// # let w = Tensor::zeros((64, 8), candle_core::DType::F32, &Device::Cpu)?;
    /// let w = QuantWeight::quantize(&w, &QuantScheme::Nf4 { block: 64 })?;
    /// w.save("weight.safetensors")?;
    /// let same = QuantWeight::load("weight.safetensors", &Device::Cpu)?;
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        safetensors::save(&self.to_tensors("")?, path)
    }

    /// Reads what [`save`](Self::save) wrote, onto a device.
    ///
    /// # Errors
    ///
    /// Those of the file system, of a file that is no safetensors file, and of
    /// [`from_tensors`](Self::from_tensors).
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        Self::from_tensors("", &safetensors::load(path, &Device::Cpu)?)?.to_device(device)
    }

    /// The tensors of a weight for a file, on the CPU, with a prefix to their names, so that a file can have many weights:
    /// `codes`, `scales`, perhaps `zeros` and `order`, and `format`, the scheme and the sizes as text.
    ///
    /// # Errors
    ///
    /// What the driver refuses.
    pub fn to_tensors(&self, prefix: &str) -> Result<HashMap<String, Tensor>> {
        let planes = self.form().plain("QuantWeight::to_tensors", &Device::Cpu)?;
        let format = format(planes.scheme, planes.dims).into_bytes();
        let format = Tensor::new(format.as_slice(), &Device::Cpu)?;
        let named = planes.tensors().into_iter().map(|(name, t)| (name, t.clone()));
        let all = named.chain([(FORMAT, format)]);
        Ok(all.map(|(name, t)| (format!("{prefix}{name}"), t)).collect())
    }

    /// A weight of the tensors that [`to_tensors`](Self::to_tensors) made with this prefix, on their device.
    ///
    /// # Errors
    ///
    /// A missing tensor, a format that there is not, dtypes or shapes that are not the format's, scales that are infinite or
    /// NaN, zero points over 16, an order in which a row is missing.
    pub fn from_tensors(prefix: &str, tensors: &HashMap<String, Tensor>) -> Result<Self> {
        const OP: &str = "QuantWeight::from_tensors";
        let find = |name: &str| tensors.get(&format!("{prefix}{name}")).cloned();
        let need = |name: &'static str| {
            find(name).ok_or_else(|| Error::Value {
                op: OP,
                name,
                got: "missing".into(),
                want: format!("a tensor called `{prefix}{name}`"),
                fix: "look at the names in the file",
            })
        };
        let format = need(FORMAT)?;
        let text = match format.dtype() {
            DType::U8 => format.to_device(&Device::Cpu)?.flatten_all()?.to_vec1::<u8>()?,
            _ => Vec::new(),
        };
        let text = String::from_utf8_lossy(&text);
        let (scheme, dims) = parse(&text).ok_or_else(|| Error::Value {
            op: OP,
            name: FORMAT,
            got: format!("{:?}", text.chars().take(80).collect::<String>()),
            want: "a scheme and sizes, as `QuantWeight::to_tensors` writes them".into(),
            fix: "checkpoints of other programs have constructors of their own",
        })?;
        Self::from_planes(
            OP,
            Planes {
                scheme,
                dims,
                codes: need("codes")?,
                scales: need("scales")?,
                zeros: find("zeros"),
                order: find("order").map(|rows| Order::new(OP, &rows)).transpose()?,
                far: false,
            },
        )
    }
}

/// `int4 group=128 zero_points=true k=4096 n=1024`
fn format(scheme: QuantScheme, [k, n]: [usize; 2]) -> String {
    let scheme = match scheme {
        QuantScheme::Int4 { group, zero_points } => {
            format!("int4 group={group} zero_points={zero_points}")
        }
        QuantScheme::Nf4 { block } => format!("nf4 block={block}"),
        QuantScheme::Int8 { per } => format!("int8 per={}", name(per)),
        QuantScheme::Fp8 { per } => format!("fp8 per={}", name(per)),
    };
    format!("{scheme} k={k} n={n}")
}

fn parse(text: &str) -> Option<(QuantScheme, [usize; 2])> {
    let mut words = text.split(' ');
    let kind = words.next()?;
    let mut value = |name: &str| words.next()?.strip_prefix(name)?.strip_prefix('=');
    let per =
        |text: &str| [Per::Tensor, Per::Channel, Per::Block].into_iter().find(|&p| name(p) == text);
    let scheme = match kind {
        "int4" => QuantScheme::Int4 {
            group: value("group")?.parse().ok()?,
            zero_points: value("zero_points")?.parse().ok()?,
        },
        "nf4" => QuantScheme::Nf4 { block: value("block")?.parse().ok()? },
        "int8" => QuantScheme::Int8 { per: per(value("per")?)? },
        "fp8" => QuantScheme::Fp8 { per: per(value("per")?)? },
        _ => return None,
    };
    let dims = [value("k")?.parse().ok()?, value("n")?.parse().ok()?];
    words.next().is_none().then_some((scheme, dims))
}

fn name(per: Per) -> &'static str {
    match per {
        Per::Tensor => "tensor",
        Per::Channel => "channel",
        Per::Block => "block",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn formats() {
        let schemes = [
            QuantScheme::Int4 { group: -1, zero_points: false },
            QuantScheme::Int4 { group: 128, zero_points: true },
            QuantScheme::Nf4 { block: 64 },
            QuantScheme::Int8 { per: Per::Tensor },
            QuantScheme::Int8 { per: Per::Channel },
            QuantScheme::Fp8 { per: Per::Block },
        ];
        for scheme in schemes {
            let text = format(scheme, [3, 70]);
            assert_eq!(parse(&text), Some((scheme, [3, 70])), "{text}");
            assert_eq!(parse(&format!("{text} ")), None);
        }
        for text in ["", "int4", "int2 k=1 n=1", "nf4 block=x k=1 n=1", "nf4 block=64 k=-1 n=1"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
