//! The plan of a product.

use super::{Codes, MOST_WEIGHTS, Scheme, layout, stream, tiles};
use crate::kernel::gemm::{self, Epilogue, Major, Name, sm80, sm90};
use crate::kernel::plan::{self, Plan as _, count};
use crate::kernel::{self, Device, Element, Step};
use crate::ptx::{Half, Target};

/// Rows of `x` that Ampere's kernel for a few rows takes sixteen at a time. Beyond, a weight's elements are worth making: on an
/// H200, 2026-11-30, by codes 80 us for 128 rows of 8192² and 158 for 256, by elements and their product 95 and 123.
const STREAMED: u64 = 160;
/// Rows of which the benches time both of Hopper's kernels for codes of eight bits.
const COMPARED: u64 = 128;

/// Rows up to which Hopper's kernel for a few is the faster one for all weights: its products are of eight.
const FEW: u64 = 8;

/// `act(x·W + bias)`, as facts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of `x`.
    pub m: u64,
    /// Columns of `W`.
    pub n: u64,
    /// Columns of other weights of as many rows that `x` is multiplied with as well, by the same kernel: see
    /// [`together`]. 0: none.
    pub others: [u64; MOST_WEIGHTS - 1],
    /// Whether the result is one, `act(x·W) · (x·V)`, with V the one other weight, of as many columns: by
    /// [`together`]'s kernel alone.
    pub gated: bool,
    /// Rows of `W`.
    pub k: u64,
    /// The type of `x`.
    pub half: Half,
    /// How the weight is quantised.
    pub scheme: Scheme,
    /// What happens to a sum.
    pub epilogue: Epilogue,
}

/// The kernels of a product, and the numbers of their launches.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Plan {
    /// For a few rows.
    Stream(stream::Config, stream::Launch),
    /// The same, and the kernel that adds the sums of its parts.
    Split(stream::Config, stream::Launch, sm80::Reduce),
    /// For more: the products' kernels, with a packed operand.
    Tiles(gemm::Plan),
    /// The weight's elements, as `Wᵀ`, and their product.
    Panel(layout::Plan, gemm::Plan),
}

impl plan::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        let bytes = problem.scheme.codes.are_bytes();
        match (device.target, problem.m) {
            (Target::Sm90a, _) if by_tiles(problem, device) => {
                Self::tiles(tiles::choose(problem, device), problem, device)
            }
            // Bytes have no other portable kernel, however many rows there are.
            (target, m) if m <= streamed(target) || bytes => {
                Self::stream(stream::choose(problem, device), problem)
            }
            _ => Self::panel(problem, device),
        }
    }

    fn steps(&self) -> Vec<Step> {
        match *self {
            Self::Stream(config, launch) => vec![Step { kernel: config.into(), grid: launch.grid }],
            Self::Split(config, launch, reduce) => vec![
                Step { kernel: config.into(), grid: launch.grid },
                Step { kernel: reduce.into(), grid: launch.sum_grid(&reduce) },
            ],
            Self::Tiles(plan) => plan.steps(),
            Self::Panel(elements, plan) => [elements.steps(), plan.steps()].concat(),
        }
    }
}

/// The most rows of `x` that the kernel for a few takes.
fn streamed(target: Target) -> u64 {
    match target {
        Target::Sm80 | Target::Sm89 => STREAMED,
        Target::Sm90a => stream::MOST,
    }
}

/// Whether Hopper's kernel for more rows is to have these, too: so many rows of bytes take either about as long.
fn by_tiles(problem: &Problem, device: &Device) -> bool {
    match problem.m {
        m if m > stream::MOST => true,
        m if m <= FEW || problem.gated || !problem.scheme.codes.are_bytes() => false,
        _ => tiles::time(problem, device) < stream::time(problem, device),
    }
}

/// Whether one kernel is to multiply the rows with all weights of a problem that has several.
pub fn together(problem: &Problem, device: &Device) -> bool {
    match device.target {
        // A block has both columns of a gated result, which that for a few rows does.
        Target::Sm90a if problem.gated => problem.m <= stream::MOST,
        Target::Sm90a => true,
        Target::Sm80 | Target::Sm89 if problem.m > streamed(device.target) => false,
        // Those leave no registers for the addresses of one more weight.
        Target::Sm80 | Target::Sm89 if problem.scheme.zeros && problem.scheme.group == Some(32) => {
            false
        }
        // No second kernel adds parts of several products, so that few columns are faster one by one.
        Target::Sm80 | Target::Sm89 => {
            let alone = |n| Problem { n, others: [0; 2], gated: false, ..*problem };
            let widths = problem.widths().into_iter().filter(|&n| n > 0);
            let apart: f64 = widths.map(|n| stream::time(&alone(n), device)).sum();
            stream::time(problem, device) <= apart
        }
    }
}

/// The kernels worth a try for a problem.
pub fn candidates(problem: &Problem, device: &Device) -> Vec<kernel::Config> {
    let mut all = vec![];
    let hopper = device.target == Target::Sm90a;
    let compared = problem.scheme.codes.are_bytes() && problem.m <= COMPARED;
    if problem.m <= streamed(device.target) || !hopper || compared {
        all.extend(stream::candidates(problem, device).into_iter().map(kernel::Config::from));
    }
    if hopper && !problem.gated {
        all.extend(tiles::candidates(problem, device).into_iter().map(kernel::Config::from));
    }
    all
}

