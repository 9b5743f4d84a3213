//! Which engine computes an op. In a build without the feature `cuda`, where no CUDA tensor exists to call
//! them with, the same functions say that it is missing.
#![cfg_attr(not(feature = "cuda"), allow(unused_variables))]

use candle_core::{CudaStorage, DType, Layout, Result, Tensor};

use crate::Engine;
use crate::op::{Epilogue, MatmulProblem, View};

#[cfg(feature = "cuda")]
use {
    super::{empty, kaio_ops, native},
    candle_core::backend::BackendStorage,
};

/// The body of a function that ops call.
#[cfg(feature = "cuda")]
macro_rules! on_gpu {
    ($body:expr) => {
        $body
    };
}
#[cfg(not(feature = "cuda"))]
macro_rules! on_gpu {
    ($body:expr) => {
        Err(candle_core::Error::NotCompiledWithCudaSupport)
    };
}

mod attention;
mod losses;
mod quantised;
mod rows;
mod train;

pub(crate) use self::{attention::*, losses::*, quantised::*, rows::*, train::*};

pub(crate) fn matmul(
    op: &'static str,
    problem: &MatmulProblem,
    engine: Engine,
    epilogue: Epilogue,
    a: &CudaStorage,
    b: &CudaStorage,
    bias: Option<View<CudaStorage>>,
) -> Result<CudaStorage> {
    on_gpu!({
        if problem.out.elem_count() == 0 || problem.lhs.cols == 0 {
            return empty::matmul(op, problem, epilogue, a, bias);
        }
        match engine {
            Engine::Auto | Engine::Native => native::matmul(op, problem, epilogue, a, b, bias),
            Engine::KaioOps => kaio_ops::matmul(op, problem, epilogue, a, b, bias),
        }
    })
}

/// How many elements a storage has.
pub(crate) fn elements(storage: &CudaStorage) -> usize {
    #[cfg(feature = "cuda")]
    return super::driver::memory::elements(storage);
    #[cfg(not(feature = "cuda"))]
    0
}

/// A tensor's elements, row by row, in memory of their own.
pub(crate) fn copy(op: &'static str, tensor: &Tensor) -> Result<Tensor> {
    on_gpu!(native::copy(op, tensor))
}

/// The elements of a view in memory of their own.
pub(crate) fn pack(storage: &CudaStorage, layout: &Layout) -> Result<CudaStorage> {
    on_gpu!({
        match layout.shape().elem_count() {
            0 => empty::zeros(storage, 0, storage.dtype()),
            _ => super::fit::pack(storage, layout),
        }
    })
}

/// The kernels that some work launches in this thread, by their names.
pub(crate) fn kernels(work: impl FnOnce() -> Result<()>) -> Result<Vec<String>> {
    on_gpu!({
        let (result, kernels) = super::driver::log::record(work);
        result.map(|()| kernels)
    })
}

/// `len` times a number, in f32.
pub(crate) fn full(like: &CudaStorage, len: usize, value: f32) -> Result<CudaStorage> {
    on_gpu!(empty::full(like, len, value))
}

/// `A·B` in the dtype of both.
pub(crate) fn product(
    op: &'static str,
    problem: &MatmulProblem,
    [a, b]: [&CudaStorage; 2],
) -> Result<CudaStorage> {
    on_gpu!({
        let epilogue = Epilogue::round(a.dtype());
        matmul(op, problem, Engine::Native, epilogue, a, b, None)
    })
}

/// `A·B` in the dtype of what it is written to, from an element on; or added to that, if it is f32. The depth is not empty.
pub(crate) fn product_to(
    op: &'static str,
    problem: &MatmulProblem,
    operands: [&CudaStorage; 2],
    out: (&mut CudaStorage, usize),
    adds: bool,
) -> Result<()> {
    on_gpu!({
        match problem.out.elem_count() {
            0 => Ok(()),
            _ => native::product_to(op, problem, operands, out, adds),
        }
    })
}

/// What [`product_to`] writes to all of.
pub(crate) fn unwritten(like: &CudaStorage, len: usize, dtype: DType) -> Result<CudaStorage> {
    on_gpu!(super::driver::memory::uninit(like.device(), &len.into(), dtype))
}
