//! The choices, and what follows from them.

use super::lines::Lines;
use crate::kernel::attention::{Lengths, Mask, Scores, Tiling};
use crate::kernel::{Arena, Element};
use crate::ptx::Half;

/// Lanes of a warp.
pub(super) const WARP: u32 = 32;
/// Rows of a strip: those of an `mma`.
pub(super) const STRIP: u32 = 16;
/// Stages of keys and values.
pub(super) const STAGES: u32 = 2;
/// Bytes of shared memory that a multiprocessor keeps for itself from each block.
const RESERVED: u32 = 1024;
/// Registers of a multiprocessor.
const REGISTERS: u32 = 65_536;
/// Registers of a thread beside sums, scores, exponentials and queries: with fewer ptxas spills. More
/// for each strip.
const SPARE_REGISTERS: u32 = 36;
const STRIP_REGISTERS: u32 = 12;
/// More of them for a window or lengths in memory, and for what becomes of scores.
const MASK_REGISTERS: u32 = 16;
const SCORE_REGISTERS: u32 = 8;
/// Bytes of keys and values that stay in L2 together: devices have 4 to 96 MB.
const SECTION_BYTES: u64 = 16 << 20;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The operands' type.
    pub half: Half,
    /// The result's type.
    pub out: Element,
    /// Elements of a query and of a key, at most 256.
    pub head_dim: u32,
    /// Elements of a value, a multiple of 8, at most 256.
    pub value_dim: u32,
    /// Warps of a block: 4 or 8.
    pub warps: u32,
    /// 16 rows of a tile each, that a warp has: 1 or 2. What it loads is multiplied with all of them.
    pub strips: u32,
    /// Keys of a block: a multiple of 4 for each warp, and of 16.
    pub keys: u32,
    /// Blocks of a multiprocessor.
    pub blocks_per_sm: u32,
    /// Queries stay in registers. Else they are loaded from shared memory for each block of keys.
    pub kept: bool,
    /// What hides keys.
    pub mask: Mask,
    /// What becomes of scores.
    pub scores: Scores,
    /// How long sequences are.
    pub lengths: Lengths,
    /// Heads that share keys and whose queries share a tile: row `r` is of head `r % pack`. 1: a tile
    /// is of one head.
    pub pack: u32,
    /// The keys of a tile are divided among several blocks, whose results are
    /// [combined](super::super::combine) later.
    pub split: bool,
    /// Whether the logarithms of the sums are stored.
    pub lse: bool,
}

/// Where things lie in shared memory.
pub(super) struct Plan {
    pub queries: u32,
    /// Of the first stage.
    pub keys: u32,
    pub values: u32,
    /// From stage to stage.
    pub stage_bytes: u32,
    pub bytes: u32,
}

impl Config {
    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        WARP * self.warps
    }

    /// Rows of a tile.
    pub fn rows(&self) -> u32 {
        self.warp_rows() * self.warps
    }

    /// Rows of a warp.
    pub(super) fn warp_rows(&self) -> u32 {
        STRIP * self.strips
    }

    /// Queries of each head in a tile.
    pub fn positions(&self) -> u32 {
        self.rows() / self.pack
    }

    /// Rows of a tile that are queries, if not all are.
    pub(super) fn used_rows(&self) -> Option<u32> {
        let used = self.positions() * self.pack;
        (used < self.rows()).then_some(used)
    }

    pub(super) fn query_lines(&self) -> Lines {
        Lines { count: self.rows(), dim: self.head_dim }
    }

    pub(super) fn key_lines(&self) -> Lines {
        Lines { count: self.keys, dim: self.head_dim }
    }

    pub(super) fn value_lines(&self) -> Lines {
        Lines { count: self.keys, dim: self.value_dim }
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let shared = self.plan().bytes;
        let limit = ((limit + RESERVED) / self.blocks_per_sm.max(1)).saturating_sub(RESERVED);
        let (registers, most) = (self.needed_registers(), self.most_registers());
        let rules = [
            (
                (1..=256).contains(&self.head_dim),
                format!("queries of {} elements (1 to 256)", self.head_dim),
            ),
            (
                self.value_dim.is_multiple_of(8) && (8..=256).contains(&self.value_dim),
                format!("values of {} elements (a multiple of 8 up to 256)", self.value_dim),
            ),
            (
                matches!(self.warps, 4 | 8) && matches!(self.strips, 1 | 2),
                format!("{} warps of {} strips (4 or 8 of 1 or 2)", self.warps, self.strips),
            ),
            (
                self.keys.is_multiple_of(16)
                    && self.keys.is_multiple_of(4 * self.warps)
                    && (16..=128).contains(&self.keys),
                format!("blocks of {} keys by {} warps", self.keys, self.warps),
            ),
            (
                (1..=self.rows()).contains(&self.pack),
                format!("{} heads in a tile (at most {})", self.pack, self.rows()),
            ),
            (
                !self.split
                    || (self.lengths != Lengths::Packed && self.out == Element::F32 && self.lse),
                "parts of packed sequences, or not in f32, with their sums".into(),
            ),
            (registers <= most, format!("{registers} registers of a thread (at most {most})")),
            (shared <= limit, format!("{shared} bytes of shared memory (at most {limit})")),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }

    fn most_registers(&self) -> u32 {
        (REGISTERS / (self.threads() * self.blocks_per_sm.max(1)) / 8 * 8).min(255)
    }

    fn needed_registers(&self) -> u32 {
        let scores = self.keys / 2;
        let queries = if self.kept { self.query_lines().steps() * 4 } else { 0 };
        let strip = self.value_dim / 2 + scores + scores / 2 + queries;
        let mut spare = SPARE_REGISTERS;
        if self.mask == Mask::Window || self.lengths != Lengths::Full {
            spare += MASK_REGISTERS;
        }
        if !self.scores.plain() {
            spare += SCORE_REGISTERS;
        }
        spare + self.strips * (STRIP_REGISTERS + strip + self.scores.registers(scores))
    }

    pub(super) fn plan(&self) -> Plan {
        let mut arena = Arena::default();
        let align = Lines::BYTES * 8;
        let queries = arena.region(self.query_lines().bytes(), align);
        let keys = arena.region(self.key_lines().bytes(), align);
        let values = arena.region(self.value_lines().bytes(), align);
        let stage_bytes = arena.used - keys;
        for _ in 1..STAGES {
            arena.region(stage_bytes, align);
        }
        Plan { queries, keys, values, stage_bytes, bytes: arena.used }
    }
}

impl From<&Config> for Tiling {
    fn from(config: &Config) -> Self {
        Self {
            positions: config.positions(),
            pack: config.pack,
            keys: config.keys,
            mask: config.mask,
            lengths: config.lengths,
            split: config.split,
            blocks_per_sm: config.blocks_per_sm,
            section_bytes: SECTION_BYTES,
        }
    }
}
