//! The choices, and what follows from them.

use crate::kernel::gemm::{BLOCK, Epilogue, Major, Scale, lies_along_k, multiplied};
use crate::kernel::hopper::barriers::NamedBarriers;
use crate::kernel::hopper::{SLAB, WARPGROUP};
use crate::kernel::multiprocessor::{WARP, shared_of_each};
use crate::kernel::name::{given, several};
use crate::kernel::w4::{MOST_WEIGHTS, Scheme};
use crate::ptx::Factor;

/// Which matrix the tiles are tiles of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Orient {
    /// `C`.
    Plain,
    /// `Cᵀ`: the kernel's left operand is `Bᵀ`, its right one `Aᵀ`.
    Swapped,
}

impl Orient {
    /// The kernel's left and right, or rows and columns, given the product's; and the other way round.
    pub fn order<T>(self, [a, b]: [T; 2]) -> [T; 2] {
        match self {
            Self::Plain => [a, b],
            Self::Swapped => [b, a],
        }
    }
}

/// How tiles reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// TMA stores them while the next tile is computed. Rows of `C` are a multiple of 16 bytes.
    Tma,
    /// The threads store them through shared memory, in units of `unit` elements of a row of `C`, whose
    /// length is a multiple of that. With [`Order::Grid`] the tile lies over the stages.
    Staged {
        /// 4 or 1.
        unit: u32,
    },
}

/// How blocks get their tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Order {
    /// The grid has a block for each tile: no divisions, up to 65535 columns of tiles and matrices.
    Grid,
    /// Blocks are persistent, take tile after tile in the order of the raster, and fetch the next
    /// one's operands while they store.
    Raster,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The types of the kernel's left and right operand.
    pub elements: [Factor; 2],
    /// If the kernel's left operand is a weight of four or eight bits, how it is quantised. The weight is packed, and
    /// [`elements`](Self::elements) are what its codes become.
    pub weight: Option<Scheme>,
    /// How many such weights the right operand is multiplied with: their tiles follow each other.
    pub weights: u32,
    /// How the kernel's left operand lies.
    pub lhs: Major,
    /// How the kernel's right operand lies.
    pub rhs: Major,
    /// What the tiles are tiles of.
    pub orient: Orient,
    /// Rows of a tile: 64 for each multiplying warpgroup, of which there are up to four, unless they play ping-pong
    /// or have 128 each of 256.
    pub rows: u32,
    /// Columns of a tile: a multiple of 8, of int8 beyond 32 one of 16, at most 256.
    pub cols: u32,
    /// Lines of a box of the left operand along K, a divisor of the rows: boxes outside the matrix
    /// are left out.
    pub lhs_lines: u32,
    /// Lines of a box of the right operand along K, a divisor of the columns.
    pub rhs_lines: u32,
    /// Stages of the ring.
    pub stages: u32,
    /// Blocks that share the depth of a tile, as a cluster. Above 1 the store is staged.
    pub split: u32,
    /// Teams of warpgroups of a block, each of as many as a tile has 64 rows, that take stages of codes in turn. Above 1
    /// the store is staged.
    pub teams: u32,
    /// Each multiplying warpgroup has tiles of its own, in turn: one stores while the other multiplies.
    pub pingpong: bool,
    /// Slabs of the result that a warpgroup can have on their way by [`Store::Tma`]: 2 or 4.
    pub store_stages: u32,
    /// How a block finds its tiles.
    pub order: Order,
    /// Blocks of a multiprocessor.
    pub blocks_per_sm: u32,
    /// Whether there are batch coordinates.
    pub batched: bool,
    /// How tiles reach memory.
    pub store: Store,
    /// What is done to a sum before it is stored.
    pub epilogue: Epilogue,
}

/// Rows of the tallest tile: of it a warpgroup has 128, of codes of weights 64.
pub(in crate::kernel) const TALL: u32 = 256;

