//! Weights as checkpoints have them, brought into the plain form where they are: the words of a weight never leave a GPU.
//! Zero points, the order of rows and nested scales, which are few beside it, are unpacked on the CPU.

mod awq;
mod checkpoint;
mod compressed_tensors;
mod gptq;
mod groups;
pub(crate) mod int4;
mod nf4;

pub use checkpoint::Checkpoint;
pub use gptq::GptqFormat;

use candle_core::{DType, Device, Result, Tensor};
use rayon::prelude::*;

use crate::check::{self, Arg};
use crate::error::Error;
use crate::op::cast;
use crate::quant::planes::largest_scale;

/// What all loaders ask of their tensors: one device, sizes that memory can have, and no gradient.
fn tensors(op: &'static str, args: &[Arg]) -> Result<()> {
    check::tensors(op, args)?;
    check::untracked(op, args)?;
    Ok(args
        .iter()
        .try_for_each(|(arg, t)| check::memory(op, format_args!("`{arg}`"), t.dims(), t.dtype()))?)
}

/// A dtype that no cast brings about: what checkpoints hold are bits.
fn dtype(op: &'static str, (arg, t): Arg, want: &[DType]) -> Result<()> {
    let got = t.dtype();
    if want.contains(&got) {
        return Ok(());
    }
    let fix = "read it with `candle_core::safetensors`, which keeps the file's dtypes (a `VarBuilder` does not)";
    Err(Error::DType { op, arg, got, want: check::one_of(want), fix: fix.into() }.into())
}

/// A matrix of words. Packages write them as i32, some as u32; the bits are the same.
fn words(op: &'static str, arg: Arg, want: &'static str, fix: &'static str) -> Result<()> {
    dtype(op, arg, &[DType::I32, DType::U32])?;
    Ok(check::rank(op, arg, 2..=2, want, fix)?)
}

/// Scales that a weight can have, by the name and in the order that the file has: a weight's own are called and lie otherwise.
fn scales(op: &'static str, arg: Arg) -> Result<()> {
    check::dtype(op, arg, &check::FLOATS)?;
    largest_scale(op, arg).map(drop)
}

/// All words, row by row.
fn bits(words: &Tensor) -> Result<Vec<u32>> {
    let flat = host(words)?;
    match flat.dtype() {
        DType::U32 => flat.to_vec1(),
        _ => Ok(flat.to_vec1::<i32>()?.into_iter().map(i32::cast_unsigned).collect()),
    }
}

/// Whole numbers of a vector, whose values are for the caller to check.
fn integers(op: &'static str, arg: Arg, want: &'static str) -> Result<Vec<i64>> {
    dtype(op, arg, &[DType::I32, DType::U32, DType::I64])?;
    check::rank(op, arg, 1..=1, want, "take the tensor as it is in the file")?;
    cast(&host(arg.1)?, DType::I64)?.to_vec1()
}

/// All elements on the CPU.
fn host(t: &Tensor) -> Result<Tensor> {
    t.to_device(&Device::Cpu)?.flatten_all()
}

/// A matrix `[rows, cols]`, row by row, as `[cols, rows]`.
fn transpose<T: Copy + Default + Send + Sync>(from: &[T], [rows, cols]: [usize; 2]) -> Vec<T> {
    /// Rows and columns that are copied together, so that what is read and written stays in the nearest cache.
    const TILE: usize = 32;
    let mut to = vec![T::default(); from.len()];
    if from.is_empty() {
        return to;
    }
    let parts = to.par_chunks_mut(TILE * rows).enumerate();
    parts.for_each(|(part, to)| {
        let left = part * TILE;
        for top in (0..rows).step_by(TILE) {
            for (col, to) in to.chunks_exact_mut(rows).enumerate() {
                let end = rows.min(top + TILE);
                for (row, to) in (top..end).zip(&mut to[top..end]) {
                    *to = from[row * cols + left + col];
                }
            }
        }
    });
    to
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transposes() {
        for [rows, cols] in [[0, 3], [1, 1], [2, 3], [33, 64], [70, 31]] {
            let from: Vec<usize> = (0..rows * cols).collect();
            let to = transpose(&from, [rows, cols]);
            let want = (0..cols).flat_map(|col| (0..rows).map(move |row| row * cols + col));
            assert!(to.into_iter().eq(want), "[{rows}, {cols}]");
        }
    }

    #[test]
    fn words_of_either_sign() -> Result<()> {
        let signed = Tensor::new(&[[-1i32, 7], [i32::MIN, 0]], &Device::Cpu)?;
        let unsigned = Tensor::new(&[[u32::MAX, 7], [1 << 31, 0]], &Device::Cpu)?;
        for t in [signed, unsigned] {
            words("op", ("t", &t), "", "")?;
            assert_eq!(bits(&t)?, [u32::MAX, 7, 1 << 31, 0]);
            assert_eq!(bits(&t.t()?)?, [u32::MAX, 1 << 31, 7, 0]);
        }
        Ok(())
    }
}
