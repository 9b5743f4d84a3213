//! AWQ (Lin et al. 2023), the layout that AutoAWQ calls `gemm`.

use candle_core::{Result, Tensor};
use rayon::prelude::*;

use super::groups::Groups;
use super::int4::{self, CODES, Int4, Packing, Words};
use crate::check;
use crate::quant::QuantWeight;

/// Where a word has each of its eight columns.
pub(super) const PLACES: [u8; CODES] = [0, 4, 1, 5, 2, 6, 3, 7];

impl QuantWeight {
    /// From the tensors of a layer quantised by AWQ to four bits: `W[k, n] = scales[g, n] · (q[k, n] − z[g, n])`.
    ///
    /// | argument | shape | dtype |
    /// |---|---|---|
    /// | `qweight` | `[K, N/8]`, columns 0, 2, 4, 6, 1, 3, 5, 7 of eight from the lowest four bits on | i32 or u32 |
    /// | `qzeros` | `[G, N/8]`, in the same order | i32 or u32 |
    /// | `scales` | `[G, N]` | f16, bf16 or f32 |
    ///
    /// That is the layout `gemm`; those called `gemv` and `gemv_fast` have other shapes and are refused. A group is 32 or
    /// 64 rows, a multiple of 128, or all. Where all zero points are 8 the weight has none.
    ///
    /// # Errors
    ///
    /// Another dtype, shapes that do not belong together, another size of groups, a scale that is infinite or NaN, a
    /// tracked input.
    ///
    /// ```
    /// # use candle_core::{DType, Device, Tensor};
    /// use kaio_candle::quant::{QuantScheme, QuantWeight};
    ///
    /// let qweight = Tensor::full(0x7531_6420_u32, (64, 1), &Device::Cpu)?;
    /// let qzeros = Tensor::new(&[[0x8888_8888_u32], [0x7777_7777]], &Device::Cpu)?;
    /// let scales = Tensor::full(0.5f32, (2, 8), &Device::Cpu)?.to_dtype(DType::F16)?;
    /// let weight = QuantWeight::from_awq(&qweight, &qzeros, &scales)?;
    /// assert_eq!(weight.dims2(), (64, 8));
    /// assert_eq!(weight.scheme(), QuantScheme::Int4 { group: 32, zero_points: true });
    /// # Ok::<(), candle_core::Error>(())
    /// ```
    pub fn from_awq(qweight: &Tensor, qzeros: &Tensor, scales: &Tensor) -> Result<Self> {
        const OP: &str = "QuantWeight::from_awq";
        const FIX: &str = "take all tensors from one layer, of four bits and the layout `gemm`";
        let args = [("qweight", qweight), ("qzeros", qzeros), ("scales", scales)];
        super::tensors(OP, &args)?;
        super::words(OP, args[0], "[K, N/8]", FIX)?;
        super::words(OP, args[1], "[groups, N/8]", FIX)?;
        check::rank(OP, args[2], 2..=2, "[groups, N]", FIX)?;

        let [k, words_of_row] = [qweight.dims()[0], qweight.dims()[1]];
        let (count, n) = scales.dims2()?;
        let why = "eight for each word of `qweight`";
        check::dim(OP, "scales", ("N", n), (words_of_row.saturating_mul(CODES), why), FIX)?;
        let [zero_rows, zero_columns] = [qzeros.dims()[0], qzeros.dims()[1]];
        check::dim(OP, "qzeros", ("groups", zero_rows), (count, "those of `scales`"), FIX)?;
        let why = "the columns of `qweight`";
        check::dim(OP, "qzeros", ("columns", zero_columns), (words_of_row, why), FIX)?;

        let groups = Groups::new(OP, k, ("scales", count), None)?;
        let zeros = Some(int4::zeros(&super::bits(qzeros)?, n, PLACES));
        let words = Words { tensor: qweight, packing: Packing::Columns };
        Int4 { op: OP, dims: [k, n], words, scales, zeros, groups }.weight()
    }
}

/// Words of eight rows of a column, from words of eight columns of a row.
pub(super) fn along_k(words: &[u32], [k, n]: [usize; 2]) -> Vec<u32> {
    let mut to = vec![0; k.div_ceil(CODES) * n];
    if n == 0 {
        return to;
    }
    let rows = words.par_chunks(n);
    to.par_chunks_mut(n).zip(rows).for_each(|(to, rows)| {
        for (place, row) in rows.chunks(n / CODES).enumerate() {
            for (to, word) in to.chunks_exact_mut(CODES).zip(row) {
                for (to, from) in to.iter_mut().zip(PLACES) {
                    *to |= ((word >> (4 * from)) & 15) << (4 * place);
                }
            }
        }
    });
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_turned() {
        // Row k has the codes k, k + 1, .. in its columns, modulo 16.
        let row = |k: u32| {
            let column = [0, 2, 4, 6, 1, 3, 5, 7].map(|col| (k + col) % 16);
            column.into_iter().rev().fold(0, |word, code| (word << 4) | code)
        };
        let words: Vec<u32> = (0..10).flat_map(|k| [row(k), row(k + 8)]).collect();
        let to = along_k(&words, [10, 16]);
        for (i, word) in to.into_iter().enumerate() {
            let (block, col) = (i as u32 / 16, i as u32 % 16);
            let rows = (8 * block..10).take(8);
            let want = rows.rev().fold(0, |word, k| (word << 4) | ((k + col) % 16));
            assert_eq!(word, want, "word {i}");
        }
    }
}