impl Config {
    /// `sm90 128x256 k64x4 pingpong tma4 raster, nt bf16→f32 +bf16 relu batched boxes64/32`: rows and
    /// columns of a tile, depth and number of stages, split or turns, blocks of a multiprocessor,
    /// store, order; layouts of `A` and `B` as BLAS names them, types, bias, activation, lines of the
    /// boxes of both operands.
    pub fn name(&self) -> String {
        let Self { rows, cols, stages, lhs_lines, rhs_lines, epilogue, .. } = self;
        let swapped = given(self.orient == Orient::Swapped, " swapped");
        let split = several(self.split, |split| format!(" split{split}"));
        let teams = several(self.teams, |teams| format!(" {teams}teams"));
        let pingpong = given(self.pingpong, " pingpong");
        let blocks = several(self.blocks_per_sm, |blocks| format!(" {blocks}/sm"));
        let store = match self.store {
            Store::Tma => format!("tma{}", self.store_stages),
            Store::Staged { unit } => format!("staged{unit}"),
        };
        let order = match self.order {
            Order::Grid => "grid",
            Order::Raster => "raster",
        };
        let layouts = Major::names(self.orient.order([self.lhs, self.rhs]));
        let (element, batched) = (self.elements[0].name(), given(self.batched, " batched"));
        let weight = self.weight.map_or(String::new(), |scheme| format!(" {}", scheme.name()));
        let weights = several(self.weights, |weights| format!(" {weights}weights"));
        let scales = self.weight.map_or(String::new(), |w| format!("{} ", w.scale.name()));
        format!(
            "sm90 {rows}x{cols} k{}x{stages}{swapped}{weight}{weights}{split}{teams}{pingpong}{blocks} {store} \
             {order}, {layouts} {scales}{element}{}{batched} boxes{lhs_lines}/{rhs_lines}",
            self.depth(),
            epilogue.name()
        )
    }

    /// Warpgroups that multiply.
    pub fn consumers(&self) -> u32 {
        if self.pingpong { 2 } else { self.team() * self.teams }
    }

    /// Those of a team.
    pub(super) fn team(&self) -> u32 {
        self.rows / SLAB / self.m64_tiles()
    }

    /// Depth of a stage: the elements of a swizzled line.
    pub fn depth(&self) -> u32 {
        self.elements[0].per_line()
    }

    /// As what the operands are multiplied.
    pub(super) fn factor(&self) -> Factor {
        multiplied(self.elements).expect("it was checked")
    }

    /// Threads that fill stages, in turn. A stage of codes is up to five copies and their addresses: some 450 clocks of one
    /// thread, where its products may be 256. Two blocks of a multiprocessor have two such threads anyway; and of a ring with fewer
    /// stages one could be a round ahead (`Cursor::skip`).
    pub(super) fn producers(&self) -> u32 {
        const ALL: u32 = WARPGROUP / WARP;
        match self.weight {
            Some(_) if self.blocks_per_sm == 1 && self.stages >= ALL => ALL,
            _ => 1,
        }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        WARPGROUP * (1 + self.consumers())
    }

    /// Registers of a thread of the producer's and of one that multiplies, where several warpgroups need more than an
    /// equal share of a multiprocessor's: what the producer gives back is divided among them.
    pub(super) fn moved_registers(&self) -> Option<[u32; 2]> {
        /// How many registers a multiprocessor has, and in how many at a time a thread has them.
        const ALL: u32 = 65_536;
        const UNIT: u32 = 8;
        let consumers = self.consumers();
        if consumers == 1 || self.blocks_per_sm > 1 {
            return None;
        }
        let producer = match (consumers, self.weights) {
            (2, _) => 40,
            (_, 1) => 32,
            // Addresses of several weights.
            _ => 56,
        };
        let share = ALL / self.threads() / UNIT * UNIT;
        Some([producer, (share * (1 + consumers) - producer) / consumers / UNIT * UNIT])
    }

    /// Whether sums are those of a stage, added up in f32: tensor cores keep some 13 bits of a sum of e4m3.
    pub(super) fn promotes(&self) -> bool {
        self.elements[0] == Factor::E4m3
    }

    /// Whether promoted sums of two stages fit a thread's registers.
    pub(super) fn two_parts(&self) -> bool {
        if self.m64_tiles() > 1 {
            return false;
        }
        let crowded = self.epilogue.scale == Scale::Blocks && self.epilogue.bias.is_some();
        let most = match self.orient {
            Orient::Plain if crowded => 64,
            Orient::Plain => 128,
            // Each column has a scale.
            Orient::Swapped => 16,
        };
        self.cols <= most
    }

    /// Whether a thread has registers for scales of blocks that it will need later: those of the columns of a swapped
    /// tile are many.
    pub(super) fn scales_ahead(&self) -> bool {
        self.orient == Orient::Plain || self.cols <= 16 || self.blocks_per_sm == 1
    }

    /// Arrivals that say that a stage is empty.
    pub(super) fn readers(&self) -> u32 {
        match (self.pingpong, self.weight) {
            (true, _) => 1,
            (false, None) => self.consumers(),
            // Of each warp: it reads codes.
            (false, Some(_)) => self.team() * WARPGROUP / WARP,
        }
    }

    /// Blocks of 64 rows of a tile that one warpgroup multiplies.
    pub(super) fn m64_tiles(&self) -> u32 {
        match (self.pingpong, self.rows, self.weight) {
            (true, rows, _) => rows / SLAB,
            (false, TALL, None) => 2,
            _ => 1,
        }
    }

