//! Writing to tensors where they are.

use std::cell::Cell;

use candle_core::{CpuStorage, CudaStorage, InplaceOp1, Layout, Result, Tensor, bail};

/// A storage to write to.
pub(crate) enum StorageMut<'a> {
    Cpu(&'a mut CpuStorage),
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))] // Its kernels write to it.
    Cuda(&'a mut CudaStorage),
}

/// Gives `body` the storage of a tensor, all of whose elements are the tensor's, in their order. Nobody else reads or
/// writes it meanwhile.
pub(crate) fn write(tensor: &Tensor, body: impl FnOnce(StorageMut) -> Result<()>) -> Result<()> {
    tensor.inplace_op1(&Write(Cell::new(Some(body))))
}

struct Write<F>(Cell<Option<F>>);

impl<F: FnOnce(StorageMut) -> Result<()>> Write<F> {
    fn run(&self, storage: StorageMut, layout: &Layout) -> Result<()> {
        match (self.0.take(), layout.contiguous_offsets()) {
            (Some(body), Some((0, _))) => body(storage),
            _ => bail!("a variable that is a part of another tensor"),
        }
    }
}

impl<F: FnOnce(StorageMut) -> Result<()>> InplaceOp1 for Write<F> {
    fn name(&self) -> &'static str {
        "write"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        self.run(StorageMut::Cpu(storage), layout)
    }

    fn cuda_fwd(&self, storage: &mut CudaStorage, layout: &Layout) -> Result<()> {
        self.run(StorageMut::Cuda(storage), layout)
    }
}

/// The same of an f32 tensor on the CPU.
pub(crate) fn write_f32(
    tensor: &Tensor,
    body: impl FnOnce(&mut [f32]) -> Result<()>,
) -> Result<()> {
    write(tensor, |storage| match storage {
        StorageMut::Cpu(CpuStorage::F32(values)) => body(values),
        _ => bail!("an f32 tensor on the CPU was wanted"),
    })
}

/// The same of bytes.
pub(crate) fn write_u8(tensor: &Tensor, body: impl FnOnce(&mut [u8]) -> Result<()>) -> Result<()> {
    write(tensor, |storage| match storage {
        StorageMut::Cpu(CpuStorage::U8(values)) => body(values),
        _ => bail!("a u8 tensor on the CPU was wanted"),
    })
}
