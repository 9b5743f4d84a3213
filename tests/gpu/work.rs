//! Work that is done again and again, to the same bits.

use candle_core::DType::{BF16, F16, F32};
use candle_core::{Device, Result, Tensor};
use kaio_candle::prelude::*;

use super::suites::Source;
use super::suites::attention::{self, Options, Problem};
use super::suites::matmul::Case;

/// Inputs on a device, and what is computed of them.
pub type Call = Box<dyn Fn() -> Result<Tensor>>;

type Make = Box<dyn Fn(&Device) -> Result<Call> + Sync>;

/// One op on inputs that are the same whenever they are made.
pub struct Work {
    pub name: String,
    make: Make,
}

impl Work {
    pub fn call(&self, device: &Device) -> Result<Call> {
        (self.make)(device)
    }
}

/// Random products of `Engine::Native`.
pub fn products(series: &str, count: usize, m: usize, nk: usize) -> impl Iterator<Item = Work> {
    (0..count).map(move |i| {
        let case = Case::random(series, i, m, nk);
        let name = format!("{case:?}");
        let make = move |device: &Device| {
            let inputs = case.inputs(device)?;
            Ok(Box::new(move || inputs.product(Engine::Native)) as Call)
        };
        Work { name, make: Box::new(make) }
    })
}

/// The gradients of attention of every kind, which are asked to be the same on each run.
pub fn gradients() -> impl Iterator<Item = Work> {
    let dtypes = [BF16, F16, F32].into_iter();
    dtypes.flat_map(attention::every_gradient_kind).map(|problem| {
        let options = Options { deterministic: true, ..problem.options.clone() };
        let problem = Problem { options, ..problem };
        let name = format!("gradients of {problem:?}");
        let make = move |device: &Device| {
            let mut inputs = problem.inputs(&mut Source::new(&format!("{problem:?}"), device))?;
            let upstream = inputs.pop().expect("the loss's weights");
            let upstream = upstream.to_dtype(problem.options.out_dtype(problem.dtype))?;
            let problem = problem.clone();
            let call = move || {
                let grads = problem.gradients_alone(&inputs, &upstream)?;
                end_to_end(&grads.into_iter().flatten().collect::<Vec<_>>())
            };
            Ok(Box::new(call) as Call)
        };
        Work { name, make: Box::new(make) }
    })
}

/// All elements in f32.
pub fn end_to_end(tensors: &[Tensor]) -> Result<Tensor> {
    let flat = tensors.iter().map(|t| t.flatten_all()?.to_dtype(F32));
    Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)
}

/// Attention of every kind.
pub fn attentions() -> impl Iterator<Item = Work> {
    let of =
        |dtype| attention::every_kind(dtype).into_iter().map(move |(kind, p)| (kind, dtype, p));
    [BF16, F16, F32].into_iter().flat_map(of).map(|(kind, dtype, problem)| {
        let name = format!("attention: {kind}, {}", dtype.as_str());
        let make = move |device: &Device| {
            let mut inputs = problem.inputs(&mut Source::new(&format!("{problem:?}"), device))?;
            // The loss's weights.
            inputs.pop();
            let (problem, views) = (problem.clone(), problem.views(&inputs)?);
            Ok(Box::new(move || Ok(problem.call(&views)?.0)) as Call)
        };
        Work { name, make: Box::new(make) }
    })
}
