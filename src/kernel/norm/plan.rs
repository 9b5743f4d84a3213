//! What is computed, and by which kernels.

use super::backward::THREADS;
use super::{Backward, Columns, Forward, Moments, Name, Norm, Ring, Room, Sums, Tile};
use crate::kernel::multiprocessor::shared_of_each;
use crate::kernel::plan::{Plan as _, Step, count};
use crate::kernel::{Config, Device, rows};

/// Which way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// From rows to normed rows.
    Forward {
        /// A bias is added.
        bias: bool,
        /// What a gradient needs of each row is a result, too.
        save: bool,
    },
    /// From their gradient to those that are wanted, at least one.
    Backward {
        /// That of the rows.
        x: bool,
        /// That of the weight.
        weight: bool,
        /// That of the bias.
        bias: bool,
    },
}

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// What norm.
    pub norm: Norm,
    /// Rows of all operands, at least 1, whose elements are contiguous.
    pub rows: u64,
    /// Elements of a row, at least 1.
    pub cols: u64,
    /// Whether a residual is added to the rows; backward: whether their sum has a gradient of its own.
    pub add: bool,
    /// Which way.
    pub pass: Pass,
    /// Whether all rows, the weight and the bias begin at multiples of 16 bytes.
    pub aligned: bool,
}

/// The kernels and their grids.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    units: u32,
    steps: [Option<Step>; 3],
    /// Blocks of the backward kernel that go through rows.
    blocks: u32,
}

impl Plan {
    /// Units of a row.
    pub fn units(&self) -> u32 {
        self.units
    }

    /// Blocks that have sums of columns.
    pub fn blocks(&self) -> u32 {
        self.blocks
    }

    /// Floats of the blocks' sums.
    pub fn parts(&self, problem: &Problem) -> u64 {
        match problem.pass {
            Pass::Forward { .. } => 0,
            Pass::Backward { weight, bias, .. } => {
                let sums = u64::from(weight) + u64::from(bias);
                sums * u64::from(self.blocks) * problem.cols
            }
        }
    }

    /// Floats of the rows' means.
    pub fn moments(&self, problem: &Problem) -> u64 {
        let given = self.steps().iter().any(|step| matches!(step.kernel, Config::NormMoments(_)));
        if given { 2 * problem.rows } else { 0 }
    }
}

impl crate::kernel::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, device: &Device) -> Self {
        match problem.pass {
            Pass::Forward { bias, save } => forward(problem, bias, save),
            Pass::Backward { x, weight, bias } => backward(problem, device, [x, weight, bias]),
        }
    }

    fn steps(&self) -> Vec<Step> {
        self.steps.into_iter().flatten().collect()
    }
}

impl Problem {
    /// Whether a thread loads 16 bytes at once.
    fn whole(&self) -> bool {
        self.aligned && self.cols.is_multiple_of(self.norm.element.per_chunk().into())
    }

    fn tile(&self, room: Room) -> (Tile, bool) {
        Tile::new(self.cols, self.norm.element, self.whole(), room)
    }

    fn units(&self, tile: Tile) -> u32 {
        count(self.cols / u64::from(tile.unit))
    }

    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self) -> Option<(String, u32)> {
        rows::limit(self.rows, self.cols)
    }
}

fn forward(problem: &Problem, bias: bool, save: bool) -> Plan {
    let &Problem { norm, rows, add, .. } = problem;
    let (tile, fits) = problem.tile(Room { threads: 512, chunks: 4, elements: 16 });
    let config = Forward { norm, bias, add, save, tile, long: !fits };
    let blocks = count(rows.div_ceil((config.threads() / tile.team).into()));
    let step = Step { kernel: config.into(), grid: [blocks, 1, 1] };
    Plan { units: problem.units(tile), steps: [Some(step), None, None], blocks }
}

