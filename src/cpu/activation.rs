//! Activations of products, their gradients, and sums of columns, in f32.

use std::borrow::Cow;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, DType, Result};
use rayon::prelude::*;

use super::epilogue::{activate, slopes};
use super::widen::{narrow_to, packed};
use crate::Activation;
use crate::op::View;
use crate::stack::Stack;

/// Elements that one thread takes at a time.
const CHUNK: usize = 1 << 14;

/// `act(x)`, packed, in the dtype of x.
pub(crate) fn activation(act: Activation, x: View<CpuStorage>) -> Result<CpuStorage> {
    let mut out = elements(x)?.into_owned();
    out.par_chunks_mut(CHUNK).for_each(|out| activate(act, out));
    narrow_to(x.0.dtype(), out)
}

/// `grad · act′(x)` in a dtype, if there is an activation, and the sums of its columns in another.
pub(crate) fn activation_backward(
    grad: View<CpuStorage>,
    before: Option<(Activation, View<CpuStorage>, DType)>,
    sums: Option<DType>,
) -> Result<(Option<CpuStorage>, Option<CpuStorage>)> {
    let cols = *grad.1.dims().last().expect("a row");
    let mut grads = elements(grad)?;
    if let Some((act, x, _)) = before {
        let x = elements(x)?;
        grads.to_mut().par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(grads, x)| {
            let mut slope = x.to_vec();
            slopes(act, &mut slope);
            grads.iter_mut().zip(slope).for_each(|(grad, slope)| *grad *= slope);
        });
    }
    let sums = sums.map(|dtype| narrow_to(dtype, column_sums(&grads, cols))).transpose()?;
    let out = before.map(|(.., dtype)| narrow_to(dtype, grads.into_owned())).transpose()?;
    Ok((out, sums))
}

/// Sums of some rows, added up: the same on any number of threads.
fn column_sums(rows: &[f32], cols: usize) -> Vec<f32> {
    let add = |mut sums: Vec<f32>, row: &[f32]| {
        sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += x);
        sums
    };
    let parts = rows.par_chunks((CHUNK / cols.max(1)).max(1) * cols.max(1));
    let parts: Vec<_> = parts.map(|part| part.chunks(cols).fold(vec![0f32; cols], add)).collect();
    parts.iter().fold(vec![0f32; cols], |sums, part| add(sums, part))
}

/// All elements of a view, in f32.
fn elements((storage, at): View<'_, CpuStorage>) -> Result<Cow<'_, [f32]>> {
    packed(storage, &Stack::new(at))
}
