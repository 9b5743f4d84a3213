//! The plan of a call.

use super::{Config, Keys, Name, gather, sort, sums};
use crate::kernel::plan::{Step, count};
use crate::kernel::rows::Unit;
use crate::kernel::{self, Device, Element};

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Ids, at least 1.
    pub rows: u64,
    /// Elements of a row, at least 1.
    pub cols: u64,
    /// Rows of the table.
    pub classes: u64,
    /// The type of all elements.
    pub element: Element,
    /// Whether ids have 64 bits.
    pub wide: bool,
    /// Whether it is the table's gradient.
    pub backward: bool,
    /// Whether all rows begin at multiples of 16 bytes.
    pub aligned: bool,
}

/// How many elements of 4 bytes a gradient needs besides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Buffers {
    /// Keys, and places, of each of two sets.
    pub keys: u64,
    /// Counts of digits.
    pub counts: u64,
    /// f32 sums.
    pub partial: u64,
}

/// The kernels and their grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    problem: Problem,
    unit: u32,
    units: u32,
    /// Blocks of a row.
    across: u32,
    /// Passes of the sort.
    passes: u32,
}

impl Problem {
    /// What is beyond what threads and grids count, and the most that they do.
    pub fn limit(&self) -> Option<(String, u32)> {
        const MOST: u32 = i32::MAX as u32;
        let Self { rows, cols, classes, .. } = *self;
        // A block of a gather has a row at least, and one of a sum 64.
        let blocks = rows.saturating_mul(cols.div_ceil(128));
        let over = [rows, cols, classes, blocks].iter().any(|&size| size > MOST.into());
        over.then(|| (format!("{rows} ids of {classes} rows of {cols} elements"), MOST))
    }

    fn unit(&self) -> u32 {
        let whole = self.aligned && self.cols.is_multiple_of(self.element.per_chunk().into());
        Unit::of(self.element, whole).count
    }

    fn sort_blocks(&self) -> u64 {
        self.rows.div_ceil(sort::BLOCK.into())
    }

    fn parts(&self) -> u64 {
        self.rows.div_ceil(sums::PART.into())
    }

    /// What a gradient needs besides.
    pub fn buffers(&self) -> Buffers {
        Buffers {
            keys: self.rows,
            counts: self.sort_blocks() * u64::from(sort::BINS),
            partial: 2 * self.parts() * self.cols,
        }
    }
}

impl Plan {
    pub(super) fn units(&self) -> u32 {
        self.units
    }

    pub(super) fn across(&self) -> u32 {
        self.across
    }

    pub(super) fn passes(&self) -> usize {
        self.passes as usize
    }

    pub(super) fn sort_blocks(&self) -> u32 {
        count(self.problem.sort_blocks())
    }

    /// Threads of a row of a gather.
    fn threads_across(&self) -> u32 {
        self.units.next_power_of_two().min(gather::THREADS)
    }
}

impl kernel::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        let unit = problem.unit();
        let units = count(problem.cols.div_ceil(unit.into()));
        // An id that has no row is sorted after all others.
        let bits = u64::BITS - problem.classes.leading_zeros();
        let plan = Self {
            problem: *problem,
            unit,
            units,
            across: units.div_ceil(sums::THREADS),
            passes: bits.div_ceil(sort::DIGIT).max(1),
        };
        match problem.backward {
            true => plan,
            false => Self { across: units.div_ceil(plan.threads_across()), passes: 0, ..plan },
        }
    }

    fn steps(&self) -> Vec<Step> {
        let Self { problem, unit, across, passes, .. } = *self;
        let Problem { element, wide, .. } = problem;
        let step = |config: Config, blocks: u64| {
            let grid = [count(blocks.saturating_mul(across.into())), 1, 1];
            Step { kernel: config.into(), grid }
        };
        if !problem.backward {
            let threads = self.threads_across();
            let config = Config::Gather { element, wide, unit, across: threads };
            return vec![step(config, problem.rows.div_ceil((gather::THREADS / threads).into()))];
        }
        let of_pass = |pass| {
            let keys = if pass == 0 { Keys::Ids { wide } } else { Keys::Sorted };
            let sort = |scatter| Config::Sort { scatter, keys };
            [(sort(false), self.sort_blocks()), (Config::Scan, 1), (sort(true), self.sort_blocks())]
        };
        let sorts = (0..passes).flat_map(of_pass);
        let sorts =
            sorts.map(|(config, blocks)| Step { kernel: config.into(), grid: [blocks, 1, 1] });
        let sums = [Config::Sum { element, unit }, Config::Join { element, unit }];
        sorts.chain(sums.map(|config| step(config, problem.parts()))).collect()
    }
}
