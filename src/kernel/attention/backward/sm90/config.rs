//! The choices, and what follows from them.

use super::super::{Side, TileShape};
use crate::kernel::attention::{Lengths, Mask, ScoreMod};
use crate::kernel::hopper::barriers::{Named, NamedBarriers};
use crate::kernel::hopper::ring::Ring;
use crate::kernel::hopper::{ATOM, LINE, SLAB, SLAB_BYTES, WARPGROUP};
use crate::kernel::multiprocessor::WARP;
use crate::kernel::{Arena, Element};
use crate::ptx::Half;

/// Warpgroups that multiply, each with 64 keys of a tile.
pub(super) const GROUPS: u32 = 2;
/// Keys of a tile.
pub(super) const KEYS: u32 = GROUPS * SLAB;
/// Stages of dS.
pub(super) const DS_STAGES: u32 = 2;
/// Registers of a thread that loads, and of one that multiplies.
pub(super) const REGISTERS: [u32; 2] = [40, 232];
/// Floats that are kept of each query in shared memory: see [`SharedMap::rows`].
pub(super) const ROW_FLOATS: u32 = 3;
/// Bytes of queries, their gradients and sums that stay in L2 together.
const SECTION_BYTES: u64 = 32 << 20;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The operands' type, and the results': f16 or bf16.
    pub element: Element,
    /// Elements of a query and of a key: a multiple of 16, at most 128.
    pub head_dim: u32,
    /// Elements of a value: a multiple of 16, at most 128.
    pub value_dim: u32,
    /// What hides keys.
    pub mask: Mask,
    /// The score modification.
    pub score_mod: ScoreMod,
    /// How long sequences are.
    pub lengths: Lengths,
    /// Queries of a block: 64, or 128 of narrow heads.
    pub queries: u32,
    /// Stages of queries and their gradients.
    pub stages: u32,
}

/// The offsets of everything in shared memory.
pub(super) struct SharedMap {
    pub keys: u32,
    pub values: u32,
    pub queries: u32,
    pub grads: u32,
    /// dS, by warpgroup and stage: lines of a query's 64 keys. At the end of a tile dK lies here.
    pub ds: u32,
    /// A block's share of dQ, by warpgroup, in the order of registers. At the end of a tile dV lies here.
    pub dq: u32,
    /// Of each stage: for each query minus its maximum and minus its logarithm, then for each its delta.
    pub rows: u32,
    pub key_ring: Ring,
    pub value_ring: Ring,
    pub query_ring: Ring,
    pub grad_ring: Ring,
    pub row_ring: Ring,
    /// Where the threads of each multiplying warpgroup meet.
    pub meeting: Named,
    /// Where all that multiply meet.
    pub everyone: Named,
    /// Where a warpgroup says that its dQ is in shared memory, and where it is told that it has left.
    pub dq_full: Named,
    pub dq_empty: Named,
    pub named_barriers: u32,
    pub bytes: u32,
}

impl Config {
    /// `flash90back 64x128 d128/64 x2, bf16 causal packed`: queries of a block and keys of a tile, elements
    /// of a query and of a value, stages; type, mask, score modification and lengths.
    pub fn name(&self) -> String {
        let Self { element, head_dim, value_dim, queries, stages, .. } = self;
        let words = super::super::describe(self.mask, &self.score_mod, self.lengths);
        let element = element.name();
        format!("flash90back {queries}x{KEYS} d{head_dim}/{value_dim} x{stages}, {element}{words}")
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
        self.queries == KEYS
    }

    /// Slabs of a query or key. Where the columns of dQ are divided they are even.
    pub(super) fn head_slabs(&self) -> u32 {
        if self.divides_queries() { 1 } else { 2 }
    }

    pub(super) fn value_slabs(&self) -> u32 {
        self.value_dim.div_ceil(SLAB)
    }

