//! Matrix products in f32.

use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::gemm::{Mat, Product, Threads};
use super::widen::{Wide, widen};
use crate::{op::MatmulProblem, stack::Stack};

/// A product under this many multiplications does not pay for threads of its own.
const SMALL: usize = 1 << 18;

/// All products of a problem, row-major.
pub(crate) fn matmul(problem: &MatmulProblem, a: &CpuStorage, b: &CpuStorage) -> Result<Vec<f32>> {
    let (a, b) = (widen(a, &problem.lhs)?, widen(b, &problem.rhs)?);
    let count = problem.lhs.count();
    Ok(products(count, &a, &b))
}

/// A product with a row-major `[K, n]` weight that all rows share.
pub(crate) fn matmul_dense(
    lhs: &Stack,
    a: &CpuStorage,
    weight: &[f32],
    n: usize,
) -> Result<Vec<f32>> {
    let weight = Wide { data: weight.into(), stack: Stack::row_major(lhs.cols, n) };
    Ok(products(lhs.count(), &widen(a, lhs)?, &weight))
}

fn products(count: usize, a: &Wide, b: &Wide) -> Vec<f32> {
    let (m, n, k) = (a.stack.rows, b.stack.cols, a.stack.cols);
    let mut out = vec![0f32; count * m * n];
    if out.is_empty() || k == 0 {
        return out;
    }
    // Many small products share the threads; a large one has them all.
    let threads = if count > 1 && m * n * k < SMALL { Threads::One } else { Threads::All };
    let product = Product { m, n, k, factor: 1.0, add: false, threads };
    let one = |(i, out): (usize, &mut [f32])| {
        product.run(out, matrix(a, i), matrix(b, i));
    };
    match threads {
        Threads::One => out.par_chunks_mut(m * n).enumerate().for_each(one),
        Threads::All => out.chunks_mut(m * n).enumerate().for_each(one),
    }
    out
}

/// Matrix `i` of a stack; a stack of one serves all.
fn matrix<'a>(wide: &'a Wide, i: usize) -> Mat<'a> {
    let i = if wide.stack.count() == 1 { 0 } else { i };
    Mat {
        data: &wide.data[wide.stack.matrix_offset(i)..],
        row_stride: wide.stack.row_stride,
        col_stride: wide.stack.col_stride,
    }
}
