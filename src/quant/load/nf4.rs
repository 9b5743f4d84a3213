//! nf4 as bitsandbytes writes it.

use candle_core::{DType, Device, Result, Tensor};
use half::{bf16, f16};
use serde_json::{Map, Value};

use super::groups::Groups;
use super::int4::{self, CODES, Packing, Words};
use crate::check;
use crate::error::Error;
use crate::quant::{QuantScheme, QuantWeight};

const OP: &str = "QuantWeight::from_nf4";

impl QuantWeight {
    /// From the tensors of a layer that bitsandbytes quantised to nf4: `W[k, n] = T[q[n, k]] · absmax[n, k / block]`,
    /// T being the sixteen values of nf4.
    ///
    /// | argument | in a file | shape | dtype |
    /// |---|---|---|---|
    /// | `weight` | `weight` | any, of N·K/2 bytes; row by row of `[N, K]`, the first of two in the higher four bits | u8; f16, bf16 or f32 as whose bytes they were stored (`bnb_4bit_quant_storage`) |
    /// | `absmax` | `weight.absmax` | one for each block of K | f32; with `nested` u8 |
    /// | `quant_state` | `weight.quant_state.bitsandbytes__nf4` | `[..]`, JSON | u8 |
    /// | `nested` | `weight.nested_absmax`, `weight.nested_quant_map` | one for each block of `absmax`, `[256]` | f32 |
    ///
    /// A block is 32 or 64 elements, or a multiple of 128, and K a multiple of it. With `nested` scales ("double
    /// quantisation") `absmax` has codes of eight bits; the weight's scales are then computed as bitsandbytes does, in
    /// f32, and take four bytes a block instead of one.
    ///
    /// # Errors
    ///
    /// Another dtype, sizes that do not belong together, JSON that does not say what it should, blocks that go from one
    /// row into the next, another size of blocks, a scale that is infinite or NaN, a tracked input.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// use kaio_candle::quant::{QuantScheme, QuantWeight};
    ///
    /// let weight = Tensor::full(0xF0_u8, (3 * 64 / 2, 1), &Device::Cpu)?; // 1, −1, 1, ..
    /// let absmax = Tensor::new(&[0.5f32, 1., 2.], &Device::Cpu)?;
    /// let json = br#"{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 64]}"#;
    /// let state = Tensor::new(json.as_slice(), &Device::Cpu)?;
    /// let weight = QuantWeight::from_nf4(&weight, &absmax, &state, None)?;
    /// assert_eq!(weight.dims2(), (64, 3));
    /// assert_eq!(weight.scheme(), QuantScheme::Nf4 { block: 64 });
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_nf4(
        weight: &Tensor,
        absmax: &Tensor,
        quant_state: &Tensor,
        nested: Option<(&Tensor, &Tensor)>,
    ) -> Result<Self> {
        let mut args = vec![("weight", weight), ("absmax", absmax), ("quant_state", quant_state)];
        if let Some((absmax, map)) = nested {
            args.extend([("nested_absmax", absmax), ("nested_quant_map", map)]);
        }
        super::tensors(OP, &args)?;
        super::dtype(OP, args[0], &[DType::U8, DType::F16, DType::BF16, DType::F32])?;
        super::dtype(OP, args[2], &[DType::U8])?;
        let state = State::of(&super::host(quant_state)?.to_vec1()?)?;
        let State { dims: [n, k], block, .. } = state;
        if weight.elem_count() * weight.dtype().size_in_bytes() != n * k / 2 {
            // Floats that are more are bytes that were cast.
            super::dtype(OP, args[0], &[DType::U8])?;
        }
        let weight = &bytes(weight)?;

        const FIX: &str = "take all tensors from one layer";
        let why = format!("two of the {n} × {k} of `quant_state` in each");
        check::dim(OP, "weight", ("bytes", weight.elem_count()), (n * k / 2, why), FIX)?;
        let groups = Groups::of_size(OP, "absmax", k, block)?;
        let per_row = k / block;
        let count = args[1].1.elem_count();
        let why = format!("one for {block} of the {n} × {k} of `quant_state`");
        check::dim(OP, "absmax", ("elements", count), (n * per_row, why), FIX)?;
        let absmax = match nested {
            None if absmax.dtype() == DType::U8 && state.nested.is_some() => {
                return Err(Error::Value {
                    op: OP,
                    name: "nested",
                    got: "missing".into(),
                    want: "the scales of `absmax`, which `quant_state` says is quantised itself"
                        .into(),
                    fix: "take `weight.nested_absmax` and `weight.nested_quant_map` as well",
                }
                .into());
            }
            None => {
                super::dtype(OP, args[1], &[DType::F32])?;
                absmax.clone()
            }
            // Bytes: a sixty-fourth of the codes at most, which are two in a byte.
            Some(nested) => Tensor::from_vec(state.absmax(absmax, nested)?, count, &Device::Cpu)?,
        };
        let scales = absmax.reshape((n, per_row))?;
        super::scales(OP, ("absmax", &scales))?;
        let scales = scales.t()?;
        let words = Words { tensor: weight, packing: Packing::Bytes };
        let scheme = QuantScheme::Nf4 { block: groups.group as usize };
        int4::weight(OP, scheme, [k, n], &words, &scales, None, &groups)
    }
}