    /// Columns of dQ of a warpgroup, and of all of its 64 rows the floats.
    pub(super) fn dq_columns(&self) -> u32 {
        if self.divides_queries() { self.head_dim } else { SLAB }
    }

    pub(super) fn dq_bytes(&self) -> u32 {
        SLAB * self.dq_columns() * 4
    }

    /// Bytes from one warpgroup's dQ in shared memory to the other's.
    pub(super) fn dq_pitch(&self) -> u32 {
        self.dq_bytes().max(self.value_slabs() * SLAB_BYTES)
    }

    pub(super) fn query_bytes(&self) -> u32 {
        self.head_slabs() * self.queries * LINE
    }

    pub(super) fn grad_bytes(&self) -> u32 {
        self.value_slabs() * self.queries * LINE
    }

    /// Bytes of a stage of a warpgroup's dS.
    pub(super) fn ds_bytes(&self) -> u32 {
        self.queries * LINE
    }

    pub(super) fn row_bytes(&self) -> u32 {
        self.queries * ROW_FLOATS * 4
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let smem = self.smem();
        let shared = smem.bytes;
        let multiple = |n: u32| n.is_multiple_of(16) && (16..=128).contains(&n);
        let widest = self.head_dim.max(self.value_dim);
        let rules = [
            (matches!(self.element, Element::Half(_)), "operands of f32".into()),
            (
                multiple(self.head_dim) && multiple(self.value_dim),
                format!(
                    "{}/{} elements (multiples of 16 up to 128)",
                    self.head_dim, self.value_dim
                ),
            ),
            (
                self.queries == 64 || (self.queries == 128 && widest <= SLAB),
                format!("blocks of {} queries (64, or 128 of narrow heads)", self.queries),
            ),
            (self.stages >= 1, format!("{} stages", self.stages)),
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
        let keys = arena.region(self.head_slabs() * KEYS * LINE, ATOM);
        let values = arena.region(self.value_slabs() * KEYS * LINE, ATOM);
        let queries = arena.region(self.stages * self.query_bytes(), ATOM);
        let grads = arena.region(self.stages * self.grad_bytes(), ATOM);
        let ds = arena.region(GROUPS * DS_STAGES * self.ds_bytes(), ATOM);
        let dq = arena.region(GROUPS * self.dq_pitch(), ATOM);
        let rows = arena.region(self.stages * self.row_bytes(), 16);
        let [key_ring, value_ring] = [1, 1].map(|stages| Ring::new(&mut arena, stages));
        let [query_ring, grad_ring] = [(); 2].map(|()| Ring::new(&mut arena, self.stages));
        let row_ring = Ring::filled_by(&mut arena, self.stages, WARP);
        let mut barriers = NamedBarriers::new();
        let meeting = barriers.each(GROUPS, WARPGROUP);
        let everyone = barriers.each(1, GROUPS * WARPGROUP);
        let dq_full = barriers.each(GROUPS, WARPGROUP + WARP);
        let dq_empty = barriers.each(GROUPS, WARPGROUP + WARP);
        SharedMap {
            keys,
            values,
            queries,
            grads,
            ds,
            dq,
            rows,
            key_ring,
            value_ring,
            query_ring,
            grad_ring,
            row_ring,
            meeting,
            everyone,
            dq_full,
            dq_empty,
            named_barriers: barriers.used(),
            bytes: arena.used,
        }
    }

    /// The tiles of a launch, where `group` heads share keys.
    pub fn tile_shape(&self, group: u64) -> TileShape {
        let width = u64::from(2 * (self.head_dim + self.value_dim) + 4 * self.head_dim);
        TileShape {
            side: Side::Keys,
            rows: KEYS,
            cols: self.queries,
            mask: self.mask,
            lengths: self.lengths,
            blocks_per_sm: 1,
            persistent: true,
            bytes_of_column: group * width,
            section_bytes: SECTION_BYTES,
        }
    }
}
