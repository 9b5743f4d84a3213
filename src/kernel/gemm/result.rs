//! Stores by threads: bounds, bias, activation, rounding.

use super::Epilogue;
use crate::kernel::Element;
use crate::ptx::Reg;

/// A tile of a result `[batch, rows, cols]` without gaps.
pub(in crate::kernel) struct TileOfResult<'k> {
    pub epilogue: Epilogue,
    /// The result's address.
    pub out: Reg<'k, u64>,
    pub rows: Reg<'k, u32>,
    pub cols: Reg<'k, u32>,
    /// The bias's address, if there is one.
    pub bias: Option<Reg<'k, u64>>,
    /// The tile's first row and column.
    pub first: (Reg<'k, u32>, Reg<'k, u32>),
    pub batch: Reg<'k, u32>,
}

impl<'k> TileOfResult<'k> {
    /// Stores 1 or 4 sums side by side, from the tile's row `line` and column `col` on, unless
    /// they lie outside the result or `inside` does not hold. `cols` is a multiple of their number.
    pub fn store(
        &self,
        sums: &[Reg<'k, f32>],
        line: Reg<'k, u32>,
        col: Reg<'k, u32>,
        inside: Option<Reg<'k, bool>>,
    ) {
        let (k, epilogue) = (line.kernel(), &self.epilogue);
        let (row, col) = (self.first.0 + line, self.first.1 + col);
        let mut valid = row.lt(self.rows) & col.lt(self.cols);
        if let Some(inside) = inside {
            valid = valid & inside;
        }
        let bias: Option<Vec<_>> = self.bias.map(|address| {
            let from = address.element(col, epilogue.bias_size());
            match sums.len() {
                4 => epilogue.load_bias::<4>(k, from, valid).to_vec(),
                _ => epilogue.load_bias::<1>(k, from, valid).to_vec(),
            }
        });
        let bias = |i: usize| bias.as_ref().map(|bias| bias[i]);
        let done: Vec<_> =
            sums.iter().enumerate().map(|(i, &x)| epilogue.finish(x, bias(i))).collect();
        // (batch · rows + row) · cols + col, in 64 bits.
        let line = self.batch.mul_wide(self.rows) + row.wide();
        let index = line * self.cols.wide() + col.wide();
        let to = self.out + index * u64::from(epilogue.out.size());
        match (epilogue.out, done.as_slice()) {
            (Element::F32, &[a, b, c, d]) => k.when(valid, || k.st_global(to, [a, b, c, d])),
            (Element::F32, &[x]) => k.when(valid, || k.st_global(to, [x])),
            (Element::Half(half), &[a, b, c, d]) => {
                let pairs = [k.cvt_rn_x2(half, a, b), k.cvt_rn_x2(half, c, d)];
                k.when(valid, || k.st_global(to, pairs));
            }
            (Element::Half(half), &[x]) => {
                let narrow = k.cvt_rn(half, x);
                k.when(valid, || k.st_global(to, [narrow]));
            }
            _ => unreachable!("1 or 4 sums"),
        }
    }
}
