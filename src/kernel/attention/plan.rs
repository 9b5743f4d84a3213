//! The plan of an attention.

use super::{Launch, Name, Problem, TileShape, Variant, choose, combine, sm80, sm90};
use crate::kernel::plan::{Step, count};
use crate::kernel::{self, Device, Element};
use crate::ptx::Target;

/// The kernels of an attention, and the numbers of their launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The kernel that attends.
    pub attend: Attend,
    /// The numbers of its launch.
    pub launch: Launch,
    /// What puts the parts of a split together, and the blocks of its grid.
    pub combine: Option<(combine::Config, u32)>,
}

/// The kernel that attends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attend {
    /// Hopper's.
    Sm90(sm90::Config),
    /// The portable one.
    Sm80(sm80::Config),
}

/// Whether the kernel that is chosen on a device takes operands of a type by TMA, which writes zeros for
/// what a row has not. Others read values by eight elements. (Hopper's instructions read no transposed
/// f32.)
pub fn by_tma(device: &Device, element: Element) -> bool {
    device.target == Target::Sm90a && element != Element::F32
}

impl kernel::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        let attend = match by_tma(device, problem.element) {
            true => Attend::Sm90(choose::choose(problem, device)),
            false => Attend::Sm80(sm80::choose(problem, device)),
        };
        Self::with(attend, problem, device)
    }

    fn steps(&self) -> Vec<Step> {
        let attend = match self.attend {
            Attend::Sm90(config) => config.into(),
            Attend::Sm80(config) => config.into(),
        };
        let attend = Step { kernel: attend, grid: [self.launch.blocks, 1, 1] };
        let combine = self
            .combine
            .map(|(config, blocks)| Step { kernel: config.into(), grid: [blocks, 1, 1] });
        [attend].into_iter().chain(combine).collect()
    }
}

impl Plan {
    /// With a configuration that nobody chose; `None` for a kernel that does not attend.
    pub fn of(config: &kernel::Config, problem: &Problem, device: &Device) -> Option<Self> {
        let attend = match *config {
            kernel::Config::FlashSm90(config) => Attend::Sm90(config),
            kernel::Config::FlashSm80(config) => Attend::Sm80(config),
            _ => return None,
        };
        Some(Self::with(attend, problem, device))
    }

    fn with(attend: Attend, problem: &Problem, device: &Device) -> Self {
        let tile_shape = attend.tile_shape();
        let launch = Launch::new(tile_shape, problem, device.multiprocessors);
        let combine = tile_shape.variant.split.then(|| {
            let value_dim = problem.value_dim as u32;
            let config = combine::Config::new(problem.out, value_dim, launch.parts, problem.lse);
            (config, combine::Config::blocks(count(problem.rows())))
        });
        Self { attend, launch, combine }
    }

    /// What the kernel that attends computes.
    pub fn variant(&self) -> Variant {
        self.attend.tile_shape().variant
    }
}

impl Attend {
    fn tile_shape(&self) -> TileShape {
        match self {
            Self::Sm90(config) => config.into(),
            Self::Sm80(config) => config.into(),
        }
    }
}