/// The bytes of codes that lie in a tensor of floats.
fn bytes(weight: &Tensor) -> Result<Tensor> {
    let floats = || super::host(weight);
    let bytes: Vec<u8> = match weight.dtype() {
        DType::F16 => floats()?.to_vec1::<f16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::BF16 => floats()?.to_vec1::<bf16>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        DType::F32 => floats()?.to_vec1::<f32>()?.iter().flat_map(|x| x.to_le_bytes()).collect(),
        _ => return Ok(weight.clone()),
    };
    let count = bytes.len();
    Tensor::from_vec(bytes, count, weight.device())
}

/// Words of bytes, four in each.
pub(super) fn words(bytes: &[u8]) -> Vec<u32> {
    let words = bytes.as_chunks::<{ CODES / 2 }>().0.iter();
    words.map(|&word| in_order(u32::from_le_bytes(word))).collect()
}

/// A word whose bytes have the first of two codes in their higher four bits, with it in the lower ones.
fn in_order(word: u32) -> u32 {
    ((word & 0x0F0F_0F0F) << 4) | ((word >> 4) & 0x0F0F_0F0F)
}

/// What the JSON says.
#[derive(Debug, PartialEq)]
struct State {
    /// N and K, the latter a multiple of the block.
    dims: [usize; 2],
    block: usize,
    /// Blocks of absmax, and what is added to all of it.
    nested: Option<(usize, f32)>,
}

impl State {
    fn of(json: &[u8]) -> Result<Self> {
        let bad = |got, want: &str| -> candle_core::Error {
            let fix = "take the tensor `weight.quant_state.bitsandbytes__nf4` as it is in the file";
            Error::Value { op: OP, name: "quant_state", got, want: want.into(), fix }.into()
        };
        let fields: Map<String, Value> = serde_json::from_slice(json)
            .map_err(|e| bad(format!("no JSON object ({e})"), "one"))?;
        let field = |name: &str| match fields.get(name) {
            None => format!("without `{name}`"),
            Some(value) => format!("of `{name}` {value}"),
        };
        let size = |value: &Value| value.as_u64().and_then(|n| usize::try_from(n).ok());
        let block = |name| {
            let block = fields.get(name).and_then(size).filter(|&block| block > 0);
            block.ok_or_else(|| bad(field(name), "a number of elements"))
        };

        if fields.get("quant_type").and_then(Value::as_str) != Some("nf4") {
            return Err(bad(field("quant_type"), "\"nf4\""));
        }
        let shape = fields.get("shape").and_then(Value::as_array).map(Vec::as_slice);
        let dims = match shape {
            Some([n, k]) => size(n).zip(size(k)),
            _ => None,
        };
        let dims = dims.filter(|&(n, k)| n.checked_mul(k).is_some());
        let Some((n, k)) = dims else {
            return Err(bad(field("shape"), "[N, K]"));
        };
        let block_of_weight = block("blocksize")?;
        if !k.is_multiple_of(block_of_weight) {
            let want = format!("blocks of {block_of_weight} within rows: a multiple of it as K");
            return Err(bad(field("shape"), &want));
        }
        let nested = match fields.get("nested_offset") {
            None => None,
            Some(offset) => {
                let offset = offset.as_f64().map(|offset| offset as f32);
                let offset = offset.ok_or_else(|| bad(field("nested_offset"), "a number"))?;
                Some((block("nested_blocksize")?, offset))
            }
        };
        Ok(Self { dims: [n, k], block: block_of_weight, nested })
    }

