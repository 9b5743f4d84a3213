//! A bounds-checked door to the `gemm` crate.
#![allow(unsafe_code)]

use ::gemm::Parallelism;

/// A strided matrix that begins at `data[0]`.
#[derive(Clone, Copy)]
pub(super) struct Mat<'a> {
    pub data: &'a [f32],
    pub row_stride: usize,
    pub col_stride: usize,
}

impl<'a> Mat<'a> {
    /// A row-major matrix without gaps.
    pub fn rows(data: &'a [f32], cols: usize) -> Self {
        Self { data, row_stride: cols, col_stride: 1 }
    }

    pub fn t(self) -> Self {
        Self { row_stride: self.col_stride, col_stride: self.row_stride, ..self }
    }

    /// The strides of a matrix of this size, which is not empty, once they are known to stay inside
    /// its slice. Those of a single row or column are never used, and may be anything.
    fn strides(&self, rows: usize, cols: usize) -> (isize, isize) {
        let side = |len: usize, stride: usize| match isize::try_from(stride) {
            Ok(signed) => Some(((len - 1).checked_mul(stride)?, signed)),
            Err(_) => (len == 1).then_some((0, 0)),
        };
        let sides = side(rows, self.row_stride).zip(side(cols, self.col_stride));
        let inside = sides.filter(|((rows, _), (cols, _))| {
            rows.checked_add(*cols).is_some_and(|last| last < self.data.len())
        });
        let ((_, row_stride), (_, col_stride)) = inside.expect("the matrix stays inside its slice");
        (row_stride, col_stride)
    }
}

/// `out (+)= factor · lhs·rhs`, where `out` is row-major `[m, n]` and is not read unless added to.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub factor: f32,
    pub add: bool,
}

impl Product {
    pub fn run(self, out: &mut [f32], lhs: Mat, rhs: Mat) {
        let Product { m, n, k, factor, add } = self;
        if m == 0 || n == 0 {
            return;
        }
        // A size that wraps must not pass for a small one.
        let len = m.checked_mul(n).expect("the product's size is a number");
        let out = &mut out[..len];
        if k == 0 {
            if !add {
                out.fill(0.0);
            }
            return;
        }
        let (lhs_rows, lhs_cols) = lhs.strides(m, k);
        let (rhs_rows, rhs_cols) = rhs.strides(k, n);
        // SAFETY: `strides` has seen that every element of the operands lies inside its slice; `out` has
        // the m·n elements of its rows of n, which fit an isize as all slices do, and is borrowed
        // mutably, so it does not overlap the operands.
        unsafe {
            ::gemm::gemm(
                m,
                n,
                k,
                out.as_mut_ptr(),
                1,
                n as isize,
                add,
                lhs.data.as_ptr(),
                lhs_cols,
                lhs_rows,
                rhs.data.as_ptr(),
                rhs_cols,
                rhs_rows,
                1.0,
                factor,
                false,
                false,
                false,
                // Other products run beside this one.
                Parallelism::None,
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(m: usize, n: usize, k: usize, lhs: Mat, rhs: Mat) {
        let product = Product { m, n, k, factor: 1.0, add: false };
        product.run(&mut [0.0; 4], lhs, rhs);
    }

    /// `m·n` is 4 more than 2⁶⁴.
    #[test]
    #[should_panic(expected = "the product's size is a number")]
    fn a_size_that_wraps_is_refused() {
        let one = |row_stride| Mat { data: &[1.0], row_stride, col_stride: 0 };
        run(((1 << 62) + 1) / 5, 20, 1, one(0), one(0));
    }

    #[test]
    #[should_panic(expected = "the matrix stays inside its slice")]
    fn a_stride_that_wraps_is_refused() {
        let lhs = Mat { data: &[1.0; 4], row_stride: 1 << 63, col_stride: 1 };
        run(3, 1, 1, lhs, Mat::rows(&[1.0], 1));
    }

    #[test]
    fn strides_of_single_rows_are_not_used() {
        let lhs = Mat { data: &[2.0], row_stride: usize::MAX, col_stride: usize::MAX };
        let mut out = [0.0];
        let product = Product { m: 1, n: 1, k: 1, factor: 1.0, add: false };
        product.run(&mut out, lhs, lhs);
        assert_eq!(out, [4.0]);
    }
}
