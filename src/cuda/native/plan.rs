//! Plans whose kernels are compiled, kept for each problem and GPU; and their launches.
#![allow(unsafe_code)]

use std::hash::Hash;
use std::sync::Arc;

use candle_core::CudaDevice;

use super::super::driver::args::Args;
use super::super::driver::cache::PerGpu;
use super::super::driver::function::Function;
use super::super::driver::gpu::Gpu;
use super::super::driver::tensor_map::TensorMap;
use super::super::driver::{launches, log};
use crate::error::{Error, Result};
use crate::kernel::params::{Argument, Arguments, Names};
use crate::kernel::{Config, Plan, Step};

/// A plan, and what it launches.
pub(super) struct Compiled<P: Plan> {
    pub plan: P,
    steps: Vec<Ready<P::Name>>,
}

/// A compiled kernel, the blocks of its grid, and its parameters in order.
struct Ready<N> {
    kernel: Config,
    function: Arc<Function>,
    grid: [u32; 3],
    names: Vec<N>,
}

impl<P: Plan> Compiled<P> {
    pub fn new(op: &'static str, gpu: &Gpu, plan: P) -> Result<Self> {
        let ready = |Step { kernel, grid }: Step| {
            let load = || Function::load(op, &kernel.emit(), gpu);
            let function = FUNCTIONS.get(gpu.ordinal, &kernel, load)?;
            let names = function.params().iter().map(|param| P::Name::of(&param.name));
            let names: Option<_> = names.collect();
            let names = names.ok_or_else(|| unnamed(op, &kernel.name()))?;
            Ok(Ready { kernel, function, grid, names })
        };
        let steps = plan.steps().into_iter().map(ready).collect::<Result<_>>()?;
        Ok(Self { plan, steps })
    }

    /// Submits the plan's kernels to the device's stream, in their order. The arguments are those of a
    /// problem of the plan: addresses and strides of views that lie inside their storages, and of results
    /// of the problem's sizes, all of which live until this has returned.
    pub fn launch(
        &self,
        op: &'static str,
        device: &CudaDevice,
        arguments: &impl Arguments<Name = P::Name>,
    ) -> Result<()> {
        let mut launches = Launches::default();
        self.add_to(&mut launches, op, arguments)?;
        launches.submit(op, device)
    }

    /// The same after other launches, which are submitted together.
    pub fn add_to(
        &self,
        launches: &mut Launches,
        op: &'static str,
        arguments: &impl Arguments<Name = P::Name>,
    ) -> Result<()> {
        for (number, Ready { kernel, function, grid, names }) in self.steps.iter().enumerate() {
            let mut args = Args::new();
            for (&name, param) in names.iter().zip(function.params()) {
                let argument = arguments.argument(number, name);
                match argument.filter(|argument| argument.kind() == param.kind) {
                    Some(Argument::U32(number)) => args.value(number),
                    Some(Argument::U64(number)) => args.value(number),
                    Some(Argument::F32(number)) => args.value(number),
                    Some(Argument::Pointer(address)) => args.pointer(address),
                    Some(Argument::TensorMap(map)) => args.tensor_map(TensorMap::of(&map)?),
                    None => return Err(unnamed(op, name.name())),
                };
            }
            log::launched(op, || kernel.name());
            launches.0.add(function.clone(), *grid, args);
        }
        Ok(())
    }
}

/// Launches of this crate's kernels, which are submitted together.
#[derive(Default)]
pub(super) struct Launches(launches::Launches);

impl Launches {
    /// They take the GPU less time than the host.
    pub fn are_short(&mut self) {
        self.0.are_short();
    }

    /// Submits them to the device's stream, in their order. What their arguments point to lives until this has returned.
    pub fn submit(&self, op: &'static str, device: &CudaDevice) -> Result<()> {
        // SAFETY: kernels of this crate read and write what their arguments say, which those who added them made so; each
        // parameter has its value, of its type.
        unsafe { self.0.submit(op, device) }
    }
}

/// A kernel declares what no launch passes. Not reached: tests compare both for all kernels.
fn unnamed(op: &'static str, what: &str) -> Error {
    Error::Driver { op, message: format!("no argument of its type for `{what}`") }
}

/// This crate's kernels, by their configurations.
static FUNCTIONS: PerGpu<Config, Function> = PerGpu::new();

/// What was decided for the problems of a family: choosing takes longer than launching.
pub(super) struct Plans<P: Plan>(PerGpu<P::Problem, Compiled<P>>);

/// Shapes that change all the time make plans without end; a plan takes some 500 bytes.
const MOST: usize = 4096;

impl<P: Plan> Plans<P>
where
    P::Problem: Copy + Hash + Eq,
{
    /// None yet.
    pub const fn new() -> Self {
        Self(PerGpu::of_at_most(MOST))
    }

    /// The plan of a problem on a GPU, whose context is current.
    pub fn get(
        &self,
        op: &'static str,
        gpu: &Gpu,
        problem: &P::Problem,
    ) -> Result<Arc<Compiled<P>>> {
        let make = || Compiled::new(op, gpu, P::new(problem, &gpu.device));
        self.0.get(gpu.ordinal, problem, make)
    }
}
