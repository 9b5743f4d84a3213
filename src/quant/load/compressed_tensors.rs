//! compressed-tensors (LLM Compressor, vLLM), the format `pack-quantized`.

use candle_core::{Result, Tensor};

use super::groups::Groups;
use super::int4::{self, CODES, IN_ORDER, Int4, Packing, Words};
use crate::check;
use crate::error::Error;
use crate::quant::QuantWeight;

impl QuantWeight {
    /// From the tensors of a layer that compressed-tensors packed to four bits (`pack-quantized`):
    /// `W[k, n] = weight_scale[n, g] · (q[n, k] − z[n, g])`, codes and zero points from −8 to 7 and stored 8 higher.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `weight_packed` | `[N, ⌈K/8⌉]`, the lowest k in the lowest four bits | i32 or u32 |
    /// | `weight_scale` | `[N, G]` | bf16, f16 or f32 |
    /// | `weight_shape` | `[2]`: N and K | i64, i32 or u32 |
    /// | `weight_zero_point` | `[⌈N/8⌉, G]`, the lowest n in the lowest four bits; where there is none, all are 0 | i32 or u32 |
    /// | `weight_g_idx` | `[K]`, the group of each row of W; −1 for all of them is none | i32, u32 or i64 |
    ///
    /// A group is 32 or 64 rows, a multiple of 128, or all (`channel`). Where all zero points are 0 the weight has none.
    ///
    /// # Errors
    ///
    /// Another dtype, shapes that do not belong together, another size of groups, a group in `weight_g_idx` that there is
    /// not or that has more or fewer rows than the others, a scale that is infinite or NaN, a tracked input.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use kaio_candle::quant::{QuantScheme, QuantWeight};
    ///
    /// let packed = Tensor::full(0x7654_3210_u32, (6, 8), &Device::Cpu)?;
    /// let scale = Tensor::full(0.5f32, (6, 2), &Device::Cpu)?.to_dtype(DType::BF16)?;
    /// let shape = Tensor::new(&[6i64, 64], &Device::Cpu)?;
    /// let weight = QuantWeight::from_compressed_tensors(&packed, &scale, &shape, None, None)?;
    /// assert_eq!(weight.dims2(), (64, 6));
    /// assert_eq!(weight.scheme(), QuantScheme::Int4 { group: 32, zero_points: false });
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_compressed_tensors(
        weight_packed: &Tensor,
        weight_scale: &Tensor,
        weight_shape: &Tensor,
        weight_zero_point: Option<&Tensor>,
        weight_g_idx: Option<&Tensor>,
    ) -> Result<Self> {
        const OP: &str = "QuantWeight::from_compressed_tensors";
        const FIX: &str = "take all tensors from one layer, of four bits";
        let mut args = vec![
            ("weight_packed", weight_packed),
            ("weight_scale", weight_scale),
            ("weight_shape", weight_shape),
        ];
        args.extend(weight_zero_point.map(|t| ("weight_zero_point", t)));
        args.extend(weight_g_idx.map(|t| ("weight_g_idx", t)));
        super::tensors(OP, &args)?;
        super::words(OP, args[0], "[N, K/8]", FIX)?;
        check::rank(OP, args[1], 2..=2, "[N, groups]", FIX)?;
        let shape = super::integers(OP, args[2], "[2]")?;

        let (n, words_of_row) = weight_packed.dims2()?;
        let k = match shape[..] {
            [rows, k] if usize::try_from(rows) == Ok(n) => usize::try_from(k).ok(),
            _ => None,
        };
        let Some(k) = k.filter(|k| k.div_ceil(CODES) == words_of_row) else {
            return Err(Error::Value {
                op: OP,
                name: "weight_shape",
                got: format!("{shape:?}"),
                want: format!(
                    "N = {n} and a K of {words_of_row} words of eight, as of `weight_packed`"
                ),
                fix: FIX,
            }
            .into());
        };
        let (rows, count) = weight_scale.dims2()?;
        check::dim(OP, "weight_scale", ("N", rows), (n, "the N of `weight_packed`"), FIX)?;

        let zeros = weight_zero_point.map(|t| {
            super::words(OP, ("weight_zero_point", t), "[N/8, groups]", FIX)?;
            let (rows, columns) = t.dims2()?;
            let why = format!("N/8 for the N = {n} of `weight_packed`");
            check::dim(OP, "weight_zero_point", ("rows", rows), (n.div_ceil(CODES), why), FIX)?;
            let why = "those of `weight_scale`";
            check::dim(OP, "weight_zero_point", ("groups", columns), (count, why), FIX)?;
            let zero_words = super::transpose(&super::bits(t)?, [rows, columns]);
            Result::Ok(int4::zeros(&zero_words, n, IN_ORDER))
        });
        let zeros = zeros.transpose()?;
        let g_idx = weight_g_idx.map(|t| super::integers(OP, ("weight_g_idx", t), "[K]"));
        let g_idx = g_idx.transpose()?;
        if let Some(g_idx) = &g_idx {
            let why = "the K of `weight_shape`";
            check::dim(OP, "weight_g_idx", ("K", g_idx.len()), (k, why), FIX)?;
        }
        // As the package initialises it: groups follow each other.
        let g_idx = g_idx.filter(|g_idx| g_idx.iter().any(|&group| group != -1));
        let by = g_idx.as_deref().map(|g_idx| ("weight_g_idx", g_idx));
        let groups = Groups::new(OP, k, ("weight_scale", count), by)?;
        super::scales(OP, args[1])?;
        let words = Words { tensor: weight_packed, packing: Packing::Turned };
        let scales = &weight_scale.t()?;
        Int4 { op: OP, dims: [k, n], words, scales, zeros, groups }.weight()
    }
}
