//! What lies in shared memory, where, and how much of it there is.

use super::boxes::Boxes;
use super::config::{Config, Order, Orient, Store};
use super::packed::{PackedStage, TABLE};
use crate::kernel::Arena;
use crate::kernel::hopper::barriers::{Named, NamedBarriers};
use crate::kernel::hopper::pingpong::Pingpong;
use crate::kernel::hopper::ring::Ring;
use crate::kernel::hopper::{ATOM, LINE, SLAB, WARPGROUP};
use crate::kernel::multiprocessor::shared_of_each;
use crate::kernel::w4::nibbles::Decoder;

/// The offsets of everything in shared memory.
pub(super) struct SharedMap {
    pub lhs: u32,
    pub rhs: u32,
    /// The slabs of the result, or a staged tile.
    pub result: u32,
    /// The scales of each warpgroup's tile, if slabs are multiplied with any.
    pub scales: Option<u32>,
    pub ring: Ring,
    pub pingpong: Option<Pingpong>,
    /// The decoder's table.
    pub table: u32,
    /// Where threads meet that write a part of the result together: those of each warpgroup, or for a
    /// staged tile all that multiply.
    pub meeting: Named,
    pub named_barriers: u32,
    pub bytes: u32,
}

impl Config {
    /// The boxes of a stage of the left operand.
    pub fn lhs_boxes(&self) -> Boxes {
        Boxes::new(self.lhs, self.rows, self.lhs_lines, self.elements[0])
    }

    /// The boxes of a stage of the right operand.
    pub fn rhs_boxes(&self) -> Boxes {
        Boxes::new(self.rhs, self.cols, self.rhs_lines, self.elements[1])
    }

    /// Bytes of a stage.
    pub fn stage_bytes(&self) -> u32 {
        self.lhs_bytes() + self.rhs_boxes().bytes
    }

    /// Those of the left operand.
    pub fn lhs_bytes(&self) -> u32 {
        match &self.weight {
            None => self.lhs_boxes().bytes,
            Some(scheme) => PackedStage::new(scheme, self.rows).bytes,
        }
    }

    /// Bytes of the decoder's table.
    fn table_bytes(&self) -> u32 {
        self.weight.map_or(0, |scheme| Decoder::shared_bytes(scheme.codes, TABLE))
    }

    /// Bytes of what lines of a warpgroup's tile have, in shared memory, where TMA stores it: else the threads
    /// that store it load them.
    pub(super) fn scale_bytes(&self) -> u32 {
        match self.store {
            Store::Tma => {
                let [rows, cols] = self.warpgroup_tile();
                let bytes = self.epilogue.vector_bytes().unwrap_or_default();
                let [of_row, of_col] = self.orient.order(bytes);
                rows * of_row + cols * of_col
            }
            Store::Staged { .. } => 0,
        }
    }

    /// Columns of a slab of the tile, which has 64 rows: a line of `C`, or a quarter of those that fit
    /// a tile of `Cᵀ`, whose columns are lines.
    pub fn slab_cols(&self) -> u32 {
        match self.orient {
            Orient::Plain => LINE / self.epilogue.out.size(),
            Orient::Swapped => 32,
        }
    }

    pub(super) fn slab_bytes(&self) -> u32 {
        SLAB * self.slab_cols() * self.epilogue.out.size()
    }

    /// Columns and rows of `C` that TMA stores at once.
    pub fn result_box(&self) -> [u32; 2] {
        let lines = match self.orient {
            Orient::Plain => SLAB,
            Orient::Swapped => self.slab_cols(),
        };
        [LINE / self.epilogue.out.size(), lines]
    }

    /// Elements between the rows of a staged tile, in f32: such that neither the writes of wgmma's
    /// fragments nor the reads of rows meet in a bank.
    pub(super) fn staged_pitch(&self) -> u32 {
        match self.orient {
            Orient::Plain => self.cols.next_multiple_of(32) + 8,
            Orient::Swapped => self.rows + 4,
        }
    }

    /// Bytes of a team's staged tile.
    pub(super) fn staged_bytes(&self) -> u32 {
        let [lines, _] = self.orient.order([self.rows, self.cols]);
        lines * self.staged_pitch() * 4
    }

    /// Bytes of the slabs, or of a staged tile.
    fn result_bytes(&self) -> u32 {
        match self.store {
            Store::Tma => self.store_stages * self.consumers() * self.slab_bytes(),
            Store::Staged { .. } => self.teams * self.staged_bytes(),
        }
    }

    /// Whether the result lies over the stages, which are done with by then.
    fn reuses_stages(&self) -> bool {
        self.store != Store::Tma && self.order == Order::Grid
    }

    /// The most stages that fit a device whose blocks can have `limit` bytes of shared memory.
    pub fn max_stages(&self, limit: u32) -> u32 {
        let result = if self.reuses_stages() { 0 } else { self.result_bytes() };
        // The barriers of up to 32 stages, and what stages of codes leave unused before a swizzled line's multiple.
        let barriers = 512 + if self.weight.is_some() { ATOM } else { 0 };
        let scales = self.consumers() * self.scale_bytes() + self.table_bytes();
        let share = shared_of_each(limit, self.blocks_per_sm);
        (share.saturating_sub(result + scales + barriers) / self.stage_bytes()).min(32)
    }

    /// The offsets of everything.
    pub(super) fn smem(&self) -> SharedMap {
        let mut arena = Arena::default();
        let lhs = arena.region(self.stages * self.lhs_bytes(), ATOM);
        let rhs = arena.region(self.stages * self.rhs_boxes().bytes, ATOM);
        let result = match self.reuses_stages() {
            false => arena.region(self.result_bytes(), ATOM),
            true => {
                arena.used = arena.used.max(self.result_bytes());
                lhs
            }
        };
        let scales = match self.consumers() * self.scale_bytes() {
            0 => None,
            bytes => Some(arena.region(bytes, 16)),
        };
        let table = arena.region(self.table_bytes(), 16);
        let ring = Ring::new(&mut arena, self.stages);
        let pingpong = self.pingpong.then(|| Pingpong::new(&mut arena));
        let mut barriers = NamedBarriers::new();
        let meeting = match self.store {
            Store::Tma => barriers.each(self.consumers(), WARPGROUP),
            Store::Staged { .. } => barriers.each(1, WARPGROUP * self.consumers()),
        };
        let named_barriers = barriers.used();
        SharedMap {
            lhs,
            rhs,
            result,
            scales,
            table,
            ring,
            pingpong,
            meeting,
            named_barriers,
            bytes: arena.used,
        }
    }
}
