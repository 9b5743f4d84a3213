//! The plan of a product.

use super::{Name, Problem, choose, sm80, sm90};
use crate::kernel::plan::Step;
use crate::kernel::{self, Device};
use crate::ptx::Target;

/// The kernels of a product, and the numbers of their launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// Hopper's.
    Sm90(sm90::Config, sm90::Launch),
    /// The portable one.
    Sm80(sm80::Config, sm80::Launch),
    /// The portable one, whose blocks share the depth of a tile, and the one that adds their sums.
    Split(sm80::Config, sm80::Launch, sm80::Reduce),
}

impl kernel::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        match device.target {
            Target::Sm90a => Self::sm90(choose::choose(problem, device), problem, device),
            Target::Sm80 | Target::Sm89 => Self::sm80(sm80::choose(problem, device), problem),
        }
    }

    fn steps(&self) -> Vec<Step> {
        match *self {
            Self::Sm90(config, launch) => vec![Step { kernel: config.into(), grid: launch.grid }],
            Self::Sm80(config, launch) => vec![Step { kernel: config.into(), grid: launch.grid }],
            Self::Split(config, launch, reduce) => vec![
                Step { kernel: config.into(), grid: launch.grid },
                Step { kernel: reduce.into(), grid: launch.sum_grid(&reduce) },
            ],
        }
    }
}

impl Plan {
    /// With a configuration that nobody chose; `None` for a kernel that multiplies no matrices.
    pub fn of(config: &kernel::Config, problem: &Problem, device: &Device) -> Option<Self> {
        match *config {
            kernel::Config::MatmulSm90(config) => Some(Self::sm90(config, problem, device)),
            kernel::Config::MatmulSm80(config) => Some(Self::sm80(config, problem)),
            _ => None,
        }
    }

    fn sm90(config: sm90::Config, problem: &Problem, device: &Device) -> Self {
        Self::Sm90(config, sm90::Launch::new(&config, problem, device.multiprocessors))
    }

    fn sm80(config: sm80::Config, problem: &Problem) -> Self {
        let launch = sm80::Launch::new(&config, problem);
        match config.reduce() {
            None => Self::Sm80(config, launch),
            // The epilogue is the second kernel's: the first one serves all of them.
            Some(reduce) => {
                let config = sm80::Config { epilogue: config.first_epilogue(), ..config };
                Self::Split(config, launch, reduce)
            }
        }
    }

    /// The f32 sums that parts of the depth leave for the second kernel, if there are parts.
    pub fn partial_sums(&self, problem: &Problem) -> Option<u64> {
        match self {
            Self::Split(config, ..) => {
                Some(u64::from(config.split) * problem.batch * problem.m * problem.n)
            }
            Self::Sm90(..) | Self::Sm80(..) => None,
        }
    }
}
