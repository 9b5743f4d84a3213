//! The choices, and what follows from them.

use std::ops::RangeInclusive;

use crate::kernel::attention::{Lengths, TileShape, Variant};
use crate::kernel::hopper::barriers::{Named, NamedBarriers};
use crate::kernel::hopper::ring::Ring;
use crate::kernel::hopper::{ATOM, LINE, SLAB, SLAB_BYTES, WARPGROUP, store};
use crate::kernel::multiprocessor::REGISTERS;
use crate::kernel::name::given;
use crate::kernel::{Arena, Element};
use crate::ptx::Half;

/// The most registers of a thread of a warpgroup that takes some from others.
const MOST_REGISTERS: u32 = 240;
/// Registers of a thread that multiplies, beside sums, scores and exponentials: with fewer ptxas spills.
const SPARE_REGISTERS: u32 = 32;
/// Bytes of keys and values that stay in L2 together, of the 50 or 60 MB that Hopper has.
const SECTION_BYTES: u64 = 32 << 20;

/// How tiles reach memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Store {
    /// TMA stores them: strides of the result are multiples of 16 bytes.
    Tma,
    /// The threads store them, in pairs of elements.
    Direct,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// What it computes.
    pub variant: Variant,
    /// The operands' type: f16 or bf16.
    pub element: Element,
    /// Rows of a tile: 64 for each multiplying warpgroup, of which there are one to three.
    pub rows: u32,
    /// Keys of a block: a multiple of 16, at most 256.
    pub keys: u32,
    /// Tiles whose queries are there or on their way: 1 or 2.
    pub query_stages: u32,
    /// Stages of the rings of keys and of values, each.
    pub stages: u32,
    /// Slabs of the result that a warpgroup can have on their way by [`Store::Tma`]. 0: they lie over
    /// its queries, and the next ones wait for them.
    pub store_stages: u32,
    /// Warpgroups multiply in turn, so that one's softmax runs while another's products do.
    pub pingpong: bool,
    /// How tiles reach memory.
    pub store: Store,
}

/// When a tile's queries make room for others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum QueryRelease {
    /// As soon as the last keys are multiplied: the next queries come during the softmax.
    Multiplied,
    /// After the last softmax: the next ones are elsewhere, or come during the last product.
    AtTheEnd,
    /// After the result that lies over them.
    Stored,
}

/// The offsets of everything in shared memory.
pub(super) struct SharedMap {
    /// The queries of each warpgroup one after the other, then those of the next tile.
    pub queries: u32,
    pub keys: u32,
    pub values: u32,
    /// The results of each warpgroup one after the other.
    pub result: u32,
    pub query_ring: Ring,
    pub key_ring: Ring,
    pub value_ring: Ring,
    /// Where the threads of each multiplying warpgroup meet.
    pub meeting: Named,
    /// Where warpgroups that multiply in turn let each other begin.
    pub round_robin: Option<Named>,
    pub named_barriers: u32,
    pub bytes: u32,
}

impl Config {
    /// `flash90 128x176 d128/64 x2 slabs1 turns, bf16→f32 causal +bf16 softcap alibi packed lse direct`:
    /// rows of a tile and keys of a block, elements of a query and of a value, stages, slabs of the
    /// result, heads of a tile; types, mask, bias, lengths, score modification, and how results are stored.
    pub fn name(&self) -> String {
        let Self { variant, rows, keys, stages, store_stages, .. } = self;
        let turns = given(self.pingpong, " turns");
        let direct = self.store == Store::Direct;
        let described = variant.describe(self.element, direct);
        format!(
            "flash90 {rows}x{keys} {} x{stages} slabs{store_stages}{turns}{described}",
            variant.widths()
        )
    }

    /// Warpgroups that multiply.
    pub fn consumers(&self) -> u32 {
        self.rows / SLAB
    }

    /// As what the operands are multiplied.
    pub(super) fn half(&self) -> Half {
        let Element::Half(half) = self.element else { panic!("it was checked") };
        half
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
        SLAB / self.variant.pack
    }

    /// Queries of each head in a tile.
    pub(super) fn tile_positions(&self) -> u32 {
        self.consumers() * self.positions()
    }

    /// Rows of the 64 that are queries.
    pub(super) fn used_rows(&self) -> u32 {
        self.positions() * self.variant.pack
    }

    /// Slabs of a query or key.
    pub(super) fn head_slabs(&self) -> u32 {
        self.variant.head_dim.div_ceil(SLAB)
    }

    /// Slabs of a value.
    pub(super) fn value_slabs(&self) -> u32 {
        self.variant.value_dim.div_ceil(SLAB)
    }

    /// Columns of a slab of the result, and of its boxes.
    pub fn slab_cols(&self) -> u32 {
        store::columns(self.variant.out)
    }

    /// Slabs of the result of a warpgroup.
    pub fn result_slabs(&self) -> u32 {
        self.variant.value_dim.div_ceil(self.slab_cols())
    }

    /// Whether results lie over queries.
    fn over_queries(&self) -> bool {
        self.store == Store::Tma && self.store_stages == 0
    }

    /// Whether a tile ends while the next one begins. A bias on its way, or a sequence that is looked for,
    /// would take more registers than there are; of a split, a block has one tile.
    pub(super) fn overlaps_tail(&self) -> bool {
        let Variant { score_mod, lengths, split, .. } = self.variant;
        let spare = score_mod.bias.is_none() && lengths != Lengths::Packed;
        spare && !split && !self.over_queries()
    }

