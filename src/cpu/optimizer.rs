//! AdamW and sums over gradients. Each operation of AdamW is rounded once, in the order of the GPU's kernel
//! (`kernel::optimizer`): both give the same bits.

use std::borrow::Cow;

use candle_core::{CpuStorage, Result, Tensor};
use rayon::prelude::*;

use super::widen::packed;
use crate::kernel::optimizer::Betas;
use crate::kernel::optimizer::dynamic::{BLOCK, Book};
use crate::op::View;
use crate::stack::Stack;

/// Elements that one thread takes at a time: whole blocks of codes.
const CHUNK: usize = 1 << 14;
const WIDTH: usize = BLOCK as usize;

/// The numbers of a tensor's step.
#[derive(Clone, Copy, Debug)]
pub(crate) struct AdamWFactors {
    pub betas: Betas,
    /// What gradients are multiplied with.
    pub scale: f32,
    /// The learning rate over the first moment's bias correction.
    pub rate: f32,
    /// What a weight is multiplied with.
    pub keep: f32,
    /// 1 over the root of the second moment's bias correction.
    pub unbias: f32,
}

impl AdamWFactors {
    #[inline(always)]
    fn moments(&self, grad: f32, m: f32, v: f32) -> (f32, f32) {
        let Betas { first: [beta1, rest1], second: [beta2, rest2], .. } = self.betas;
        let grad = grad * self.scale;
        (m * beta1 + grad * rest1, v * beta2 + grad * rest2 * grad)
    }

    #[inline(always)]
    fn weight(&self, p: f32, m: f32, root: f32) -> f32 {
        let below = root * self.unbias + self.betas.epsilon;
        p * self.keep - m / below * self.rate
    }
}

/// A step with moments in f32. All have as many elements.
pub(crate) fn adamw(
    weights: &mut [f32],
    grads: &[f32],
    [first, second]: [&mut [f32]; 2],
    factors: &AdamWFactors,
) {
    let moments = first.par_chunks_mut(CHUNK).zip(second.par_chunks_mut(CHUNK));
    let chunks = weights.par_chunks_mut(CHUNK).zip(grads.par_chunks(CHUNK)).zip(moments);
    chunks.for_each(|((weights, grads), (first, second))| {
        for ((p, &grad), (m, v)) in weights.iter_mut().zip(grads).zip(first.iter_mut().zip(second))
        {
            (*m, *v) = factors.moments(grad, *m, *v);
            *p = factors.weight(*p, *m, v.sqrt());
        }
    });
}

/// The same with the first moment and the root of the second one in codes, a scale for each block of them.
pub(crate) fn adamw_8bit(
    weights: &mut [f32],
    grads: &[f32],
    codes: [&mut [u8]; 2],
    scales: [&mut [f32]; 2],
    factors: &AdamWFactors,
) {
    let books = [true, false].map(Book::new);
    let [first, second] = codes.map(|codes| codes.par_chunks_mut(WIDTH));
    let [of_first, of_second] = scales.map(|scales| scales.par_iter_mut());
    let blocks = weights.par_chunks_mut(WIDTH).zip(grads.par_chunks(WIDTH));
    let moments = first.zip(of_first).zip(second.zip(of_second));
    blocks.zip(moments).for_each(|((weights, grads), (first, second))| {
        let mut values = [[0f32; WIDTH]; 2];
        for (i, (p, &grad)) in weights.iter_mut().zip(grads).enumerate() {
            let m = books[0].values[usize::from(first.0[i])] * *first.1;
            let root = books[1].values[usize::from(second.0[i])] * *second.1;
            let (m, v) = factors.moments(grad, m, root * root);
            let root = v.sqrt();
            *p = factors.weight(*p, m, root);
            (values[0][i], values[1][i]) = (m, root);
        }
        for ((book, values), (codes, scale)) in books.iter().zip(&values).zip([first, second]) {
            // By their bits, so that NaN is the largest of all.
            let peak = values.iter().map(|x| x.abs().to_bits()).max().unwrap_or(0);
            // Of smaller ones 1/scale is infinite.
            let least = f32::from_bits(peak.max(f32::MIN_POSITIVE.to_bits()));
            *scale = if peak == 0 { 0.0 } else { least };
            let inverse = if peak == 0 { 0.0 } else { 1.0 / *scale };
            for (code, x) in codes.iter_mut().zip(values) {
                *code = book.code(x * inverse);
            }
        }
    });
}

/// Σ x².
pub(crate) fn squares(values: &[f32]) -> f64 {
    let sum = |chunk: &[f32]| chunk.iter().map(|&x| f64::from(x) * f64::from(x)).sum::<f64>();
    // Collected, so that the order of the sum is always the same.
    values.par_chunks(CHUNK).map(sum).collect::<Vec<_>>().into_iter().sum()
}

/// `sums + values`.
pub(crate) fn add(sums: &mut [f32], values: &[f32]) {
    let chunks = sums.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    chunks.for_each(|(sums, values)| sums.iter_mut().zip(values).for_each(|(sum, x)| *sum += x));
}

/// Runs `body` on all elements of a tensor in f32, row by row.
pub(crate) fn with_floats<T>(tensor: &Tensor, body: impl FnOnce(&[f32]) -> T) -> Result<T> {
    let matrix = tensor.flatten_all()?.unsqueeze(0)?;
    let (storage, layout) = matrix.storage_and_layout();
    let candle_core::Storage::Cpu(storage) = &*storage else {
        candle_core::bail!("a CPU tensor was wanted")
    };
    Ok(body(&floats((storage, layout))?))
}

fn floats((storage, layout): View<'_, CpuStorage>) -> Result<Cow<'_, [f32]>> {
    packed(storage, &Stack::new(layout))
}
