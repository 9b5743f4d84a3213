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

    fn check(&self, rows: usize, cols: usize) {
        let last = (rows - 1) * self.row_stride + (cols - 1) * self.col_stride;
        assert!(last < self.data.len(), "matrix leaves its slice");
    }
}

/// Who works on one product.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Threads {
    /// The calling thread: other products run beside this one.
    One,
    /// All of rayon's.
    All,
}

/// `out (+)= factor · lhs·rhs`, where `out` is row-major `[m, n]` and is not read unless added to.
#[derive(Clone, Copy)]
pub(super) struct Product {
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub factor: f32,
    pub add: bool,
    pub threads: Threads,
}

impl Product {
    pub fn run(self, out: &mut [f32], lhs: Mat, rhs: Mat) {
        let Product { m, n, k, factor, add, threads } = self;
        if m == 0 || n == 0 {
            return;
        }
        if k == 0 {
            if !add {
                out[..m * n].fill(0.0);
            }
            return;
        }
        assert!(m * n <= out.len(), "product leaves its slice");
        lhs.check(m, k);
        rhs.check(k, n);
        let parallelism = match threads {
            Threads::One => Parallelism::None,
            Threads::All => Parallelism::Rayon(rayon::current_num_threads()),
        };
        // SAFETY: the checks above keep every element that the strides reach inside its slice, and
        // `out` is borrowed mutably, so it does not overlap the operands.
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
                lhs.col_stride as isize,
                lhs.row_stride as isize,
                rhs.data.as_ptr(),
                rhs.col_stride as isize,
                rhs.row_stride as isize,
                1.0,
                factor,
                false,
                false,
                false,
                parallelism,
            );
        }
    }
}
