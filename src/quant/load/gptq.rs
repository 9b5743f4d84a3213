//! GPTQ (Frantar et al. 2022), as AutoGPTQ, GPTQModel and others write it.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::groups::Groups;
use super::int4::{self, CODES, IN_ORDER, Int4, Packing, Words};
use crate::check;
use crate::cuda;
use crate::error::Error;
use crate::quant::QuantWeight;

/// How GPTQ's files store zero points.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum GptqFormat {
    /// Minus one (`"checkpoint_format": "gptq"`, and where a configuration says nothing). A whole word has 0x11111111
    /// less, as GPTQModel writes it, so that a zero point of 0 takes its one from the next column's.
    V1,
    /// As they are (`"checkpoint_format": "gptq_v2"`).
    V2,
}

impl QuantWeight {
    /// From the tensors of a layer quantised by GPTQ to four bits: `W[k, n] = scales[g, n] · (q[k, n] − z[g, n])`, `g`
    /// being `g_idx[k]`.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `qweight` | `[⌈K/8⌉, N]`, the lowest k in the lowest four bits | i32 or u32 |
    /// | `qzeros` | `[G, ⌈N/8⌉]`, the lowest n in the lowest four bits | i32 or u32 |
    /// | `scales` | `[G, N]` | f16, bf16 or f32 |
    /// | `g_idx` | `[K]` | i32, u32 or i64 |
    ///
    /// A group is 32 or 64 rows, a multiple of 128, or all. Without `g_idx` groups follow each other. With one that
    /// takes rows in another order (`desc_act`), the weight keeps that order, and products gather x's columns by it. One of
    /// zeros, where there are several groups, is none.
    /// Where all zero points are 8 (`sym`) the weight has none.
    ///
    /// Which [`GptqFormat`] the zero points have, no tensor says. If all are stored as 7 it is v1, if as 8 v2;
    /// otherwise the one with which the mean of `q − z` is about 0, as that of a layer's weights is. If it is about 0
    /// with neither, that is an error, and [`from_gptq_with`](Self::from_gptq_with) takes the format from you.
    ///
    /// # Errors
    ///
    /// Another dtype, shapes that do not belong together, another size of groups, a group in `g_idx` that there is not
    /// or that has more or fewer rows than the others, a scale that is infinite or NaN, a tracked input.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use kaio_candle::quant::{QuantScheme, QuantWeight};
    ///
    /// // 32 rows and 8 columns: codes 0 to 7 again and again, a zero point of 8 and a scale of 0.5.
    /// let qweight = Tensor::full(0x7654_3210_u32, (4, 8), &Device::Cpu)?;
    /// let qzeros = Tensor::full(0x7777_7777_u32, (1, 1), &Device::Cpu)?;
    /// let scales = Tensor::full(0.5f32, (1, 8), &Device::Cpu)?.to_dtype(DType::F16)?;
    /// let weight = QuantWeight::from_gptq(&qweight, &qzeros, &scales, None)?;
    /// assert_eq!(weight.dims2(), (32, 8));
    /// assert_eq!(weight.scheme(), QuantScheme::Int4 { group: -1, zero_points: false });
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_gptq(
        qweight: &Tensor,
        qzeros: &Tensor,
        scales: &Tensor,
        g_idx: Option<&Tensor>,
    ) -> Result<Self> {
        load("QuantWeight::from_gptq", [qweight, qzeros, scales], g_idx, None)
    }

    /// [`from_gptq`](Self::from_gptq) of a format that you know.
    ///
    /// # Errors
    ///
    /// Those of `from_gptq`, but that the format cannot be told.
    pub fn from_gptq_with(
        qweight: &Tensor,
        qzeros: &Tensor,
        scales: &Tensor,
        g_idx: Option<&Tensor>,
        format: GptqFormat,
    ) -> Result<Self> {
        load("QuantWeight::from_gptq_with", [qweight, qzeros, scales], g_idx, Some(format))
    }
}

fn load(
    op: &'static str,
    [qweight, qzeros, scales]: [&Tensor; 3],
    g_idx: Option<&Tensor>,
    format: Option<GptqFormat>,
) -> Result<QuantWeight> {
    let mut args = vec![("qweight", qweight), ("qzeros", qzeros), ("scales", scales)];
    args.extend(g_idx.map(|t| ("g_idx", t)));
    super::tensors(op, &args)?;
    const FIX: &str = "take all tensors from one layer, of four bits";
    super::words(op, args[0], "[K/8, N]", FIX)?;
    super::words(op, args[1], "[groups, N/8]", FIX)?;
    check::rank(op, args[2], 2..=2, "[groups, N]", FIX)?;
    let g_idx = g_idx.map(|t| super::integers(op, ("g_idx", t), "[K]")).transpose()?;

    let (rows, n) = qweight.dims2()?;
    let (count, columns) = scales.dims2()?;
    let k = g_idx.as_ref().map_or(rows.saturating_mul(CODES), Vec::len);
    let why = format!("K/8 for the K = {k} of `g_idx`");
    check::dim(op, "qweight", ("rows", rows), (k.div_ceil(CODES), why), FIX)?;
    check::dim(op, "scales", ("N", columns), (n, "the N of `qweight`"), FIX)?;
    let [zero_rows, zero_columns] = [qzeros.dims()[0], qzeros.dims()[1]];
    check::dim(op, "qzeros", ("groups", zero_rows), (count, "those of `scales`"), FIX)?;
    let why = format!("N/8 for the N = {n} of `qweight`");
    check::dim(op, "qzeros", ("columns", zero_columns), (n.div_ceil(CODES), why), FIX)?;

    // Of several groups, one that nobody filled in: ExLlama and others take it for none, too.
    let g_idx = g_idx.filter(|g_idx| count <= 1 || g_idx.iter().any(|&group| group != 0));
    let by = g_idx.as_deref().map(|g_idx| ("g_idx", g_idx));
    let groups = Groups::new(op, k, ("scales", count), by)?;
    let size = groups.size;
    let zero_words = super::bits(qzeros)?;
    let stored = Stored { op, dims: [k, n], words: qweight, zero_words: &zero_words, size };
    let zeros = match format {
        Some(format) => stored.zeros(format),
        None => stored.zeros(stored.format()?),
    };
    let words = Words { tensor: qweight, packing: Packing::Rows };
    Int4 { op, dims: [k, n], words, scales, zeros: Some(zeros), groups }.weight()
}