fn backward(problem: &Problem, device: &Device, wanted: [bool; 3]) -> Plan {
    let &Problem { norm, rows, .. } = problem;
    let [_, weight, bias] = wanted;
    let both = weight && bias;
    let room = |chunks, elements| Room { threads: THREADS, chunks, elements };
    // Sums of columns take a register for each element that a thread has.
    let of = |chunks, elements| choose(problem, device, wanted, room(chunks, elements));
    let config = match both {
        false => of(4, 16),
        // Where rows do not wait in shared memory, three units are too many.
        true => Some(of(3, 8)).filter(|wide| wide.stages > 0).unwrap_or_else(|| of(2, 8)),
    };
    let Backward { sums, tile, blocks_per_sm, .. } = config;
    let parts = if sums == Sums::Own { 1 } else { problem.units(tile).div_ceil(tile.units()) };
    let most = u64::from((device.multiprocessors * blocks_per_sm).div_ceil(parts));
    let blocks = count(rows.div_ceil(config.rows().into()).min(most));
    let moments = (sums == Sums::Given).then(|| {
        let kernel = Moments { norm, tile }.into();
        Step { kernel, grid: [count(rows), 1, 1] }
    });
    let columns = (weight || bias).then(|| {
        let kernel = Columns { element: norm.weight, both };
        let [x, y] = kernel.grid(problem.cols).map(count);
        Step { kernel: kernel.into(), grid: [x, y, 1] }
    });
    let main = Step { kernel: config.into(), grid: [blocks, parts, 1] };
    Plan { units: problem.units(tile), steps: [moments, Some(main), columns], blocks }
}

/// The kernel whose teams hold a row, if they can in that room, and otherwise a part of it.
fn choose(
    problem: &Problem,
    device: &Device,
    wanted @ [x, weight, bias]: [bool; 3],
    room: Room,
) -> Backward {
    let &Problem { norm, add, .. } = problem;
    let (tile, fits) = problem.tile(room);
    let part = || problem.tile(Room { chunks: 2, elements: 8, ..room }).0;
    let (sums, tile) = match (x, fits) {
        (false, _) => (Sums::None, part()),
        (true, true) => (Sums::Own, tile),
        (true, false) => (Sums::Given, part()),
    };
    let blocks_per_sm = if backward_registers(problem, wanted, tile) <= 64 { 2 } else { 1 };
    let (add, stages, keep) = (add && x, 0, false);
    let config = Backward { norm, sums, add, weight, bias, tile, blocks_per_sm, stages, keep };
    let stages = stages_of(&config, device);
    let keep = sums == Sums::Own
        && blocks_per_sm == 1
        && stages > 0
        && kept_registers(problem, wanted, tile) <= 128;
    Backward { stages, keep, ..config }
}

/// As many as there is room for. Elements that are loaded by themselves go straight to registers.
fn stages_of(config: &Backward, device: &Device) -> u32 {
    const MOST: u32 = 3;
    // For sums of teams.
    const SCRATCH: u32 = 16 << 10;
    let room = shared_of_each(device.shared_per_block, config.blocks_per_sm);
    let bytes = |stages| Ring::bytes(config.tile, THREADS, config.operands(), stages) + SCRATCH;
    let fits = |stages: &u32| config.tile.unit > 1 && bytes(*stages) <= room;
    (2..=MOST).rev().find(fits).unwrap_or(0)
}

/// About how many registers a thread takes that holds its part of a row: as ptxas 13.0 does.
fn backward_registers(problem: &Problem, [x, weight, bias]: [bool; 3], tile: Tile) -> u32 {
    let Norm { element, weight: of_weight, centred } = problem.norm;
    let elements = tile.unit * tile.chunks;
    // An element that is loaded by itself takes a register.
    let words = |bytes: u32| if tile.unit == 1 { elements } else { elements * bytes / 4 };
    let rows = (2 + u32::from(problem.add && x)) * words(element.size());
    let vectors = if x { words(of_weight.size()) } else { 0 };
    let sums = (u32::from(weight) + u32::from(bias)) * elements;
    let ends = if tile.full { 0 } else { 16 + 2 * tile.chunks };
    rows + vectors + sums + ends + if centred { 22 } else { 16 }
}

/// The same of one whose rows wait in shared memory, and x̂ and g in registers.
fn kept_registers(problem: &Problem, [_, weight, bias]: [bool; 3], tile: Tile) -> u32 {
    let elements = tile.unit * tile.chunks;
    let weights = elements * problem.norm.weight.size() / 4;
    (2 + u32::from(weight) + u32::from(bias)) * elements + weights + 40
}
