//! Rotary position embeddings, in f32.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::widen::{narrow_to, packed};
use crate::op::RopeProblem;
use crate::options::RopeLayout;

/// The rows turned, packed, in their dtype. `storages` are those of rows, cosines and sines.
pub(crate) fn rope(problem: &RopeProblem, storages: [&CpuStorage; 3]) -> Result<CpuStorage> {
    let [x, cos, sin] = storages;
    let [of_cos, of_sin] = &problem.angles;
    let (cos, sin) = (packed(cos, of_cos)?, packed(sin, of_sin)?);
    let mut out = packed(x, &problem.x)?.into_owned();
    let ([_, heads, positions], half) = (problem.dims(), problem.turned / 2);
    let sign = if problem.back { -1.0 } else { 1.0 };
    out.par_chunks_mut(problem.x.cols.max(1)).enumerate().for_each(|(row, x)| {
        let (position, batch) = (row % positions, row / positions / heads);
        let batch = if of_cos.count() == 1 { 0 } else { batch };
        let first = (batch * of_cos.rows + position) * half;
        for (pair, (cos, sin)) in cos[first..].iter().zip(&sin[first..]).take(half).enumerate() {
            let [i, j] = match problem.layout {
                RopeLayout::Halves => [pair, pair + half],
                RopeLayout::Interleaved => [2 * pair, 2 * pair + 1],
            };
            let (a, b, sin) = (x[i], x[j], sign * sin);
            (x[i], x[j]) = (a * cos - b * sin, b * cos + a * sin);
        }
    });
    narrow_to(storages[0].dtype(), out)
}
