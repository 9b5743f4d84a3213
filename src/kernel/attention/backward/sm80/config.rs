//! The choices, and what follows from them.

use super::super::variant::Variant;
use super::super::work::KEPT_WORDS;
use super::super::{Side, TileShape};
use crate::kernel::ampere::product::M16;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::{Lengths, Mask};
use crate::kernel::multiprocessor::{REGISTERS, WARP, shared_of_each};
use crate::kernel::name::{given, several};
use crate::kernel::{Arena, Element};

/// Registers of a thread beside sums, scores and gradients: with fewer ptxas spills. More for each m16 tile.
const SPARE_REGISTERS: u32 = 38;
const M16_REGISTERS: u32 = 12;
/// The same for f32, whose operands are in parts.
const TF32X3_REGISTERS: u32 = 84;
/// More of them for a window or lengths in memory, and for score modifications.
const MASK_REGISTERS: u32 = 12;
const SCORE_REGISTERS: u32 = 8;
/// Bytes of what stays in L2 together: devices have 4 to 96 MB.
const SECTION_BYTES: u64 = 16 << 20;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// What it computes gradients of.
    pub variant: Variant,
    /// The operands' type.
    pub element: Element,
    /// Which gradients.
    pub pass: Pass,
    /// Warps of a block: 1, 2, 4 or 8.
    pub warps: u32,
    /// Tiles of 16 rows of a warp: 1 or 2. What it loads is multiplied with all of them.
    pub m16_tiles: u32,
    /// Columns of a block: a multiple of 16.
    pub cols: u32,
    /// Blocks of columns in shared memory: 1, or 2, of which one is copied while the other is multiplied.
    pub stages: u32,
    /// Blocks of a multiprocessor.
    pub blocks_per_sm: u32,
}

/// A pass over all pairs of a query and a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Tiles of keys, against blocks of the queries of all heads that share them.
    Keys(KeySums),
    /// Tiles of queries, against blocks of keys: their gradient.
    Queries,
    /// Tiles of queries and keys, of all sequences and heads that share a bias: its gradient.
    Bias {
        /// There is an even number of keys: neighbours are stored together.
        pairs: bool,
        /// All queries share it.
        shared: bool,
    },
}

/// Which gradients a pass over tiles of keys has: both, if a thread has registers for their sums.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum KeySums {
    /// Those of keys and values.
    Both,
    /// That of the keys.
    Keys,
    /// That of the values.
    Values,
}

/// The offsets of everything in shared memory. Of two regions one is for what is as wide as a key, one for what
/// is as wide as a value.
pub(super) struct SharedMap {
    /// The rows.
    pub left: [u32; 2],
    /// The columns of the first stage.
    pub right: [u32; 2],
    /// The numbers of queries, be they rows, or columns of the first stage: what is subtracted from scores, the
    /// logarithms, the deltas.
    pub numbers: u32,
    /// The current tile.
    pub kept: u32,
    /// Bytes from stage to stage.
    pub stage_bytes: u32,
    pub bytes: u32,
}

impl Pass {
    /// What rows are.
    pub fn side(self) -> Side {
        match self {
            Self::Keys(_) => Side::Keys,
            Self::Queries | Self::Bias { .. } => Side::Queries,
        }
    }

    /// Whether it needs the gradient of the scores, or the probabilities alone.
    pub(super) fn has_score_grads(self) -> bool {
        self != Self::Keys(KeySums::Values)
    }

    /// Whether it sums what is as wide as a key, and what is as wide as a value.
    pub(super) fn sums(self) -> [bool; 2] {
        match self {
            Self::Keys(KeySums::Both) => [true, true],
            Self::Keys(KeySums::Keys) | Self::Queries => [true, false],
            Self::Keys(KeySums::Values) => [false, true],
            Self::Bias { .. } => [false, false],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Keys(KeySums::Both) => "dkv80",
            Self::Keys(KeySums::Keys) => "dk80",
            Self::Keys(KeySums::Values) => "dv80",
            Self::Queries => "dq80",
            Self::Bias { .. } => "dbias80",
        }
    }
}

