//! The choices, and what follows from them.

use super::super::sums;
use super::super::variant::Variant;
use super::super::work::KEPT_WORDS;
use super::super::{Side, TileShape};
use crate::kernel::ampere::product::M16;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::multiprocessor::{REGISTERS, WARP, shared_of_each};
use crate::kernel::name::{given, several};
use crate::kernel::{Arena, Element};

/// Registers of a thread beside sums, scores and gradients: with fewer ptxas spills. More for each m16 tile.
const SPARE_REGISTERS: u32 = 43;
const M16_REGISTERS: u32 = 10;
/// The same for f32, whose operands are in parts.
const TF32X3_REGISTERS: u32 = 114;
/// More of them for score modifications, or half of that for f32.
const SCORE_REGISTERS: u32 = 16;
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
    /// Two warps have the same rows: each multiplies half of a block's columns, and has half of the sums' columns.
    /// P and dS go from one to the other through shared memory. That halves the sums of a thread, and what is read
    /// for them.
    pub paired: bool,
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
    /// Those of keys and values, and shares of the queries', which are added up in memory.
    All,
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
    /// What paired warps give each other, to be multiplied with columns as wide as a key (dS) and as a value (P).
    pub given: [u32; 2],
    /// dS of a block, where shares of dQ are made of it: a line of each key.
    pub score_grads: u32,
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
            Self::Keys(KeySums::All | KeySums::Both) => [true, true],
            Self::Keys(KeySums::Keys) | Self::Queries => [true, false],
            Self::Keys(KeySums::Values) => [false, true],
            Self::Bias { .. } => [false, false],
        }
    }

    /// Whether it makes shares of the gradient of the queries beside.
    pub fn shares_queries(self) -> bool {
        self == Self::Keys(KeySums::All)
    }

    fn name(self) -> &'static str {
        match self {
            Self::Keys(KeySums::All) => "dqkv80",
            Self::Keys(KeySums::Both) => "dkv80",
            Self::Keys(KeySums::Keys) => "dk80",
            Self::Keys(KeySums::Values) => "dv80",
            Self::Queries => "dq80",
            Self::Bias { .. } => "dbias80",
        }
    }
}

impl Config {
    /// `dkv80 128x64 d128/64 8warps paired 2stages 2/sm, bf16 causal +bf16 packed softcap alibi`: rows of a tile by
    /// columns of a block, elements of a query by those of a value, and whether they are f32.
    pub fn name(&self) -> String {
        let Self { variant, pass, warps, cols, .. } = self;
        let stages = several(self.stages, |stages| format!(" {stages}stages"));
        let blocks = several(self.blocks_per_sm, |blocks| format!(" {blocks}/sm"));
        let paired = given(self.paired, " paired");
        let exact = given(self.element == Element::F32, " f32");
        let of_bias = match *pass {
            Pass::Bias { pairs, shared } => [given(pairs, " x2"), given(shared, " shared")],
            Pass::Keys(_) | Pass::Queries => [""; 2],
        };
        let (rows, widths) = (self.rows(), variant.widths());
        let (name, of_bias, end) = (pass.name(), of_bias.concat(), variant.describe(self.element));
        format!(
            "{name} {rows}x{cols} {widths}{exact} {warps}warps{paired}{stages}{blocks}{of_bias}{end}"
        )
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        WARP * self.warps
    }

    /// Rows of a tile.
    pub fn rows(&self) -> u32 {
        self.warp_rows() * self.warps / self.sharers()
    }

    /// Warps that have the same rows.
    pub(super) fn sharers(&self) -> u32 {
        if self.paired { 2 } else { 1 }
    }

    /// Columns of a block that a warp multiplies.
    pub(super) fn warp_cols(&self) -> u32 {
        self.cols / self.sharers()
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
        self.dims().map(|dim| SwizzledTile::new(count, dim, self.element.size()))
    }

    /// Rows, as wide as a key and as a value.
    pub(super) fn left_tiles(&self) -> [SwizzledTile; 2] {
        self.lines(self.rows())
    }

    /// The columns of a block.
    pub(super) fn right_tiles(&self) -> [SwizzledTile; 2] {
        self.lines(self.cols)
    }

    /// Columns of a row of each of a warp's sums: for f32, and of paired warps, those of whole panels.
    pub(super) fn sum_columns(&self) -> [u32; 2] {
        let columns = |i: usize| match (self.pass.sums()[i], self.element) {
            (false, _) => 0,
            (true, Element::Half(_)) if !self.paired => self.dims()[i].next_multiple_of(8),
            (true, _) => self.panels(i) / self.sharers() * self.right_tiles()[i].width(),
        };
        [columns(0), columns(1)]
    }

    /// Bytes of the panels of the first of two paired warps.
    pub(super) fn half_of_panels(&self) -> u32 {
        let summed = if self.pass.sums()[0] { 0 } else { 1 };
        self.panels(summed) / 2 * self.right_tiles()[summed].panel_bytes()
    }

    /// Panels of the columns of a block: as many for both of paired warps.
    fn panels(&self, i: usize) -> u32 {
        self.right_tiles()[i].panels().next_multiple_of(self.sharers())
    }

