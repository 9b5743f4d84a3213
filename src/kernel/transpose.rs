//! The transposition of a matrix of bytes, `[rows, cols]` to `[cols, rows]`: tensor cores take 8-bit operands
//! along K alone.
//!
//! A thread loads 16 bytes of each of four rows, and turns four by four bytes at a time in registers. The words
//! go through shared memory, so that eight lanes store 128 bytes of a row of the result together.

use super::Device;
use super::params::{self, Argument, names};
use super::plan::{Step, count};
use crate::ptx::{Kernel, Reg, Source, Target};

/// Rows and columns of a block's tile.
const TILE: u32 = 128;
/// Bytes that a thread loads or stores at once.
const CHUNK: u32 = 16;
/// Chunks of a line of the tile.
const CHUNKS: u32 = TILE / CHUNK;
/// Threads of a block: one for each chunk of four rows.
const THREADS: u32 = TILE / 4 * CHUNKS;

/// The facts of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Problem {
    /// Rows of the matrix, at least 1.
    pub rows: u64,
    /// Its columns, at least 1. What follows each row up to a multiple of 16 is read, and ignored.
    pub cols: u64,
}

impl Problem {
    /// Bytes of a row of the result, which ends with zeros: a multiple of 16.
    pub fn out_row(&self) -> u64 {
        self.rows.next_multiple_of(CHUNK.into())
    }

    /// What is beyond what a grid can count, and the most that it can.
    pub fn limit(&self) -> Option<(String, u64)> {
        const MOST: u64 = i32::MAX as u64;
        let Plan { tile_rows, tile_cols } = Plan::of(self);
        let tiles = u64::from(tile_rows) * u64::from(tile_cols);
        let over = self.rows.max(self.cols) > MOST - u64::from(TILE) || tiles > MOST;
        over.then(|| (format!("a matrix of {} x {} bytes", self.rows, self.cols), MOST))
    }
}

/// There is nothing to choose.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config;

impl Config {
    /// `transpose 128x128, bytes`
    pub fn name(&self) -> String {
        format!("transpose {TILE}x{TILE}, bytes")
    }
}

/// The tiles: blocks of the grid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    tile_rows: u32,
    tile_cols: u32,
}

impl Plan {
    fn of(problem: &Problem) -> Self {
        let tiles = |lines: u64| count(lines.div_ceil(TILE.into()));
        Self { tile_rows: tiles(problem.rows), tile_cols: tiles(problem.cols) }
    }
}

impl super::Plan for Plan {
    type Problem = Problem;
    type Name = Name;

    fn new(problem: &Problem, _: &Device) -> Self {
        Self::of(problem)
    }

    fn steps(&self) -> Vec<Step> {
        let blocks = self.tile_rows.saturating_mul(self.tile_cols);
        vec![Step { kernel: Config.into(), grid: [blocks, 1, 1] }]
    }
}

names! {
    /// The parameters. Rows begin at multiples of 16 bytes.
    pub enum Name {
        /// The address of the matrix.
        Input "input",
        /// Bytes from row to row.
        InputRow "input_row",
        /// The address of the result.
        Out "out",
        /// Bytes from row to row, which end with zeros.
        OutRow "out_row",
        /// Rows of the matrix.
        Rows "rows",
        /// Columns of the matrix.
        Cols "cols",
        /// Tiles side by side.
        TileCols "tile_cols",
    }
}

/// One launch.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    /// What is computed.
    pub problem: &'a Problem,
    /// The grid.
    pub plan: &'a Plan,
    /// The address of the matrix, and bytes from row to row.
    pub input: (u64, u64),
    /// The address of the result.
    pub out: u64,
}

