//! Variables and gradients of a small model.

use candle_core::backprop::GradStore;
use candle_core::{DType, Result, Tensor, Var};

use crate::suites::{Layout, Source};

/// Parameters of all ranks: of less than a warp, of odd numbers of elements, of none, of a chunk and some more.
const SHAPES: [&[usize]; 7] = [&[], &[3], &[5, 51], &[256, 2], &[0, 4], &[16_384], &[3, 5, 1601]];

/// Variables of a dtype, called by their numbers.
pub fn vars(source: &mut Source, dtype: DType) -> Result<Vec<(String, Var)>> {
    let of = |(i, dims): (usize, &&[usize])| {
        Ok((i.to_string(), Var::from_tensor(&source.tensor(dtype, dims, Layout::Plain)?)?))
    };
    SHAPES.iter().enumerate().map(of).collect()
}

/// Gradients whose elements span many orders of magnitude.
pub fn gradients(source: &mut Source, dtype: DType) -> Result<Vec<Tensor>> {
    let of = |dims: &&[usize]| {
        source
            .tensor_of(dtype, dims, Layout::Plain, |s| s.unit() * 10f64.powf(2.0 * s.unit() - 2.0))
    };
    SHAPES.iter().map(of).collect()
}

/// As a backward pass leaves them.
pub fn store(vars: &[(String, Var)], grads: &[Tensor]) -> GradStore {
    let mut store = GradStore::default();
    for ((_, var), grad) in vars.iter().zip(grads) {
        store.insert(var, grad.clone());
    }
    store
}

/// Variables of the same values on the CPU.
pub fn on_cpu(vars: &[(String, Var)]) -> Result<Vec<(String, Var)>> {
    let copy = |(name, var): &(String, Var)| {
        let copied = var.as_detached_tensor().to_device(&candle_core::Device::Cpu)?;
        Ok((name.clone(), Var::from_tensor(&copied)?))
    };
    vars.iter().map(copy).collect()
}

/// The same of gradients.
pub fn all_on_cpu(tensors: &[Tensor]) -> Result<Vec<Tensor>> {
    tensors.iter().map(|tensor| tensor.to_device(&candle_core::Device::Cpu)).collect()
}