    /// Whether ptxas has to be kept from loading ahead, of wide rows, and of such as no other work is between.
    pub(super) fn wide(&self) -> bool {
        self.dims().into_iter().max() > Some(192) || matches!(self.pass, Pass::Bias { .. })
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
                !self.paired || self.can_be_paired(),
                format!("pairs of {} warps by {} columns", self.warps, self.cols),
            ),
            (
                !self.pass.shares_queries() || self.can_share_queries(),
                format!("shares of dQ of {} elements by {} warps", dims[0], self.warps),
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

    /// Whether both of two warps have panels to sum, as many of what is as wide as a key and as a value, and
    /// fragments of a block's columns.
    fn can_be_paired(&self) -> bool {
        let sums = self.pass.sums();
        let summed = (0..2).filter(|&i| sums[i]);
        let halves: Vec<_> = summed.clone().map(|i| self.panels(i) / 2).collect();
        // 16-bit results are stored by whole panels.
        let whole = |i: usize| match self.element {
            Element::Half(_) => self.dims()[i] == self.panels(i) * self.right_tiles()[i].width(),
            Element::F32 => self.right_tiles()[i].panels() > 1,
        };
        let fits = summed.clone().all(whole) && halves.iter().all(|&half| half == halves[0]);
        fits && !halves.is_empty() && self.warps > 1 && self.cols > 16
    }

    /// Whether shares of dQ divide into whole steps of a product.
    fn can_share_queries(&self) -> bool {
        let columns = self.share_columns();
        let steps = matches!(columns, 16 | 32) && columns * self.share_warps() == self.dims()[0];
        let queries = self.warp_cols().is_multiple_of(M16) && self.cols <= sums::BLOCK;
        matches!(self.element, Element::Half(_)) && steps && queries && self.dims()[0] <= 128
    }

    /// Warps among which the columns of a share of dQ are divided. Two that are paired divide its rows.
    pub(super) fn share_warps(&self) -> u32 {
        self.warps / self.sharers()
    }

    /// Columns of a warp's share of dQ.
    pub(super) fn share_columns(&self) -> u32 {
        self.dims()[0] / self.share_warps()
    }

    /// dS of a block.
    pub(super) fn score_grad_tile(&self) -> SwizzledTile {
        SwizzledTile::new(self.rows(), self.cols, self.element.size())
    }

    fn most_registers(&self) -> u32 {
        (REGISTERS / (self.threads() * self.blocks_per_sm.max(1)) / 8 * 8).min(255)
    }

    fn needed_registers(&self) -> u32 {
        let scores = self.warp_cols() / 2;
        let grads = if self.pass.has_score_grads() { scores } else { 0 };
        let products = match self.element {
            // Pairs of them take the place of both.
            Element::Half(_) => scores + grads,
            // With two parts of the sums, and what another warp gives.
            Element::F32 => 3 * scores + grads + if self.paired { 2 * scores } else { 0 },
        };
        let sums = match self.pass {
            Pass::Bias { .. } => scores,
            Pass::Keys(_) | Pass::Queries => self.sum_columns().iter().sum::<u32>() / 2,
        };
        let score_mod = &self.variant.score_mod;
        let slopes = if score_mod.softcap && self.pass.sums()[1] { grads } else { 0 };
        let of_scores = slopes + score_mod.registers(scores);
        let modified = if score_mod.plain() { 0 } else { SCORE_REGISTERS };
        let [mut spare, of_scores] = match self.element {
            Element::Half(_) => [SPARE_REGISTERS + modified, of_scores],
            // Operands in parts take more, later.
            Element::F32 => [TF32X3_REGISTERS + modified / 2, score_mod.registers(scores) / 4],
        };
        let m16 = sums + products + of_scores;
        if matches!((self.pass, self.element), (Pass::Bias { .. }, Element::F32)) {
            // They are loaded ahead, as far as rows are wide.
            spare += self.dims().into_iter().max().unwrap_or(0) / 3;
        }
        spare + self.m16_tiles * (M16_REGISTERS + m16)
    }

    pub(super) fn smem(&self) -> SharedMap {
        let mut arena = Arena::default();
        let mut tile = |tile: SwizzledTile, panels: u32| {
            arena.region(panels * tile.panel_bytes(), SwizzledTile::ALIGN)
        };
        let ([narrow, wide], [narrow_block, wide_block]) = (self.left_tiles(), self.right_tiles());
        // Without the gradient of the scores the rows as wide as a value have no part.
        let wide_panels = if self.pass.has_score_grads() { wide.panels() } else { 0 };
        let left = [tile(narrow, narrow.panels()), tile(wide, wide_panels)];
        let right = [tile(narrow_block, self.panels(0)), tile(wide_block, self.panels(1))];
        let numbers = arena.region(self.numbers() * self.queries() * 4, 16);
        let stage_bytes = (arena.used - right[0]).next_multiple_of(SwizzledTile::ALIGN);
        for _ in 1..self.stages {
            arena.region(stage_bytes, SwizzledTile::ALIGN);
        }
        let kept = arena.region(KEPT_WORDS * 4, 16);
        let given_bytes = self.given_bytes() * self.warps;
        let [keys, values] = self.pass.sums();
        // All warps see dS where shares of dQ are made of it.
        let shares = self.pass.shares_queries();
        let mut given = |is: bool| arena.region(if is { given_bytes } else { 0 }, 16);
        let given = [given(keys && !shares), given(values)];
        let tile = self.score_grad_tile();
        let score_grads =
            if shares { arena.region(tile.bytes(), SwizzledTile::ALIGN) } else { arena.used };
        SharedMap { left, right, numbers, kept, given, score_grads, stage_bytes, bytes: arena.used }
    }

    /// Bytes of the fragments that a warp gives the other of its pair.
    pub(super) fn given_bytes(&self) -> u32 {
        let packed = match self.element {
            Element::Half(_) => 2,
            Element::F32 => 1,
        };
        let registers = self.m16_tiles * self.warp_cols() / 2 / packed;
        if self.paired { registers * 4 * WARP } else { 0 }
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
            ordered: false,
            // Of keys a head has all its queries' heads, of queries its keys are shared by them.
            bytes_of_column: match self.pass.side() {
                Side::Keys => bytes * group,
                Side::Queries => (bytes / group).max(1),
            },
            section_bytes: SECTION_BYTES,
        }
    }
}
