//! Plans whose kernels are compiled, kept for each problem and GPU.

use std::hash::Hash;
use std::sync::Arc;

use once_cell::sync::Lazy;

use super::super::cache::Cache;
use super::super::gpu::Gpu;
use super::super::launch::Function;
use crate::error::Result;
use crate::kernel::Plan;

/// A plan, and what it launches.
pub(super) struct Compiled<P> {
    pub plan: P,
    pub steps: Vec<Ready>,
}

/// A compiled kernel, and the blocks of its grid.
pub(super) struct Ready {
    pub function: Arc<Function>,
    pub grid: [u32; 3],
}

impl<P: Plan> Compiled<P> {
    pub fn new(op: &'static str, gpu: &Gpu, plan: P) -> Result<Self> {
        let ready = |step: crate::kernel::Step| {
            let function = gpu.native(op, &step.kernel)?;
            Ok(Ready { function, grid: step.grid })
        };
        let steps = plan.steps().into_iter().map(ready).collect::<Result<_>>()?;
        Ok(Self { plan, steps })
    }
}

/// What was decided for the problems of a family: choosing takes longer than launching.
pub(super) struct Plans<P: Plan>(Lazy<Cache<Key<P>, Compiled<P>>>);

/// A GPU's ordinal and a problem.
type Key<P> = (usize, <P as Plan>::Problem);

/// Shapes that change all the time make plans without end; a plan takes some 200 bytes.
const MOST: usize = 4096;

impl<P: Plan> Plans<P>
where
    P::Problem: Copy + Hash + Eq,
{
    /// None yet.
    pub const fn new() -> Self {
        Self(Lazy::new(|| Cache::of_at_most(MOST)))
    }

    /// The plan of a problem on a GPU, whose context is current.
    pub fn get(
        &self,
        op: &'static str,
        gpu: &Gpu,
        problem: &P::Problem,
    ) -> Result<Arc<Compiled<P>>> {
        self.0
            .get(&(gpu.ordinal, *problem), || Compiled::new(op, gpu, P::new(problem, &gpu.device)))
    }
}
