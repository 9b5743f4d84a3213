//! The choices, what follows from them, and the numbers of a launch.

use crate::kernel::attention::combine::MAX_PARTS;
use crate::kernel::attention::{Lengths, Mask, Problem, Scores, Section};
use crate::kernel::hopper::{ATOM, LINE, MAX_SHARED, SLAB, SLAB_BYTES, WARPGROUP};
use crate::kernel::ring::Ring;
use crate::kernel::{Arena, Element, slab};
use crate::ptx::Half;

/// Registers of a multiprocessor.
const REGISTERS: u32 = 65_536;
/// The most of a thread that takes from others.
const MOST_REGISTERS: u32 = 240;
/// Registers of a thread that multiplies, beside sums, scores and exponentials: with fewer ptxas spills.
const SPARE_REGISTERS: u32 = 32;
/// Sequences, and the widths of masks, are shorter: the sum of three is a number of 32 bits.
pub const MAX_LENGTH: u64 = 1 << 29;

/// How tiles reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// By the copy engine: strides of the result are multiples of 16 bytes.
    Tma,
    /// By the threads, in pairs of elements.
    Direct,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The operands' type.
    pub half: Half,
    /// The result's type.
    pub out: Element,
    /// Elements of a query and of a key, rounded up to a multiple of 16, at most 256.
    pub head_dim: u32,
    /// Elements of a value, a multiple of 8, at most 256.
    pub value_dim: u32,
    /// Rows of a tile: 64 for each multiplying warpgroup, of which there are one to three.
    pub rows: u32,
    /// Keys of a block: a multiple of 16, at most 256.
    pub keys: u32,
    /// Stages of the rings of keys and of values, each.
    pub stages: u32,
    /// Slabs of the result that a warpgroup can have on their way by [`Store::Tma`]. 0: they lie over
    /// its queries, and the next ones wait for them.
    pub slabs: u32,
    /// Warpgroups multiply in turn, so that one's softmax runs while another's products do.
    pub turns: bool,
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
    /// How tiles reach memory.
    pub store: Store,
}

/// Where things lie in shared memory.
pub(super) struct Plan {
    /// Of each warpgroup one after the other.
    pub queries: u32,
    pub keys: u32,
    pub values: u32,
    /// Of each warpgroup one after the other.
    pub result: u32,
    pub query_ring: Ring,
    pub key_ring: Ring,
    pub value_ring: Ring,
    pub bytes: u32,
}

impl Config {
    /// Warpgroups that multiply.
    pub fn consumers(&self) -> u32 {
        self.rows / SLAB
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        WARPGROUP * (1 + self.consumers())
    }

    /// Registers of a thread that loads and of one that multiplies, unless all have the same.
    pub(super) fn registers(&self) -> Option<[u32; 2]> {
        let consumers = WARPGROUP * self.consumers();
        let each = REGISTERS / self.threads() / 8 * 8;
        (self.consumers() > 1).then(|| {
            let take = ((REGISTERS - WARPGROUP * 24) / consumers / 8 * 8).min(MOST_REGISTERS);
            [(each * self.threads() - take * consumers) / WARPGROUP / 8 * 8, take]
        })
    }

    /// Queries of each head in 64 rows.
    pub fn positions(&self) -> u32 {
        SLAB / self.pack
    }

    /// Queries of each head in a tile.
    pub(super) fn tile_positions(&self) -> u32 {
        self.consumers() * self.positions()
    }

    /// Rows of the 64 that are queries.
    pub(super) fn used_rows(&self) -> u32 {
        self.positions() * self.pack
    }

    /// Slabs of a query or key.
    pub(super) fn head_slabs(&self) -> u32 {
        self.head_dim.div_ceil(SLAB)
    }

    /// Slabs of a value.
    pub(super) fn value_slabs(&self) -> u32 {
        self.value_dim.div_ceil(SLAB)
    }

    /// Columns of a slab of the result, and of its boxes.
    pub fn slab_cols(&self) -> u32 {
        slab::columns(self.out)
    }

    /// Slabs of the result of a warpgroup.
    pub fn result_slabs(&self) -> u32 {
        self.value_dim.div_ceil(self.slab_cols())
    }

    /// Whether results lie over queries.
    pub(super) fn over_queries(&self) -> bool {
        self.store == Store::Tma && self.slabs == 0
    }

    pub(super) fn query_bytes(&self) -> u32 {
        self.head_slabs() * SLAB_BYTES
    }

    pub(super) fn key_bytes(&self) -> u32 {
        self.head_slabs() * self.keys * LINE
    }

    pub(super) fn value_bytes(&self) -> u32 {
        self.value_slabs() * self.keys * LINE
    }

    /// Whether it can be built with registers to spare, which ptxas uses to overlap more.
    pub fn roomy(&self) -> bool {
        let spare = if self.consumers() == 3 { 0 } else { 12 };
        self.check().is_ok() && self.needed_registers() + spare <= self.most_registers()
    }

    fn most_registers(&self) -> u32 {
        self.registers().map_or(255, |[_, take]| take)
    }

