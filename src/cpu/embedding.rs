//! Rows of a table, and sums of them in f32.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, Result};
use rayon::prelude::*;

use super::operand::operand;
use super::widen::narrow_to;
use crate::error::Error;
use crate::op::{View, span};
use crate::stack::Stack;

/// The rows of a table at ids without gaps, in the table's dtype.
pub(crate) fn embedding(
    op: &'static str,
    table: View<CpuStorage>,
    ids: View<CpuStorage>,
) -> Result<CpuStorage> {
    let stack = Stack::new(table.1);
    let ids = rows_of(op, ids, stack.rows)?;
    let elements = operand(table.0, &stack)?;
    let mut out = vec![0f32; ids.len() * stack.cols];
    if stack.cols > 0 {
        let rows = out.par_chunks_mut(stack.cols).zip(&ids);
        rows.for_each_init(Vec::new, |scratch, (out, &id)| {
            // One row lies side by side, whichever way the block was read.
            elements.block(0, id..id + 1, 0..stack.cols, scratch);
            out.copy_from_slice(&scratch[..stack.cols]);
        });
    }
    narrow_to(table.0.dtype(), out)
}

/// The sums of the rows of each id, of `count`, in the order in which they are.
pub(crate) fn embedding_backward(
    op: &'static str,
    rows: View<CpuStorage>,
    ids: View<CpuStorage>,
    count: usize,
) -> Result<CpuStorage> {
    let stack = Stack::new(rows.1);
    let mut sorted: Vec<_> = rows_of(op, ids, count)?.into_iter().zip(0..).collect();
    // The second of equal ids stays behind the first.
    sorted.par_sort_unstable();
    let elements = operand(rows.0, &stack)?;
    let mut out = vec![0f32; count * stack.cols];
    out.par_chunks_mut(stack.cols).enumerate().for_each_init(Vec::new, |scratch, (id, out)| {
        let first = sorted.partition_point(|&(other, _)| other < id);
        for &(_, row) in sorted[first..].iter().take_while(|&&(other, _)| other == id) {
            elements.block(0, row..row + 1, 0..stack.cols, scratch);
            out.iter_mut().zip(&*scratch).for_each(|(sum, x)| *sum += x);
        }
    });
    narrow_to(rows.0.dtype(), out)
}

/// The row of each id.
fn rows_of(
    op: &'static str,
    (storage, layout): View<CpuStorage>,
    count: usize,
) -> Result<Vec<usize>> {
    let row = |(i, id): (usize, i64)| match usize::try_from(id) {
        Ok(row) if row < count => Ok(row),
        _ => Err(Error::Value {
            op,
            name: "ids",
            got: format!("{id} at {i}"),
            want: format!("0 to V − 1 with V = {count}"),
            fix: "check the vocabulary's size",
        }
        .into()),
    };
    match storage {
        CpuStorage::U32(ids) => {
            ids[span(layout)].iter().map(|&id| id.into()).enumerate().map(row).collect()
        }
        _ => {
            storage.as_slice::<i64>()?[span(layout)].iter().copied().enumerate().map(row).collect()
        }
    }
}