impl params::Arguments for Arguments<'_> {
    type Name = Name;

    fn argument(&self, _: usize, name: Name) -> Option<Argument> {
        Some(match name {
            Name::Input => Argument::Pointer(self.input.0),
            Name::InputRow => Argument::U64(self.input.1),
            Name::Out => Argument::Pointer(self.out),
            Name::OutRow => Argument::U32(count(self.problem.out_row())),
            Name::Rows => Argument::U32(count(self.problem.rows)),
            Name::Cols => Argument::U32(count(self.problem.cols)),
            Name::TileCols => Argument::U32(self.plan.tile_cols),
        })
    }
}

/// The kernel. Its parameters are those of [`Name`].
///
/// ```text
/// in memory    thread (quad r, chunk j): rows 4r..4r+4, columns 16j..16j+16
/// in shared    word r of line n (four rows of column n) lies at r ^ 4(n / 16): neither the writes of a warp, of 8
///              chunks and 4 quads, nor the reads of 8 chunks of a line meet in a bank
/// ```
pub fn emit(_: &Config) -> Source {
    let k = &Kernel::new("transpose", Target::Sm80, THREADS);
    let (input, input_row) = (k.pointer(Name::Input), k.param::<u64>(Name::InputRow));
    let (out, out_row) = (k.pointer(Name::Out), k.param::<u32>(Name::OutRow));
    let (rows, cols) = (k.param::<u32>(Name::Rows), k.param::<u32>(Name::Cols));
    let tile_cols = k.param::<u32>(Name::TileCols);
    let base = k.shared(TILE * TILE);
    let (thread, block) = (k.thread(), k.block_x());
    let first_row = block / tile_cols * TILE;
    let first_col = block % tile_cols * TILE;

    // Four rows of 16 columns.
    let (quad, chunk) = (thread / CHUNKS, thread % CHUNKS);
    let (row, col) = (first_row + quad * 4, first_col + chunk * CHUNK);
    let inside = col.lt(cols);
    let from = input + (row.wide() * input_row + col.wide());
    let mut address = from;
    let lines: Vec<[Reg<u32>; 4]> = (0..4)
        .map(|i| {
            if i > 0 {
                address = address + input_row;
            }
            let valid = (row + i).lt(rows) & inside;
            let words = k.when(valid, || k.ld_global_nc::<u32, 4>(address));
            words.map(|word| k.select(valid, word, 0))
        })
        .collect();
    let place = quad ^ (chunk * 4);
    let to = base + (chunk * CHUNK * TILE + place * 4);
    let columns = |group: usize| turned(std::array::from_fn(|i| lines[i][group]));
    for (line, word) in (0..).zip((0..4).flat_map(columns)) {
        k.st_shared(to.at(line * i64::from(TILE)), [word]);
    }
    k.sync_block();

    // Chunks of lines of the result.
    let along = first_row + chunk * CHUNK;
    let inside = along.lt(out_row);
    for line in (0..TILE).step_by((THREADS / CHUNKS) as usize) {
        let line = quad + line;
        let words = k.ld_shared::<u32, 4>(base + (line * TILE + (chunk ^ (line / CHUNK)) * CHUNK));
        let col = first_col + line;
        let to = out + (col.wide() * out_row.wide() + along.wide());
        k.when(inside & col.lt(cols), || k.st_global(to, words));
    }
    k.finish()
}

/// Four words whose bytes are the columns of four words.
fn turned<'k>(rows: [Reg<'k, u32>; 4]) -> [Reg<'k, u32>; 4] {
    let k = rows[0].kernel();
    let [a, b, c, d] = rows;
    // Of two rows each: columns 0 and 1, and 2 and 3.
    let halves = [0x5140, 0x7362].map(|which| (k.prmt(a, b, which), k.prmt(c, d, which)));
    let [(low_ab, low_cd), (high_ab, high_cd)] = halves;
    [
        k.prmt(low_ab, low_cd, 0x5410),
        k.prmt(low_ab, low_cd, 0x7632),
        k.prmt(high_ab, high_cd, 0x5410),
        k.prmt(high_ab, high_cd, 0x7632),
    ]
}