impl Config {
    /// `dkv80 128x64 d128/64 8warps 2stages 2/sm, bf16 causal +bf16 packed softcap alibi`: rows of a tile by
    /// columns of a block, elements of a query by those of a value.
    pub fn name(&self) -> String {
        let Self { variant, pass, warps, cols, .. } = self;
        let stages = several(self.stages, |stages| format!(" {stages}stages"));
        let blocks = several(self.blocks_per_sm, |blocks| format!(" {blocks}/sm"));
        let of_bias = match *pass {
            Pass::Bias { pairs, shared } => [given(pairs, " x2"), given(shared, " shared")],
            Pass::Keys(_) | Pass::Queries => [""; 2],
        };
        let (rows, widths) = (self.rows(), variant.widths());
        let (name, of_bias, end) = (pass.name(), of_bias.concat(), variant.describe(self.element));
        format!("{name} {rows}x{cols} {widths} {warps}warps{stages}{blocks}{of_bias}{end}")
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

    /// Elements of a query and of a value.
    pub(super) fn dims(&self) -> [u32; 2] {
        [self.variant.head_dim, self.variant.value_dim]
    }

    fn lines(&self, count: u32) -> [SwizzledTile; 2] {
        self.dims().map(|dim| SwizzledTile { count, dim, size: self.element.size() })
    }

    /// Rows, as wide as a key and as a value.
    pub(super) fn left_tiles(&self) -> [SwizzledTile; 2] {
        self.lines(self.rows())
    }

    /// The columns of a block.
    pub(super) fn right_tiles(&self) -> [SwizzledTile; 2] {
        self.lines(self.cols)
    }

    /// Columns of a row of each of the sums: for f32 those of whole panels.
    pub(super) fn sum_columns(&self) -> [u32; 2] {
        let columns = |i: usize| match (self.pass.sums()[i], self.element) {
            (false, _) => 0,
            (true, Element::Half(_)) => self.dims()[i].next_multiple_of(8),
            (true, Element::F32) => {
                let tile = self.right_tiles()[i];
                tile.panels() * tile.width()
            }
        };
        [columns(0), columns(1)]
    }

    /// Whether sums are so wide that ptxas has to be kept from loading ahead.
    pub(super) fn wide(&self) -> bool {
        self.sum_columns().iter().sum::<u32>() > 192
    }

    /// Queries in shared memory, of a stage if they are columns.
    pub(super) fn queries(&self) -> u32 {
        match self.pass.side() {
            Side::Queries => self.rows(),
            Side::Keys => self.cols,
        }
    }

    /// Numbers of each of them.
    pub(super) fn numbers(&self) -> u32 {
        if self.pass.has_score_grads() { 3 } else { 2 }
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let shared = self.smem().bytes;
        let limit = shared_of_each(limit, self.blocks_per_sm);
        // The widest heads have no other tile, and these are estimates.
        let smallest = self.cols == 16 && self.m16_tiles == 1 && self.blocks_per_sm == 1;
        let (registers, most) = (self.needed_registers(), self.most_registers());
        let dims = self.dims();
        let rules = [
            (
                dims.iter().all(|dim| (1..=256).contains(dim)),
                format!("heads of {dims:?} elements (1 to 256)"),
            ),
            (
                matches!(self.warps, 1 | 2 | 4 | 8) && matches!(self.m16_tiles, 1 | 2),
                format!(
                    "{} warps of {} m16 tiles (1, 2, 4 or 8 of 1 or 2)",
                    self.warps, self.m16_tiles
                ),
            ),
            (
                matches!(self.cols, 16 | 32 | 64)
                    && self.cols.is_multiple_of(4 * self.warps)
                    && self.cols <= self.threads(),
                format!("blocks of {} columns by {} warps", self.cols, self.warps),
            ),
            (matches!(self.stages, 1 | 2), format!("{} stages (1 or 2)", self.stages)),
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
        let scores = self.cols / 2;
        let grads = if self.pass.has_score_grads() { scores } else { 0 };
        let products = match self.element {
            // With probabilities in pairs.
            Element::Half(_) => scores + grads + scores / 2,
            // With two parts of the sums.
            Element::F32 => 3 * scores + grads,
        };
        let sums = match self.pass {
            Pass::Bias { .. } => scores,
            Pass::Keys(_) | Pass::Queries => self.sum_columns().iter().sum::<u32>() / 2,
        };
        let score_mod = &self.variant.score_mod;
        let slopes = if score_mod.softcap { grads } else { 0 };
        let m16 = sums + products + slopes + score_mod.registers(scores);
        let mut spare = match self.element {
            Element::Half(_) => SPARE_REGISTERS,
            Element::F32 => TF32X3_REGISTERS,
        };
        if self.variant.mask == Mask::Window || self.variant.lengths != Lengths::Full {
            spare += MASK_REGISTERS;
        }
        if !score_mod.plain() {
            spare += SCORE_REGISTERS;
        }
        spare + self.m16_tiles * (M16_REGISTERS + m16)
    }

    pub(super) fn smem(&self) -> SharedMap {
        let mut arena = Arena::default();
        let mut tile = |tile: SwizzledTile, wanted: bool| {
            let bytes = if wanted { tile.bytes() } else { 0 };
            arena.region(bytes, SwizzledTile::ALIGN)
        };
        // Without the gradient of the scores the rows as wide as a value have no part.
        let [narrow, wide] = self.left_tiles();
        let left = [tile(narrow, true), tile(wide, self.pass.has_score_grads())];
        let kept = arena.region(KEPT_WORDS * 4, 16);
        let numbers_bytes = self.numbers() * self.queries() * 4;
        let of_rows = match self.pass.side() {
            Side::Queries => Some(arena.region(numbers_bytes, 16)),
            Side::Keys => None,
        };
        let tile = |tile: SwizzledTile| arena.region(tile.bytes(), SwizzledTile::ALIGN);
        let right = self.right_tiles().map(tile);
        let numbers = of_rows.unwrap_or_else(|| arena.region(numbers_bytes, 16));
        let stage_bytes = (arena.used - right[0]).next_multiple_of(SwizzledTile::ALIGN);
        for _ in 1..self.stages {
            arena.region(stage_bytes, SwizzledTile::ALIGN);
        }
        SharedMap { left, right, numbers, kept, stage_bytes, bytes: arena.used }
    }

    /// Which tiles there are, of a group of heads that share keys.
    pub fn tile_shape(&self, group: u64) -> TileShape {
        let bytes = u64::from(self.dims().iter().sum::<u32>() * self.element.size());
        TileShape {
            side: self.pass.side(),
            rows: self.rows(),
            cols: self.cols,
            mask: self.variant.mask,
            lengths: self.variant.lengths,
            blocks_per_sm: self.blocks_per_sm,
            persistent: false,
            forwards: false,
            // Of keys a head has all its queries' heads, of queries its keys are shared by them.
            bytes_of_column: match self.pass.side() {
                Side::Keys => bytes * group,
                Side::Queries => (bytes / group).max(1),
            },
            section_bytes: SECTION_BYTES,
        }
    }
}