    pub(super) fn query_release(&self) -> QueryRelease {
        if self.over_queries() {
            QueryRelease::Stored
        } else if self.overlaps_tail() && self.query_stages == 1 {
            QueryRelease::Multiplied
        } else {
            QueryRelease::AtTheEnd
        }
    }

    /// How many warpgroups' queries there is room for.
    fn query_boxes(&self) -> u32 {
        self.query_stages * self.consumers()
    }

    /// Bytes of a warpgroup's queries.
    pub(super) fn query_bytes(&self) -> u32 {
        self.head_slabs() * SLAB_BYTES
    }

    pub(super) fn key_bytes(&self) -> u32 {
        self.head_slabs() * self.keys * LINE
    }

    pub(super) fn value_bytes(&self) -> u32 {
        self.value_slabs() * self.keys * LINE
    }

    /// This configuration with shared memory filled, of which a block can have `limit` bytes: first with as
    /// much of the result on its way as fits, then the next tile's queries, then as many stages.
    pub fn filled(self, limit: u32) -> Self {
        let most = |numbers: RangeInclusive<u32>, with: &dyn Fn(u32) -> Self| {
            let fits = |&number: &u32| with(number).check(limit).is_ok();
            with(numbers.clone().rev().find(fits).unwrap_or(*numbers.start()))
        };
        let mut config = Self { store_stages: 0, query_stages: 1, stages: 2, ..self };
        if config.store == Store::Tma {
            config =
                most(0..=config.result_slabs(), &|store_stages| Self { store_stages, ..config });
        }
        config = most(1..=2, &|query_stages| Self { query_stages, ..config });
        most(2..=4, &|stages| Self { stages, ..config })
    }

    /// Whether it can be built with registers to spare, which ptxas uses to overlap more.
    pub fn roomy(&self, limit: u32) -> bool {
        let spare = if self.consumers() == 3 { 0 } else { 12 };
        self.check(limit).is_ok() && self.needed_registers() + spare <= self.most_registers()
    }

    fn most_registers(&self) -> u32 {
        self.registers().map_or(255, |[_, take]| take)
    }

    fn needed_registers(&self) -> u32 {
        let scores = self.keys / 2;
        let bias = self.variant.score_mod.registers(scores);
        self.variant.value_dim / 2 + scores + scores / 2 + bias + SPARE_REGISTERS
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let smem = self.smem();
        let shared = smem.bytes;
        let (registers, most) = (self.needed_registers(), self.most_registers());
        let multiple = |n: u32, of: u32| n.is_multiple_of(of) && (of..=256).contains(&n);
        let rules = [
            (
                // wgmma of tf32 reads no transposed values.
                matches!(self.element, Element::Half(_)),
                "operands of f32".into(),
            ),
            (
                multiple(self.variant.head_dim, 16),
                format!(
                    "queries of {} elements (a multiple of 16 up to 256)",
                    self.variant.head_dim
                ),
            ),
            (
                multiple(self.variant.value_dim, 8),
                format!(
                    "values of {} elements (a multiple of 8 up to 256)",
                    self.variant.value_dim
                ),
            ),
            (matches!(self.rows, 64 | 128 | 192), format!("{} rows (64, 128 or 192)", self.rows)),
            (
                multiple(self.keys, 16),
                format!("blocks of {} keys (a multiple of 16 up to 256)", self.keys),
            ),
            (self.stages >= 2, format!("{} stages (at least 2)", self.stages)),
            (
                self.query_stages == 1 || (self.query_stages == 2 && self.overlaps_tail()),
                format!("{} stages of queries (1, or 2 of tiles that join)", self.query_stages),
            ),
            (!self.pingpong || self.consumers() > 1, "turns of a single warpgroup".into()),
            (
                (1..=SLAB).contains(&self.variant.pack),
                format!("{} heads in a tile (at most {SLAB})", self.variant.pack),
            ),
            (
                self.variant.can_be_split() && (!self.variant.split || self.store == Store::Direct),
                "parts of packed sequences, or not in f32, by the threads, with their sums".into(),
            ),
            (registers <= most, format!("{registers} registers of a thread (at most {most})")),
            NamedBarriers::rule(smem.named_barriers),
            (shared <= limit, format!("{shared} bytes of shared memory (at most {limit})")),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }

    pub(super) fn smem(&self) -> SharedMap {
        let mut arena = Arena::default();
        let queries = arena.region(self.query_boxes() * self.query_bytes(), ATOM);
        let keys = arena.region(self.stages * self.key_bytes(), ATOM);
        let values = arena.region(self.stages * self.value_bytes(), ATOM);
        let result = match self.over_queries() {
            true => queries,
            false => arena.region(self.consumers() * self.store_stages * SLAB_BYTES, ATOM),
        };
        let query_ring = Ring::new(&mut arena, self.query_boxes());
        let key_ring = Ring::new(&mut arena, self.stages);
        let value_ring = Ring::new(&mut arena, self.stages);
        let mut barriers = NamedBarriers::new();
        let meeting = barriers.each(self.consumers(), WARPGROUP);
        // The warpgroup that waits, and the one that lets it begin.
        let round_robin = self.pingpong.then(|| barriers.each(self.consumers(), 2 * WARPGROUP));
        SharedMap {
            queries,
            keys,
            values,
            result,
            query_ring,
            key_ring,
            value_ring,
            meeting,
            round_robin,
            named_barriers: barriers.used(),
            bytes: arena.used,
        }
    }
}

impl From<&Config> for TileShape {
    fn from(config: &Config) -> Self {
        Self {
            variant: config.variant,
            positions: config.tile_positions(),
            keys: config.keys,
            blocks_per_sm: 1,
            persistent: true,
            section_bytes: SECTION_BYTES,
        }
    }
}