/// What the format is told by.
struct Stored<'a> {
    op: &'static str,
    dims: [usize; 2],
    words: &'a Tensor,
    zero_words: &'a [u32],
    /// Rows that share a zero point.
    size: usize,
}

impl Stored<'_> {
    /// Zero points from 0 to 15.
    fn zeros(&self, format: GptqFormat) -> Vec<u8> {
        let n = self.dims[1];
        match format {
            GptqFormat::V1 => {
                let words: Vec<u32> =
                    self.zero_words.iter().map(|word| word.wrapping_add(0x1111_1111)).collect();
                int4::zeros(&words, n, IN_ORDER)
            }
            GptqFormat::V2 => int4::zeros(self.zero_words, n, IN_ORDER),
        }
    }

    fn format(&self) -> Result<GptqFormat> {
        /// The farthest from 0 that the mean of `q − z` may be. With the other format it is about 1 further off. Of
        /// random weights it is 2.5 / √(K·N) or so: 0.1 for 640 of them, 0.0006 for 4096².
        const NEAR: f64 = 0.35;
        let stored = self.zeros(GptqFormat::V2);
        for (zero, format) in [(7, GptqFormat::V1), (8, GptqFormat::V2)] {
            if self.words.elem_count() == 0 || stored.iter().all(|&z| z == zero) {
                return Ok(format);
            }
        }
        let code = self.mean_code()?;
        let [v1, v2] = [GptqFormat::V1, GptqFormat::V2]
            .map(|format| code - self.mean_zero(&self.zeros(format)));
        match (v1.abs() < NEAR, v2.abs() < NEAR) {
            (true, false) => Ok(GptqFormat::V1),
            (false, true) => Ok(GptqFormat::V2),
            _ => Err(Error::Value {
                op: self.op,
                name: "qzeros",
                got: format!(
                    "such that the mean of codes less zero points is {v1:.2} as v1 and {v2:.2} as v2"
                ),
                want: "about 0 with one of them, as with a layer's weights".into(),
                fix: "see `checkpoint_format` in the file's configuration, and take `from_gptq_with`",
            }
            .into()),
        }
    }

    /// The mean of all codes, of which there are some.
    fn mean_code(&self) -> Result<f64> {
        let [k, n] = self.dims;
        let sum = match self.words.device().is_cuda() {
            true => cuda::sum_of_codes(self.op, self.words, self.dims)?,
            false => {
                let sum = |(row, words): (usize, &[u32])| -> u64 {
                    let used = (k - row * CODES).min(CODES);
                    let kept = u32::MAX >> (4 * (CODES - used));
                    words.iter().map(|&word| u64::from(nibbles(word & kept))).sum()
                };
                let words = super::bits(self.words)?;
                words.par_chunks(n).enumerate().map(sum).sum::<u64>() as f64
            }
        };
        Ok(sum / (k * n) as f64)
    }

    /// The mean of all rows' zero points.
    fn mean_zero(&self, zeros: &[u8]) -> f64 {
        let [k, n] = self.dims;
        let sum = |(group, zeros): (usize, &[u8])| -> usize {
            let rows = self.size.min(k - group * self.size);
            rows * zeros.iter().map(|&zero| usize::from(zero)).sum::<usize>()
        };
        let sum: usize = zeros.chunks(n.max(1)).enumerate().map(sum).sum();
        sum as f64 / (k * n) as f64
    }
}

/// The sum of a word's nibbles.
fn nibbles(word: u32) -> u32 {
    let pairs = (word & 0x0F0F_0F0F) + ((word >> 4) & 0x0F0F_0F0F);
    pairs.wrapping_mul(0x0101_0101) >> 24
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nibbles_are_added() {
        assert_eq!([0, 1, 0x1234_5678, u32::MAX].map(nibbles), [0, 1, 36, 120]);
    }

    #[test]
    fn a_g_idx_of_zeros_is_none() -> Result<()> {
        let at = &candle_core::Device::Cpu;
        let qweight = Tensor::arange(0u32, 8 * 8, at)?.reshape((8, 8))?;
        let qzeros = Tensor::full(0x7777_7777_u32, (2, 1), at)?;
        let scales = Tensor::rand(0.5f32, 1., (2, 8), at)?;
        let load = |g_idx: Option<&Tensor>| {
            let weight = QuantWeight::from_gptq(&qweight, &qzeros, &scales, g_idx)?;
            weight.dequantize(candle_core::DType::F32)?.to_vec2::<f32>()
        };
        let zeros = Tensor::zeros(64, candle_core::DType::U32, at)?;
        assert_eq!(load(Some(&zeros))?, load(None)?);
        Ok(())
    }
}