    fn needed_registers(&self) -> u32 {
        let scores = self.keys / 2;
        let bias = self.scores.registers(scores);
        self.value_dim / 2 + scores + scores / 2 + bias + SPARE_REGISTERS
    }

    /// Whether the kernel can be built, or the number that is in the way.
    pub fn check(&self) -> Result<(), String> {
        let shared = self.plan().bytes;
        let (registers, limit) = (self.needed_registers(), self.most_registers());
        let multiple = |n: u32, of: u32| n.is_multiple_of(of) && (of..=256).contains(&n);
        let rules = [
            (
                multiple(self.head_dim, 16),
                format!("queries of {} elements (a multiple of 16 up to 256)", self.head_dim),
            ),
            (
                multiple(self.value_dim, 8),
                format!("values of {} elements (a multiple of 8 up to 256)", self.value_dim),
            ),
            (matches!(self.rows, 64 | 128 | 192), format!("{} rows (64, 128 or 192)", self.rows)),
            (
                multiple(self.keys, 16),
                format!("blocks of {} keys (a multiple of 16 up to 256)", self.keys),
            ),
            (self.stages >= 2, format!("{} stages (at least 2)", self.stages)),
            (!self.turns || self.consumers() > 1, "turns of a single warpgroup".into()),
            (
                (1..=SLAB).contains(&self.pack),
                format!("{} heads in a tile (at most {SLAB})", self.pack),
            ),
            (
                !self.split
                    || (self.lengths != Lengths::Packed
                        && self.store == Store::Direct
                        && self.out == Element::F32
                        && self.lse),
                "parts of packed sequences, or not in f32, by the threads, with their sums".into(),
            ),
            (registers <= limit, format!("{registers} registers of a thread (at most {limit})")),
            (
                shared <= MAX_SHARED,
                format!("{shared} bytes of shared memory (at most {MAX_SHARED})"),
            ),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }

    pub(super) fn plan(&self) -> Plan {
        let mut arena = Arena::default();
        let queries = arena.region(self.consumers() * self.query_bytes(), ATOM);
        let keys = arena.region(self.stages * self.key_bytes(), ATOM);
        let values = arena.region(self.stages * self.value_bytes(), ATOM);
        let result = match self.over_queries() {
            true => queries,
            false => arena.region(self.consumers() * self.slabs * SLAB_BYTES, ATOM),
        };
        let query_ring = Ring::new(&mut arena, self.consumers());
        let key_ring = Ring::new(&mut arena, self.stages);
        let value_ring = Ring::new(&mut arena, self.stages);
        let bytes = arena.used;
        Plan { queries, keys, values, result, query_ring, key_ring, value_ring, bytes }
    }
}

/// The numbers of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The order of tiles.
    pub order: Section,
    /// Parts of the keys of a tile: 1 unless the configuration splits them.
    pub parts: u32,
    /// Query `i` sees keys from `i + o - left` on, where that is a parameter.
    pub left: i32,
    /// Query `i` sees keys up to `i + o + right`, where that is a parameter.
    pub right: i32,
    /// Blocks of the grid.
    pub blocks: u32,
}

/// Bytes of keys and values that stay in L2 together, of the 50 or 60 MB that Hopper has.
const SECTION_BYTES: u64 = 32 << 20;

impl Launch {
    /// Of a configuration on a problem.
    pub fn new(config: &Config, problem: &Problem, multiprocessors: u32) -> Self {
        let count = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        let packs = problem.heads / u64::from(config.pack);
        let positions = u64::from(config.tile_positions());
        let (heads, each) = match config.lengths {
            Lengths::Full | Lengths::Padded => {
                (packs * problem.batch, problem.queries.div_ceil(positions))
            }
            // The last tile of each sequence may be cut off.
            Lengths::Packed => (packs, problem.queries.div_ceil(positions) + problem.batch),
        };
        let parts = match config.split {
            false => 1,
            true => {
                let blocks = problem.seen_keys(positions).div_ceil(config.keys.into());
                let most = blocks.min(MAX_PARTS.into());
                let parts = u64::from(multiprocessors) / heads.saturating_mul(each).max(1);
                // No more than have blocks.
                blocks.div_ceil(blocks.div_ceil(parts.clamp(1, most)))
            }
        };
        let tiles = heads.saturating_mul(each * parts);
        // Under a causal mask the tiles of a head differ, so that those of several are sorted.
        let section = match config.mask {
            Mask::Right => {
                let dims = problem.head_dim + problem.value_dim;
                let group = (problem.heads / problem.kv_heads / u64::from(config.pack)).max(1);
                (SECTION_BYTES / (problem.keys * dims * 2).max(1)).max(1) * group
            }
            Mask::None | Mask::Window => 1,
        };
        let width = |keys: Option<u64>| keys.unwrap_or(MAX_LENGTH).min(MAX_LENGTH) as i32;
        Self {
            order: Section {
                heads: count(heads),
                columns: count(each * parts),
                tiles: count(tiles),
                section: count(section.min(heads)),
            },
            parts: count(parts),
            left: width(problem.left),
            right: width(problem.right),
            blocks: count(tiles).min(multiprocessors),
        }
    }
}
