//! Copies of e4m3, for which candle (0.11.1) asks for kernels by names that its own do not have.

use candle_core::backend::BackendStorage;
use candle_core::{CudaStorage, DType, Layout, Result, Shape, Storage, Tensor};

use super::super::driver::gpu::Gpu;
use super::super::driver::memory::{Memory, uninit};
use super::super::driver::order::Order;
use super::limit::{SPLIT, countable};
use super::plan::Plans;
use super::quantised::tensor;
use crate::check;
use crate::error::Error;
use crate::kernel::strided::{Arguments, MOST_DIMS, Plan, Problem};

static PLANS: Plans<Plan> = Plans::new();

/// A tensor's elements, row by row, in memory of their own.
pub(crate) fn copy(op: &'static str, view: &Tensor) -> Result<Tensor> {
    let (storage, layout) = view.storage_and_layout();
    match &*storage {
        Storage::Cuda(storage) if storage.dtype() == DType::F8E4M3 => {
            Ok(tensor(packed_bytes(op, storage, layout)?, view.shape()))
        }
        _ => {
            check::copyable(op, view.elem_count())?;
            view.force_contiguous()
        }
    }
}

/// A view of bytes without gaps, at the beginning of a storage that may be longer. It is not empty.
pub(in crate::cuda) fn packed_bytes(
    op: &'static str,
    storage: &CudaStorage,
    layout: &Layout,
) -> Result<CudaStorage> {
    let device = storage.device().clone();
    let gpu = Gpu::of(op, &device)?;
    let dims = merged(layout);
    let problem = Problem { bytes: layout.shape().elem_count() as u64, dims: dims.len() };
    if dims.len() > MOST_DIMS {
        let limit = format!("cannot copy e4m3 of more than {MOST_DIMS} dimensions with gaps");
        let (what, fix) = ("this crate".into(), "flatten its batch dimensions".into());
        return Err(Error::Unsupported { op, what, limit, fix }.into());
    }
    countable(op, ["this crate", "copy"], problem.limit(), SPLIT)?;
    let order = Order::new(op, device.cuda_stream(), [storage]);
    let compiled = PLANS.get(op, &gpu, &problem)?;
    let mut out = uninit(&device, &Shape::from(problem.written() as usize), storage.dtype())?;
    {
        let (input, result) = (Memory::of(storage, &device), Memory::of_mut(&mut out, &device));
        let arguments = Arguments {
            problem: &problem,
            input: input.at(layout.start_offset()),
            dims: &dims,
            out: result.address(),
        };
        order.run(|| Ok(compiled.launch(op, &device, &arguments)?))?;
    }
    Ok(out)
}

/// Length and stride of as few dimensions as walk the same elements, the innermost first: at least one.
fn merged(layout: &Layout) -> Vec<(u64, u64)> {
    let mut dims: Vec<(u64, u64)> = Vec::new();
    for (&len, &stride) in layout.dims().iter().zip(layout.stride()).rev() {
        let (len, stride) = (len as u64, stride as u64);
        match dims.last_mut() {
            _ if len == 1 => {}
            Some((inner, step)) if stride == *inner * *step => *inner *= len,
            _ => dims.push((len, stride)),
        }
    }
    if dims.is_empty() {
        dims.push((1, 1));
    }
    dims
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dimensions_are_merged_where_strides_meet() {
        let of = |dims: &[usize], strides: &[usize]| {
            merged(&Layout::new(Shape::from_dims(dims), strides.to_vec(), 3))
        };
        assert_eq!(of(&[2, 3, 4], &[12, 4, 1]), [(24, 1)]);
        assert_eq!(of(&[2, 3, 4], &[12, 1, 3]), [(4, 3), (3, 1), (2, 12)]);
        assert_eq!(of(&[5, 1, 4], &[0, 99, 1]), [(4, 1), (5, 0)]);
        assert_eq!(of(&[1, 1], &[7, 7]), [(1, 1)]);
    }
}
