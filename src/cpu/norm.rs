//! Norms of rows and their gradients, in f32.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::widen::{narrow_to, packed};
use crate::op::{
    Norm, NormEach, NormGrads, NormInputs, NormResults, NormStats, NormUpstream, View,
};
use crate::stack::Stack;

/// All elements of a view, in f32.
fn elements((storage, at): View<'_, CpuStorage>) -> Result<Cow<'_, [f32]>> {
    let at = match at.dims() {
        &[len] => {
            let (stride, offset) = (at.stride()[0], at.start_offset());
            &candle_core::Layout::new((1, len).into(), vec![len, stride], offset)
        }
        _ => at,
    };
    packed(storage, &Stack::new(at))
}

/// `Σ f(i)`, in as many parts as a vector has lanes.
#[inline(always)]
fn sum(len: usize, f: impl Fn(usize) -> f32) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let whole = len / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        for (lane, sum) in sums.iter_mut().enumerate() {
            *sum += f(at + lane);
        }
    }
    let rest = (whole..len).map(f).sum::<f32>();
    sums.iter().sum::<f32>() + rest
}

/// Normed rows in the dtype of x, and what is to be saved.
pub(crate) fn norm(
    norm: &Norm,
    inputs: &NormInputs<View<CpuStorage>>,
) -> Result<NormResults<CpuStorage>> {
    let dtype = inputs.x.0.dtype();
    let (x, weight) = (elements(inputs.x)?, elements(inputs.weight)?);
    let bias = inputs.bias.map(elements).transpose()?;
    let (sum_of_both, x) = match inputs.residual {
        None => (None, x),
        Some(residual) => {
            let residual = elements(residual)?;
            let sum = x.par_iter().zip(residual.par_iter()).map(|(a, b)| a + b);
            let sum = narrow_to(dtype, sum.collect())?;
            // What is normed is what goes on.
            let layout = candle_core::Layout::contiguous((1, x.len()));
            let rounded = packed(&sum, &Stack::new(&layout))?.into_owned();
            (Some(sum), Cow::Owned(rounded))
        }
    };
    let width = weight.len();
    let rows = x.len().checked_div(width).unwrap_or(0);
    let (mut out, mut rstd, mut mean) = (vec![0f32; x.len()], vec![0f32; rows], vec![0f32; rows]);
    let stats = rstd.par_iter_mut().zip(&mut mean);
    let lines = out.par_chunks_mut(width.max(1)).zip(x.par_chunks(width.max(1)));
    lines.zip(stats).for_each(|((out, x), (rstd, mean))| {
        let count = width as f32;
        *mean = if norm.centred { sum(width, |i| x[i]) / count } else { 0.0 };
        let variance = sum(width, |i| (x[i] - *mean) * (x[i] - *mean)) / count;
        *rstd = 1.0 / (variance + norm.eps).sqrt();
        for (i, (out, x)) in out.iter_mut().zip(x).enumerate() {
            let normed = (x - *mean) * *rstd * weight[i];
            *out = bias.as_ref().map_or(normed, |bias| normed + bias[i]);
        }
    });
    let stats = norm.save.then(|| NormStats {
        rstd: CpuStorage::F32(rstd),
        mean: norm.centred.then_some(CpuStorage::F32(mean)),
    });
    Ok(NormResults { out: narrow_to(dtype, out)?, sum: sum_of_both, stats })
}

/// The gradients that are wanted, in the dtypes of x and of the weight.
pub(crate) fn norm_backward(
    inputs: &NormUpstream<View<CpuStorage>>,
    wants: NormEach<bool>,
) -> Result<NormGrads<CpuStorage>> {
    /// Parts of the rows, whose sums are added in their order.
    const PARTS: usize = 32;
    let (x, weight, grad) = (elements(inputs.x)?, elements(inputs.weight)?, elements(inputs.grad)?);
    let sum_grad = inputs.sum_grad.map(elements).transpose()?;
    let rstd = elements(inputs.stats.rstd)?;
    let mean = inputs.stats.mean.map(elements).transpose()?;
    let width = weight.len();
    let mut of_x = vec![0f32; if wants.x { x.len() } else { 0 }];
    let part = rstd.len().div_ceil(PARTS).max(1);
    let parts = rstd.len().div_ceil(part);
    let mut sums = vec![[vec![0f32; width], vec![0f32; width]]; parts];
    let of_parts = sums.par_iter_mut().enumerate();
    let lines = of_x.par_chunks_mut((part * width).max(1));
    let one = |of_x: &mut [f32], [of_weight, of_bias]: &mut [Vec<f32>; 2], i: usize| {
        for row in i * part..((i + 1) * part).min(rstd.len()) {
            let at = row * width..(row + 1) * width;
            let (x, grad) = (&x[at.clone()], &grad[at.clone()]);
            let (rstd, mean) = (rstd[row], mean.as_ref().map_or(0.0, |mean| mean[row]));
            let normed = |i: usize| (x[i] - mean) * rstd;
            if wants.weight {
                of_weight.iter_mut().enumerate().for_each(|(i, sum)| *sum += grad[i] * normed(i));
            }
            if wants.bias {
                of_bias.iter_mut().zip(grad).for_each(|(sum, grad)| *sum += grad);
            }
            if !wants.x {
                continue;
            }
            let g = |i: usize| grad[i] * weight[i];
            let with_x = sum(width, |i| g(i) * normed(i)) / width as f32;
            let alone = match inputs.stats.mean {
                Some(_) => sum(width, g) / width as f32,
                None => 0.0,
            };
            let first = i * part * width;
            let of_x = &mut of_x[at.start - first..at.end - first];
            for (i, out) in of_x.iter_mut().enumerate() {
                let own = (g(i) - alone - normed(i) * with_x) * rstd;
                *out = own + sum_grad.as_ref().map_or(0.0, |grad| grad[at.start + i]);
            }
        }
    };
    match wants.x {
        true => of_parts.zip(lines).for_each(|((i, sums), of_x)| one(of_x, sums, i)),
        false => of_parts.for_each(|(i, sums)| one(&mut [], sums, i)),
    }
    let total = |which: usize| {
        let mut total = vec![0f32; width];
        for sums in &sums {
            total.iter_mut().zip(&sums[which]).for_each(|(total, sum)| *total += sum);
        }
        narrow_to(inputs.weight.0.dtype(), total)
    };
    Ok(NormEach {
        x: wants.x.then(|| narrow_to(inputs.x.0.dtype(), of_x)).transpose()?,
        weight: wants.weight.then(|| total(0)).transpose()?,
        bias: wants.bias.then(|| total(1)).transpose()?,
    })
}