impl Plan {
    /// Whether there are kernels for so many rows of `x` and a weight of such codes, other than by way of its elements,
    /// which those of codes of eight bits are no part of here.
    pub fn takes(codes: Codes, m: u64, target: Target) -> bool {
        !codes.are_bytes() || target == Target::Sm90a || m <= streamed(target)
    }

    /// Whether scales of a weight of such codes multiply sums of so many rows, in f32, whatever the kernel, and never become
    /// elements of the type of `x`.
    pub fn scales_sums(codes: Codes, m: u64) -> bool {
        m <= if codes.are_bytes() { FEW } else { stream::MOST }
    }

    /// With a configuration that nobody chose; `None` for a kernel of another family.
    pub fn of(config: &kernel::Config, problem: &Problem, device: &Device) -> Option<Self> {
        match *config {
            kernel::Config::W4Stream(config) => Some(Self::stream(config, problem)),
            kernel::Config::MatmulSm90(tiles) if tiles.weight == Some(problem.scheme) => {
                Some(Self::tiles(tiles, problem, device))
            }
            _ => None,
        }
    }

    fn tiles(config: sm90::Config, problem: &Problem, device: &Device) -> Self {
        let (product, widths) = (problem.products(), problem.widths());
        let sms = device.multiprocessors;
        let launch = sm90::Launch::of_weights(&config, &product, &widths, sms);
        Self::Tiles(gemm::Plan::Sm90(config, launch))
    }

    fn stream(config: stream::Config, problem: &Problem) -> Self {
        let launch = stream::Launch::new(&config, problem);
        match config.reduce() {
            None => Self::Stream(config, launch),
            Some(reduce) => {
                // The epilogue is the second kernel's: the first one serves all of them.
                let epilogue = Epilogue::round(Element::F32);
                let config = stream::Config { epilogue, ..config };
                Self::Split(config, launch, reduce)
            }
        }
    }

    /// By way of the weight's elements.
    pub fn panel(problem: &Problem, device: &Device) -> Self {
        let &Problem { k, n, half, scheme, .. } = problem;
        let out = Element::Half(half);
        let config = layout::Config::Elements { scheme, out, transposed: true };
        let elements = layout::Plan::new(&layout::Problem { k, n, config }, device);
        Self::Panel(elements, gemm::Plan::new(&problem.product(), device))
    }

    /// The elements of the weight that are made for a product, if any, all lines of which begin at multiples of 16
    /// bytes.
    pub fn panel_elements(&self, problem: &Problem) -> Option<u64> {
        match self {
            Self::Panel(..) => Some(problem.n * problem.panel_line()),
            _ => None,
        }
    }

    /// The f32 sums that parts of the depth leave for the second kernel, if there are parts.
    pub fn partial_sums(&self, problem: &Problem) -> Option<u64> {
        match self {
            Self::Split(config, ..) => Some(u64::from(config.split) * problem.m * problem.n),
            Self::Stream(..) => None,
            Self::Tiles(plan) | Self::Panel(_, plan) => plan.partial_sums(&problem.product()),
        }
    }
}

impl Problem {
    /// What is beyond what kernels can count, and the most that they can.
    pub fn limit(&self) -> Option<(String, u64)> {
        /// Sizes, and 16-bit elements of a row.
        const MOST: u64 = 1 << 30;
        let [n, second, third] = self.widths();
        let sizes = [("M", self.m), ("N", n), ("N", second), ("N", third), ("K", self.k)];
        let over = sizes.into_iter().find(|&(_, size)| size > MOST);
        over.map(|(name, size)| (format!("{name} of {size}"), MOST))
    }

    /// The product with the first weight, as one of matrices.
    pub fn product(&self) -> gemm::Problem {
        let Self { m, n, k, half, epilogue, .. } = *self;
        let elements = [half.into(); 2];
        let (lhs, rhs) = (Major::K, Major::K);
        gemm::Problem { m, n, k, batch: 1, elements, lhs, rhs, epilogue }
    }

    /// The same with all weights, as if they were one.
    pub(super) fn products(&self) -> gemm::Problem {
        gemm::Problem { n: self.widths().iter().sum(), ..self.product() }
    }

    /// From column to column of the weight's elements, in elements.
    pub(super) fn panel_line(&self) -> u64 {
        self.k.next_multiple_of(Element::Half(self.half).per_chunk().into())
    }

    /// Columns of each weight.
    pub fn widths(&self) -> [u64; MOST_WEIGHTS] {
        let [second, third] = self.others;
        [self.n, second, third]
    }

    /// How many weights there are.
    pub fn weights(&self) -> u32 {
        self.widths().iter().filter(|&&n| n > 0).count() as u32
    }

    /// Blocks of `cols` columns of all results.
    pub(super) fn columns(&self, cols: u32) -> u32 {
        let results = if self.gated { 1 } else { MOST_WEIGHTS };
        count(self.widths()[..results].iter().map(|n| n.div_ceil(cols.into())).sum())
    }
}
