//! The choices, and what follows from them.

use super::super::super::{Side, TileShape};
use crate::kernel::attention::backward::sm90::schedule::TileSlots;
use crate::kernel::attention::variant::scores;
use crate::kernel::attention::{Lengths, Mask, ScoreMod};
use crate::kernel::hopper::barriers::{Named, NamedBarriers};
use crate::kernel::hopper::ring::Ring;
use crate::kernel::hopper::{ATOM, LINE, SLAB, SLAB_BYTES, WARPGROUP};
use crate::kernel::multiprocessor::WARP;
use crate::kernel::{Arena, Element};
use crate::ptx::Half;

/// Warpgroups that multiply.
pub(super) const GROUPS: u32 = 2;
/// Stages of dS, and of P that warpgroups exchange.
pub(super) const EXCHANGE_STAGES: u32 = 2;
/// Registers of a thread that loads, and of one that multiplies.
pub(super) const REGISTERS: [u32; 2] = [40, 232];
/// Floats that are kept of each query in shared memory: see [`SharedMap::rows`].
const ROW_FLOATS: u32 = 3;
/// Bytes of queries, their gradients and sums that stay in L2 together.
const SECTION_BYTES: u64 = 32 << 20;

/// More stages than that wait for nothing.
const MOST_STAGES: u32 = 3;

/// How warpgroups share the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Form {
    /// Each has 64 of 128 keys. They make dQ, too, whose shares are added up in memory.
    Fused,
    /// Both have the same 64 keys, one their dV and the other their dK: for heads whose sums fill the
    /// registers. P goes from one to the other.
    Wide,
}

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// How warpgroups share the work.
    pub form: Form,
    /// The operands' type, and the results': f16 or bf16.
    pub element: Element,
    /// Elements of a query and of a key: a multiple of 8, at most 128, or 256 of [`Form::Wide`].
    pub head_dim: u32,
    /// Elements of a value: the same.
    pub value_dim: u32,
    /// What hides keys.
    pub mask: Mask,
    /// The score modification.
    pub score_mod: ScoreMod,
    /// How long sequences are.
    pub lengths: Lengths,
    /// Whether several heads of queries share keys.
    pub grouped: bool,
    /// Queries of a block: 64, or 128 of narrow heads, or 32 of [`Form::Wide`].
    pub queries: u32,
    /// Stages of queries and their gradients.
    pub stages: u32,
    /// Shares of dQ are added up in the order of tiles, which wait for one another: the same bits in each run.
    pub ordered: bool,
}

/// The offsets of everything in shared memory.
pub(super) struct SharedMap {
    /// In the wide form dV lies here at the end of a tile.
    pub keys: u32,
    /// In the wide form dK lies here at the end of a tile.
    pub values: u32,
    pub queries: u32,
    pub grads: u32,
    /// dS, by warpgroup and stage: lines of a query's 64 keys. At the end of a tile dK lies here. In the wide
    /// form P, by stage, in the order of registers.
    pub exchange: u32,
    /// A block's share of dQ, by warpgroup, in the order of registers. At the end of a tile dV lies here.
    pub dq: u32,
    /// Of each stage: for each query minus its maximum and minus its logarithm, then for each its delta.
    pub rows: u32,
    pub key_ring: Ring,
    pub value_ring: Ring,
    pub query_ring: Ring,
    pub grad_ring: Ring,
    pub row_ring: Ring,
    pub tile_slots: TileSlots,
    /// Where the threads of each multiplying warpgroup meet.
    pub meeting: Named,
    /// Where all that multiply meet.
    pub everyone: Named,
    /// Where a warpgroup says that its dQ is in shared memory, and where it is told that it has left.
    pub dq_full: Named,
    pub dq_empty: Named,
    /// In the wide form: where one warpgroup says that a stage has P, and the other that it has read it.
    pub p_full: Named,
    pub p_empty: Named,
    pub named_barriers: u32,
    pub bytes: u32,
}

impl SharedMap {
    /// The rings, and who empties a stage: leaders of warpgroups, or of rows' floats and of tiles warps.
    pub fn rings(&self, config: &Config) -> [(Ring, u32); 6] {
        let once = if config.form == Form::Wide { 1 } else { GROUPS };
        let multiply = GROUPS * WARPGROUP / WARP;
        // One fetches rows, and maybe one adds up dQ.
        let others = if config.form == Form::Fused { 2 } else { 1 };
        [
            (self.key_ring, once),
            (self.value_ring, once),
            (self.query_ring, GROUPS),
            (self.grad_ring, GROUPS),
            (self.row_ring, multiply),
            (self.tile_slots.ring(), multiply + others),
        ]
    }
}

