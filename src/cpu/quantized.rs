//! int8 and int4.

use std::borrow::Cow;

use candle_core::{CpuStorage, Result};
use half::f16;
use rayon::prelude::*;

use super::gemm::{Mat, Product, Threads};
use super::widen::pick;
use crate::check::INT4_GROUP;
use crate::op::View;
use crate::stack::Stack;

/// f32 holds every integer up to 2²⁴, so this many products of int8 (each at most 2¹⁴) are summed
/// exactly by an f32 matrix product, in whatever order.
const EXACT_K: usize = 1 << 10;

/// `scale · Σ a·b`, the sum exact in i32.
pub(crate) fn matmul_int8(lhs: &Stack, rhs: &Stack, scale: f32, a: &[u8], b: &[u8]) -> Vec<f32> {
    let (m, n, k) = (lhs.count() * lhs.rows, rhs.cols, lhs.cols);
    let (a, b) = (signed(lhs, a), signed(rhs, b));
    let mut sums = vec![0i32; m * n];
    let mut part = vec![0f32; m * n];
    for start in (0..k).step_by(EXACT_K) {
        let len = EXACT_K.min(k - start);
        let product = Product { m, n, k: len, factor: 1.0, add: false, threads: Threads::All };
        let (a, b) = (Mat::rows(&a, k), Mat::rows(&b, n));
        let a = Mat { data: &a.data[start.min(a.data.len())..], ..a };
        let b = Mat { data: &b.data[(start * n).min(b.data.len())..], ..b };
        product.run(&mut part, a, b);
        sums.par_iter_mut().zip(&part).for_each(|(sum, part)| *sum += *part as i32);
    }
    sums.into_par_iter().map(|sum| scale * sum as f32).collect()
}

/// The bytes of a view as signed numbers, row-major.
fn signed(stack: &Stack, data: &[u8]) -> Vec<f32> {
    pick(stack, |i| f32::from(data[i] as i8))
}

/// An int8 weight as row-major f32 `[K, N]`, not yet scaled.
pub(crate) fn widen_int8((storage, layout): View<CpuStorage>) -> Result<Vec<f32>> {
    Ok(signed(&Stack::new(layout), storage.as_slice()?))
}

/// An int4 weight as row-major f32 `[K, N]`.
pub(crate) fn dequantize_int4(
    packed: View<CpuStorage>,
    scales: View<CpuStorage>,
) -> Result<Vec<f32>> {
    let (words, steps) = (Stack::new(packed.1), Stack::new(scales.1));
    let words = dense(&words, packed.0.as_slice::<u32>()?);
    let steps = dense(&steps, scales.0.as_slice::<f16>()?);
    let n = packed.1.dims()[1];
    let mut out = vec![0f32; words.len() * 8];
    if out.is_empty() {
        return Ok(out);
    }
    out.par_chunks_mut(n).enumerate().for_each(|(k, row)| {
        let words = &words[k / 8 * n..][..n];
        let steps = &steps[k / INT4_GROUP * n..][..n];
        // Shifts the nibble to the top, then arithmetically down: that extends its sign.
        let up = 28 - 4 * (k % 8) as u32;
        for ((x, word), step) in row.iter_mut().zip(words).zip(steps) {
            *x = ((word << up) as i32 >> 28) as f32 * step.to_f32();
        }
    });
    Ok(out)
}

fn dense<'a, T: Copy + Default + Send + Sync>(stack: &Stack, data: &'a [T]) -> Cow<'a, [T]> {
    match stack.contiguous() {
        Some(offset) => Cow::Borrowed(&data[offset..][..stack.elements()]),
        None => Cow::Owned(pick(stack, |i| data[i])),
    }
}