    /// Scales that are quantised themselves.
    fn absmax(&self, codes: &Tensor, (absmax, map): (&Tensor, &Tensor)) -> Result<Vec<f32>> {
        let Some((block, offset)) = self.nested else {
            return Err(Error::Conflict {
                op: OP,
                name: "nested",
                with: "quant_state",
                fix: "the latter says nothing of nested scales: take all tensors from one layer",
            }
            .into());
        };
        super::dtype(OP, ("absmax", codes), &[DType::U8])?;
        let floats = |arg, t: &Tensor, want: usize, why: String| -> Result<Vec<f32>> {
            super::dtype(OP, (arg, t), &[DType::F32])?;
            let fix = "take all tensors from one layer";
            check::dim(OP, arg, ("elements", t.elem_count()), (want, why), fix)?;
            super::host(t)?.to_vec1()
        };
        let codes = super::host(codes)?.to_vec1::<u8>()?;
        let why = format!("one for {block} of `absmax`");
        let absmax = floats("nested_absmax", absmax, codes.len().div_ceil(block), why)?;
        let map = floats("nested_quant_map", map, 256, "one for each code of `absmax`".into())?;
        let all = codes.chunks(block).zip(absmax);
        // Two roundings, as there.
        let scales = all.flat_map(|(codes, absmax)| {
            codes.iter().map({
                let map = &map;
                move |&code| map[usize::from(code)] * absmax + offset
            })
        });
        Ok(scales.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_put_in_order() {
        assert_eq!(in_order(0x6745_2301), 0x7654_3210);
    }

    #[test]
    fn codes_in_the_bytes_of_floats_are_read() -> Result<()> {
        let at = &Device::Cpu;
        // All bytes, those of NaN among them.
        let codes: Vec<u8> = (0..2 * 64 / 2 * 4).map(|i| (i * 37 + i / 64) as u8).collect();
        let pairs = codes.as_chunks().0;
        let stored = [
            Tensor::from_iter(pairs.iter().map(|&x| f16::from_le_bytes(x)), at)?,
            Tensor::from_iter(pairs.iter().map(|&x| bf16::from_le_bytes(x)), at)?,
            Tensor::from_iter(codes.as_chunks().0.iter().map(|&x| f32::from_le_bytes(x)), at)?,
        ];
        let absmax = Tensor::rand(0.5f32, 1., 8, at)?;
        let state = br#"{"quant_type": "nf4", "blocksize": 64, "shape": [8, 64]}"#;
        let state = Tensor::new(state.as_slice(), at)?;
        let load = |weight: &Tensor| {
            let weight = QuantWeight::from_nf4(weight, &absmax, &state, None)?;
            weight.dequantize(DType::F32)?.to_vec2::<f32>()
        };
        let want = load(&Tensor::new(codes.as_slice(), at)?)?;
        for stored in stored {
            assert_eq!(load(&stored)?, want, "{:?}", stored.dtype());
        }
        Ok(())
    }

    fn state(json: &str) -> Result<State> {
        State::of(json.as_bytes())
    }

    #[test]
    fn json_is_read() -> Result<()> {
        let plain =
            r#"{"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [3, 128]}"#;
        assert_eq!(state(plain)?, State { dims: [3, 128], block: 64, nested: None });
        let nested = r#"{"quant_type": "nf4", "blocksize": 64, "shape": [3, 128], "nested_blocksize": 256,
            "nested_dtype": "float32", "nested_offset": 0.0625}"#;
        let nested_by = Some((256, 0.0625));
        assert_eq!(state(nested)?, State { dims: [3, 128], block: 64, nested: nested_by });
        Ok(())
    }

    #[test]
    fn json_that_says_something_else_is_refused() {
        let cases = [
            ("", "no JSON object"),
            ("[1]", "no JSON object"),
            ("{}", "without `quant_type`"),
            (r#"{"quant_type": "fp4"}"#, "of `quant_type` \"fp4\", wanted \"nf4\""),
            (r#"{"quant_type": "nf4", "blocksize": 64}"#, "without `shape`"),
            (r#"{"quant_type": "nf4", "blocksize": 64, "shape": [64]}"#, "of `shape` [64]"),
            (r#"{"quant_type": "nf4", "blocksize": 64, "shape": [-1, 64]}"#, "of `shape` [-1,64]"),
            (
                r#"{"quant_type": "nf4", "blocksize": 64, "shape": [18446744073709551615, 64]}"#,
                "wanted [N, K]",
            ),
            (r#"{"quant_type": "nf4", "shape": [4, 64]}"#, "without `blocksize`"),
            (r#"{"quant_type": "nf4", "blocksize": 0, "shape": [4, 64]}"#, "of `blocksize` 0"),
            (
                r#"{"quant_type": "nf4", "blocksize": 64, "shape": [4, 96]}"#,
                "blocks of 64 within rows",
            ),
            (
                r#"{"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], "nested_offset": 1}"#,
                "without `nested_blocksize`",
            ),
            (
                r#"{"quant_type": "nf4", "blocksize": 64, "shape": [4, 64], "nested_offset": "1"}"#,
                "of `nested_offset` \"1\"",
            ),
        ];
        for (json, message) in cases {
            let error = state(json).unwrap_err().to_string();
            assert!(error.contains(message), "{json}: {error}");
        }
    }
}
