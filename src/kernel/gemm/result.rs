//! Stores by threads: bounds, scale, bias, activation, rounding.

use super::terms::{Lines, Sum, Terms};
use crate::kernel::Element;
use crate::ptx::Reg;

/// Sums, added to what is there.
fn add_to<'k, const N: usize>(
    sums: &[Reg<'k, f32>],
    there: [Reg<'k, f32>; N],
) -> Vec<Reg<'k, f32>> {
    sums.iter().zip(there).map(|(&sum, there)| sum + there).collect()
}

/// A tile of a result `[batch, rows, cols]` without gaps.
pub(in crate::kernel) struct TileOfResult<'k> {
    pub terms: Terms<'k>,
    /// The result's address.
    pub out: Reg<'k, u64>,
    pub rows: Reg<'k, u32>,
    pub cols: Reg<'k, u32>,
    /// The tile's first row and column.
    pub first: (Reg<'k, u32>, Reg<'k, u32>),
    pub batch: Reg<'k, u32>,
}

impl<'k> TileOfResult<'k> {
    /// Stores 1 or 4 sums side by side, from the tile's row `line` and column `col` on, unless
    /// they lie outside the result or `inside` does not hold. `cols` is a multiple of their number.
    pub fn store<S: Sum>(
        &self,
        sums: &[Reg<'k, S>],
        line: Reg<'k, u32>,
        col: Reg<'k, u32>,
        inside: Option<Reg<'k, bool>>,
    ) {
        self.finish(sums, None, line, col, inside);
    }

    /// The same of sums that are multiplied with others after their activation.
    pub fn store_times<S: Sum>(
        &self,
        sums: &[Reg<'k, S>],
        by: &[Reg<'k, f32>],
        line: Reg<'k, u32>,
        col: Reg<'k, u32>,
        inside: Option<Reg<'k, bool>>,
    ) {
        self.finish(sums, Some(by), line, col, inside);
    }

    fn finish<S: Sum>(
        &self,
        sums: &[Reg<'k, S>],
        by: Option<&[Reg<'k, f32>]>,
        line: Reg<'k, u32>,
        col: Reg<'k, u32>,
        inside: Option<Reg<'k, bool>>,
    ) {
        let (k, out) = (line.kernel(), self.terms.epilogue.out);
        let (row, col) = (self.first.0 + line, self.first.1 + col);
        let mut valid = row.lt(self.rows) & col.lt(self.cols);
        if let Some(inside) = inside {
            valid = valid & inside;
        }
        let of_cols = match sums.len() {
            4 => self.terms.lines::<4>(Lines::Columns, col, || valid).to_vec(),
            _ => self.terms.lines::<1>(Lines::Columns, col, || valid).to_vec(),
        };
        let [of_row] = match self.terms.has_rows() {
            true => self.terms.lines(Lines::Rows, self.batch * self.rows + row, || valid),
            false => [self.terms.line(Lines::Rows)],
        };
        let done = sums.iter().zip(of_cols).map(|(&x, col)| self.terms.finish(x, of_row, col));
        let done: Vec<_> = match by {
            None => done.collect(),
            Some(by) => done.zip(by).map(|(x, &by)| x * by).collect(),
        };
        let adds = self.terms.epilogue.adds;
        // (batch · rows + row) · cols + col, in 64 bits.
        let line = self.batch.mul_wide(self.rows) + row.wide();
        let index = line * self.cols.wide() + col.wide();
        let to = self.out + index * u64::from(out.size());
        let done = match (adds, done.len()) {
            (false, _) => done,
            (true, 4) => add_to(&done, k.when(valid, || k.ld_global::<f32, 4>(to))),
            (true, _) => add_to(&done, k.when(valid, || k.ld_global::<f32, 1>(to))),
        };
        match (out, done.as_slice()) {
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
