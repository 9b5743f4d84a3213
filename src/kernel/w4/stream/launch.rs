//! The numbers of a launch.

use super::Config;
use crate::kernel::gemm::sm80::Reduce;
use crate::kernel::plan::count;
use crate::kernel::w4::Problem;

/// The numbers of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// Blocks of the grid.
    pub grid: [u32; 3],
    /// Rows and columns of the result.
    size: [u32; 2],
}

impl Launch {
    /// The launch of a configuration on a problem.
    pub fn new(config: &Config, problem: &Problem) -> Self {
        let tokens =
            if config.several { count(problem.m.div_ceil(config.tokens.into())) } else { 1 };
        let blocks =
            problem.columns(config.cols).saturating_mul(tokens).saturating_mul(config.split);
        Self { grid: [blocks, 1, 1], size: [count(problem.m), count(problem.n)] }
    }

    /// The grid of the kernel that adds the parts of a split.
    pub fn sum_grid(&self, reduce: &Reduce) -> [u32; 3] {
        reduce.grid(self.size)
    }
}

impl Config {
    /// The kernel that follows one whose parts no cluster adds.
    pub fn reduce(&self) -> Option<Reduce> {
        let Self { split, unit, epilogue, .. } = *self;
        let reduce = Reduce { split, unit, integers: false, epilogue };
        (split > 1 && !self.clustered()).then_some(reduce)
    }
}