impl Config {
    /// `flash90 dkv 64x128 d128/64 x2 dq ordered, bf16 causal packed grouped`: queries of a block and keys of a
    /// tile, elements of a query and of a value, stages, the form; type, mask, score modification, lengths, heads.
    pub fn name(&self) -> String {
        let Self { element, head_dim, value_dim, queries, stages, .. } = self;
        let form = match self.form {
            Form::Fused if self.ordered => " dq ordered",
            Form::Fused => " dq",
            Form::Wide => " wide",
        };
        let words = scores(self.mask, &self.score_mod, self.lengths);
        let heads = if self.grouped { " grouped" } else { "" };
        let (element, keys) = (element.name(), self.keys());
        format!(
            "flash90 dkv {queries}x{keys} d{head_dim}/{value_dim} x{stages}{form}, {element}{words}{heads}"
        )
    }

    /// Keys of a tile.
    pub fn keys(&self) -> u32 {
        if self.form == Form::Wide { SLAB } else { GROUPS * SLAB }
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        WARPGROUP * (1 + GROUPS)
    }

    /// As what the operands are multiplied.
    pub(super) fn half(&self) -> Half {
        let Element::Half(half) = self.element else { panic!("it was checked") };
        half
    }

    /// Whether each warpgroup has 64 of a block's queries of dQ, and not half of their columns.
    pub(super) fn divides_queries(&self) -> bool {
        self.queries == 2 * SLAB
    }

    /// Slabs of a query or key. Where the columns of dQ are divided they are even.
    pub(super) fn head_slabs(&self) -> u32 {
        match self.form {
            Form::Fused if !self.divides_queries() => 2,
            _ => self.head_dim.div_ceil(SLAB),
        }
    }

    /// Elements along which queries and keys, and gradients and values, are multiplied: past the last they are 0.
    pub(super) fn depths(&self) -> [u32; 2] {
        [self.head_dim, self.value_dim].map(|dim| dim.next_multiple_of(16))
    }

    pub(super) fn value_slabs(&self) -> u32 {
        self.value_dim.div_ceil(SLAB)
    }

    /// Columns of dQ of a warpgroup.
    pub fn dq_columns(&self) -> u32 {
        if self.divides_queries() { self.depths()[0] } else { SLAB }
    }

    /// Bytes of dQ of a warpgroup. Where they divide columns, the second one's end with the head's, or are none.
    pub(super) fn dq_bytes(&self, group: u32) -> u32 {
        let columns = match self.divides_queries() {
            true => self.dq_columns(),
            false => self.depths()[0].saturating_sub(group * SLAB).min(SLAB),
        };
        SLAB * columns * 4
    }

    /// Bytes of a block of dQ.
    pub fn dq_block_bytes(&self) -> u32 {
        (0..GROUPS).map(|group| self.dq_bytes(group)).sum()
    }

    /// Bytes from one warpgroup's dQ in shared memory to the other's.
    pub(super) fn dq_pitch(&self) -> u32 {
        let values = self.value_slabs() * SLAB_BYTES;
        values.max(SLAB * self.dq_columns() * 4)
    }

    pub(super) fn query_bytes(&self) -> u32 {
        self.head_slabs() * self.queries * LINE
    }

    pub(super) fn grad_bytes(&self) -> u32 {
        self.value_slabs() * self.queries * LINE
    }

    /// Bytes of a stage of what is exchanged: of a warpgroup's dS, or of P.
    pub(super) fn exchange_bytes(&self) -> u32 {
        match self.form {
            Form::Wide => self.queries * SLAB * 4,
            Form::Fused => self.queries * LINE,
        }
    }

    pub(super) fn row_bytes(&self) -> u32 {
        self.queries * ROW_FLOATS * 4
    }

