//! The choices, and what follows from them.

use crate::kernel::ampere::product::M16;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::{Lengths, Mask, TileShape, Variant};
use crate::kernel::multiprocessor::{REGISTERS, WARP, shared_of_each};
use crate::kernel::name::{given, several};
use crate::kernel::{Arena, Element};

/// Stages of keys and values.
pub(super) const STAGES: u32 = 2;
/// Registers of a thread beside sums, scores, exponentials and queries: with fewer ptxas spills. More
/// for each m16 tile.
const SPARE_REGISTERS: u32 = 36;
const M16_REGISTERS: u32 = 12;
/// The same for f32, whose operands are in parts.
const TF32X3_REGISTERS: u32 = 100;
/// More of them for a window or lengths in memory, and for score modifications.
const MASK_REGISTERS: u32 = 16;
const SCORE_REGISTERS: u32 = 8;
/// Bytes of keys and values that stay in L2 together: devices have 4 to 96 MB.
const SECTION_BYTES: u64 = 16 << 20;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// What it computes.
    pub variant: Variant,
    /// The operands' type.
    pub element: Element,
    /// Warps of a block: 2, 4 or 8.
    pub warps: u32,
    /// Tiles of 16 rows of a warp: 1 or 2. What it loads is multiplied with all of them.
    pub m16_tiles: u32,
    /// Keys of a block: a multiple of 4 for each warp, and of 16.
    pub keys: u32,
    /// Blocks of a multiprocessor.
    pub blocks_per_sm: u32,
    /// Queries stay in registers. Else, and always for f32, they are loaded from shared memory for each
    /// block of keys.
    pub q_in_regs: bool,
}

/// The offsets of everything in shared memory.
pub(super) struct SharedMap {
    pub queries: u32,
    /// Keys and values of the first stage.
    pub keys: u32,
    pub values: u32,
    /// Bytes from stage to stage.
    pub stage_bytes: u32,
    pub bytes: u32,
}

impl Config {
    /// `flash80 128x64 d128/64 4warps 2/sm kept pack4, bf16→f32 causal +bf16 softcap alibi packed lse
    /// split`: as for [`sm90::Config::name`](crate::kernel::attention::sm90::Config::name), with warps,
    /// the blocks of a multiprocessor, and whether queries stay in registers.
    pub fn name(&self) -> String {
        let Self { variant, keys, warps, .. } = self;
        let blocks = several(self.blocks_per_sm, |blocks| format!(" {blocks}/sm"));
        let kept = given(self.q_in_regs, " kept");
        let described = variant.describe(self.element, false);
        let (rows, widths) = (self.rows(), variant.widths());
        format!("flash80 {rows}x{keys} {widths} {warps}warps{blocks}{kept}{described}")
    }

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
        M16 * self.m16_tiles
    }

    /// Queries of each head in a tile.
    pub fn positions(&self) -> u32 {
        self.rows() / self.variant.pack
    }

    /// Rows of a tile that are queries, if not all are.
    pub(super) fn used_rows(&self) -> Option<u32> {
        let used = self.positions() * self.variant.pack;
        (used < self.rows()).then_some(used)
    }

    fn lines(&self, count: u32, dim: u32) -> SwizzledTile {
        SwizzledTile::new(count, dim, self.element.size())
    }

    pub(super) fn query_tile(&self) -> SwizzledTile {
        self.lines(self.rows(), self.variant.head_dim)
    }

    pub(super) fn key_tile(&self) -> SwizzledTile {
        self.lines(self.keys, self.variant.head_dim)
    }

    pub(super) fn value_tile(&self) -> SwizzledTile {
        self.lines(self.keys, self.variant.value_dim)
    }

    /// Columns of a row of sums: for f32 those of whole panels.
    pub(super) fn columns(&self) -> u32 {
        match self.element {
            Element::Half(_) => self.variant.value_dim,
            Element::F32 => self.value_tile().panels() * self.value_tile().width(),
        }
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let shared = self.smem().bytes;
        let limit = shared_of_each(limit, self.blocks_per_sm);
        // The widest heads have no other tile, and these are estimates.
        let smallest = self.element == Element::F32 && self.keys == 16;
        let (registers, most) = (self.needed_registers(), self.most_registers());
        let rules = [
            (
                (1..=256).contains(&self.variant.head_dim),
                format!("queries of {} elements (1 to 256)", self.variant.head_dim),
            ),
            (
                self.variant.value_dim.is_multiple_of(8)
                    && (8..=256).contains(&self.variant.value_dim),
                format!(
                    "values of {} elements (a multiple of 8 up to 256)",
                    self.variant.value_dim
                ),
            ),
            (
                matches!(self.warps, 2 | 4 | 8) && matches!(self.m16_tiles, 1 | 2),
                format!(
                    "{} warps of {} m16 tiles (2, 4 or 8 of 1 or 2)",
                    self.warps, self.m16_tiles
                ),
            ),
            (
                self.keys.is_multiple_of(16)
                    && self.keys.is_multiple_of(4 * self.warps)
                    && (16..=128).contains(&self.keys),
                format!("blocks of {} keys by {} warps", self.keys, self.warps),
            ),
            (
                (1..=self.rows()).contains(&self.variant.pack),
                format!("{} heads in a tile (at most {})", self.variant.pack, self.rows()),
            ),
            (
                self.variant.can_be_split(),
                "parts of packed sequences, or not in f32, with their sums".into(),
            ),
            (
                self.element != Element::F32
                    || (self.variant.out == Element::F32 && !self.q_in_regs),
                "f32 operands to another type, or queries that stay".into(),
            ),
            (
                registers <= most || smallest,
                format!("{registers} registers of a thread (at most {most})"),
            ),
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
        // Those that do not stay are loaded for an m16 tile while another's are multiplied.
        let queries =
            4 * if self.q_in_regs { self.query_tile().steps() } else { self.m16_tiles - 1 };
        let products = match self.element {
            // With exponentials in pairs.
            Element::Half(_) => scores + scores / 2,
            // With two parts of the sums.
            Element::F32 => 3 * scores,
        };
        let m16 = self.columns() / 2 + products + queries;
        let mut spare = match self.element {
            Element::Half(_) => SPARE_REGISTERS,
            Element::F32 => TF32X3_REGISTERS,
        };
        if self.variant.mask == Mask::Window || self.variant.lengths != Lengths::Full {
            spare += MASK_REGISTERS;
        }
        if !self.variant.score_mod.plain() {
            spare += SCORE_REGISTERS;
        }
        spare + self.m16_tiles * (M16_REGISTERS + m16 + self.variant.score_mod.registers(scores))
    }

    pub(super) fn smem(&self) -> SharedMap {
        let mut arena = Arena::default();
        let align = SwizzledTile::ALIGN;
        let queries = arena.region(self.query_tile().bytes(), align);
        let keys = arena.region(self.key_tile().bytes(), align);
        let values = arena.region(self.value_tile().bytes(), align);
        let stage_bytes = arena.used - keys;
        for _ in 1..STAGES {
            arena.region(stage_bytes, align);
        }
        SharedMap { queries, keys, values, stage_bytes, bytes: arena.used }
    }
}

impl From<&Config> for TileShape {
    fn from(config: &Config) -> Self {
        Self {
            variant: config.variant,
            positions: config.positions(),
            keys: config.keys,
            blocks_per_sm: config.blocks_per_sm,
            persistent: false,
            section_bytes: SECTION_BYTES,
        }
    }
}