    /// Rows and columns of what one warpgroup multiplies of a tile.
    pub(super) fn warpgroup_tile(&self) -> [u32; 2] {
        [self.m64_tiles() * SLAB, self.cols]
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let smem = self.smem();
        let (shared, limit) = (smem.bytes, shared_of_each(limit, self.blocks_per_sm));
        let rules = [
            (multiplied(self.elements).is_some(), "operands that are not of one type".into()),
            lies_along_k(self.elements, [self.lhs, self.rhs]),
            (
                self.weight.is_none()
                    || (self.orient == Orient::Swapped
                        && !self.pingpong
                        && !self.batched
                        && matches!(self.elements[0], Factor::Half(_))),
                "a weight of codes that is no left operand of a single swapped product".into(),
            ),
            // A bias is of one weight.
            (
                self.weights == 1
                    || (self.weight.is_some()
                        && (2..=MOST_WEIGHTS as u32).contains(&self.weights)
                        && self.epilogue.bias.is_none()),
                format!("{} weights", self.weights),
            ),
            self.epilogue.rule(multiplied(self.elements)),
            (
                match self.rows {
                    64 | 128 => true,
                    TALL if self.weight.is_some() => true,
                    TALL => {
                        let scaled = self.promotes() && self.epilogue.scale == Scale::Blocks;
                        let few = self.orient == Orient::Plain && self.cols <= 128;
                        scaled && few && self.store == Store::Tma
                    }
                    _ => false,
                },
                format!("{} rows (64, 128, of codes or with scales of blocks 256)", self.rows),
            ),
            (
                self.cols.is_multiple_of(8) && (8..=256).contains(&self.cols),
                format!("{} columns (a multiple of 8 up to 256)", self.cols),
            ),
            (
                self.elements[0] != Factor::S8 || self.cols <= 32 || self.cols.is_multiple_of(16),
                format!("{} columns of int8 (a multiple of 16 beyond 32)", self.cols),
            ),
            (
                self.lhs == Major::Outer || self.rows.is_multiple_of(self.lhs_lines),
                format!("boxes of {} lines for {} rows", self.lhs_lines, self.rows),
            ),
            (
                self.rhs == Major::Outer || self.cols.is_multiple_of(self.rhs_lines),
                format!("boxes of {} lines for {} columns", self.rhs_lines, self.cols),
            ),
            // Of codes a team loads its next stage before the one before last is free.
            (
                self.stages >= if self.weight.is_some() { 3 * self.teams } else { 2 },
                format!("{} stages (at least 2, of codes 3 for each team)", self.stages),
            ),
            (
                matches!(self.split, 1 | 2 | 4 | 8),
                format!("a split of {} (1, 2, 4 or 8)", self.split),
            ),
            (
                self.store != Store::Tma || (self.split == 1 && self.cols >= self.slab_cols()),
                "a TMA store of a split or narrow tile".into(),
            ),
            (
                self.store != Store::Tma
                    || !self.epilogue.adds
                    || self.cols.is_multiple_of(self.slab_cols()),
                format!("{} columns that slabs add twice", self.cols),
            ),
            (
                self.teams == 1
                    || (self.teams == 2
                        && self.weight.is_some()
                        && self.store != Store::Tma
                        && self.order == Order::Grid),
                format!("{} teams (1, or of codes and single staged tiles 2)", self.teams),
            ),
            // What one team has read would say nothing of a stage's round before: see `Cursor::skip`.
            (
                self.stages.is_multiple_of(self.teams),
                format!("{} stages for {} teams", self.stages, self.teams),
            ),
            (
                self.split == 1 || self.order == Order::Grid,
                "split tiles without a block for each".into(),
            ),
            (
                !self.pingpong
                    || (self.rows == 128
                        && self.store == Store::Tma
                        && self.order == Order::Raster
                        && self.blocks_per_sm == 1),
                "warpgroups that take turns on small, staged or single tiles".into(),
            ),
            (
                self.epilogue.scale != Scale::Blocks
                    || BLOCK.is_multiple_of(self.orient.order([self.rows, self.cols])[1])
                    || (self.orient == Orient::Plain && self.cols.is_multiple_of(SLAB)),
                "tiles of parts of blocks".into(),
            ),
            (
                !self.promotes() || (!self.pingpong && self.cols <= 192),
                "sums in two places of tiles in turn, or wider than 192".into(),
            ),
            NamedBarriers::rule(smem.named_barriers),
            (shared <= limit, format!("{shared} bytes of shared memory (at most {limit})")),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }
}