    /// This configuration with as many stages as fit where a block can have `limit` bytes of shared memory.
    pub fn filled(self, limit: u32) -> Self {
        let with = |stages| Self { stages, ..self };
        (1..=MOST_STAGES).rev().map(with).find(|c| c.check(limit).is_ok()).unwrap_or(with(1))
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let smem = self.smem();
        let shared = smem.bytes;
        let most = if self.form == Form::Wide { 256 } else { 128 };
        let multiple = |n: u32| n.is_multiple_of(8) && (8..=most).contains(&n);
        let widest = self.head_dim.max(self.value_dim);
        let narrow = widest <= SLAB && self.form != Form::Wide;
        let rules = [
            (matches!(self.element, Element::Half(_)), "operands of f32".into()),
            (
                multiple(self.head_dim) && multiple(self.value_dim),
                format!(
                    "{}/{} elements (multiples of 8 up to {most})",
                    self.head_dim, self.value_dim
                ),
            ),
            (
                match self.queries {
                    32 => self.form == Form::Wide,
                    queries => queries == 64 || (queries == 128 && narrow),
                },
                format!("blocks of {} queries (64, 128 of narrow heads, 32 of wide)", self.queries),
            ),
            (self.stages >= 1, format!("{} stages", self.stages)),
            (!self.ordered || self.form == Form::Fused, "an order of what is not added up".into()),
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
        // Gradients of the wide form lie over keys and values, of which the others may be wider.
        let wide = self.form == Form::Wide;
        let widest = self.head_slabs().max(self.value_slabs());
        let slabs = |own: u32| if wide { widest } else { own };
        let keys = arena.region(slabs(self.head_slabs()) * self.keys() * LINE, ATOM);
        let values = arena.region(slabs(self.value_slabs()) * self.keys() * LINE, ATOM);
        let queries = arena.region(self.stages * self.query_bytes(), ATOM);
        let grads = arena.region(self.stages * self.grad_bytes(), ATOM);
        let exchange = match self.form {
            Form::Wide => EXCHANGE_STAGES * self.exchange_bytes(),
            Form::Fused => GROUPS * EXCHANGE_STAGES * self.exchange_bytes(),
        };
        let exchange = arena.region(exchange, ATOM);
        let dq = if wide { 0 } else { GROUPS * self.dq_pitch() };
        let dq = arena.region(dq, ATOM);
        let rows = arena.region(self.stages * self.row_bytes(), 16);
        let [key_ring, value_ring] = [(); 2].map(|()| Ring::new(&mut arena, 1));
        let [query_ring, grad_ring] = [(); 2].map(|()| Ring::new(&mut arena, self.stages));
        let row_ring = Ring::filled_by(&mut arena, self.stages, WARP);
        let tile_slots = TileSlots::new(&mut arena);
        let mut barriers = NamedBarriers::new();
        let meeting = barriers.each(GROUPS, WARPGROUP);
        let everyone = barriers.each(1, GROUPS * WARPGROUP);
        let dq_full = barriers.each(GROUPS, WARPGROUP + WARP);
        let dq_empty = barriers.each(GROUPS, WARPGROUP + WARP);
        let p_full = barriers.each(EXCHANGE_STAGES, GROUPS * WARPGROUP);
        let p_empty = barriers.each(EXCHANGE_STAGES, GROUPS * WARPGROUP);
        SharedMap {
            keys,
            values,
            queries,
            grads,
            exchange,
            dq,
            rows,
            key_ring,
            value_ring,
            query_ring,
            grad_ring,
            row_ring,
            tile_slots,
            meeting,
            everyone,
            dq_full,
            dq_empty,
            p_full,
            p_empty,
            named_barriers: barriers.used(),
            bytes: arena.used,
        }
    }

    /// Bytes from one warpgroup's dS to the other's.
    pub(super) fn exchange_pitch(&self) -> u32 {
        EXCHANGE_STAGES * self.exchange_bytes()
    }

    /// The tiles of a launch, where `group` heads share keys.
    pub fn tile_shape(&self, group: u64) -> TileShape {
        let sums = if self.form == Form::Fused { 4 * self.head_dim } else { 0 };
        let width = u64::from(2 * (self.head_dim + self.value_dim) + sums);
        TileShape {
            side: Side::Keys,
            rows: self.keys(),
            cols: self.queries,
            mask: self.mask,
            lengths: self.lengths,
            blocks_per_sm: 1,
            persistent: true,
            ordered: self.ordered,
            bytes_of_column: group * width,
            section_bytes: SECTION_BYTES,
        }
    }
}
