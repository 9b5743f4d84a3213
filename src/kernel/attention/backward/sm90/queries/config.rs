//! The choices, and what follows from them.

use super::super::super::{Side, TileShape};
use crate::kernel::attention::backward::sm90::schedule::TileSlots;
use crate::kernel::attention::variant::scores;
use crate::kernel::attention::{Lengths, Mask, ScoreMod};
use crate::kernel::hopper::barriers::{Named, NamedBarriers};
use crate::kernel::hopper::ring::Ring;
use crate::kernel::hopper::{ATOM, LINE, SLAB, WARPGROUP};
use crate::kernel::{Arena, Element};
use crate::ptx::Half;

/// Warpgroups that multiply, each with 64 queries of a tile.
pub(super) const GROUPS: u32 = 2;
/// Queries of a tile.
pub(super) const QUERIES: u32 = GROUPS * SLAB;
/// Registers of a thread that loads, and of one that multiplies.
pub(super) const REGISTERS: [u32; 2] = [40, 232];
/// Bytes of keys and values that stay in L2 together.
const SECTION_BYTES: u64 = 32 << 20;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The operands' type, and the result's: f16 or bf16.
    pub element: Element,
    /// Elements of a query and of a key: a multiple of 8, at most 256.
    pub head_dim: u32,
    /// Elements of a value: a multiple of 8, at most 256.
    pub value_dim: u32,
    /// What hides keys.
    pub mask: Mask,
    /// The score modification.
    pub score_mod: ScoreMod,
    /// How long sequences are.
    pub lengths: Lengths,
    /// Keys of a block: a multiple of 16, at most 128.
    pub keys: u32,
    /// Tiles whose queries and gradients are there or on their way.
    pub query_stages: u32,
    /// Stages of keys, and of values.
    pub key_stages: u32,
    /// The same of values.
    pub value_stages: u32,
}

/// The offsets of everything in shared memory.
pub(super) struct SharedMap {
    /// Where dQ lies at the end of a tile, too.
    pub queries: u32,
    pub grads: u32,
    pub keys: u32,
    pub values: u32,
    pub query_ring: Ring,
    pub grad_ring: Ring,
    pub key_ring: Ring,
    pub value_ring: Ring,
    pub tile_slots: TileSlots,
    /// Where the threads of each multiplying warpgroup meet.
    pub meeting: Named,
    pub named_barriers: u32,
    pub bytes: u32,
}

impl Config {
    /// `flash90 dq 128x64 d256/256 x1 x2 x1, bf16 causal packed`: queries of a tile and keys of a block,
    /// elements of a query and of a value, stages; type, mask, score modification and lengths.
    pub fn name(&self) -> String {
        let Self { element, head_dim, value_dim, keys, .. } = self;
        let Self { query_stages, key_stages, value_stages, .. } = self;
        let words = scores(self.mask, &self.score_mod, self.lengths);
        let stages = format!("x{query_stages} x{key_stages} x{value_stages}");
        let element = element.name();
        format!("flash90 dq {QUERIES}x{keys} d{head_dim}/{value_dim} {stages}, {element}{words}")
    }

    /// Queries of a tile.
    pub fn queries(&self) -> u32 {
        QUERIES
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

    pub(super) fn head_slabs(&self) -> u32 {
        self.head_dim.div_ceil(SLAB)
    }

    /// Elements along which queries and keys, and gradients and values, are multiplied: past the last they are 0.
    pub(super) fn depths(&self) -> [u32; 2] {
        [self.head_dim, self.value_dim].map(|dim| dim.next_multiple_of(16))
    }

    pub(super) fn value_slabs(&self) -> u32 {
        self.value_dim.div_ceil(SLAB)
    }

    pub(super) fn query_bytes(&self) -> u32 {
        self.head_slabs() * QUERIES * LINE
    }

    pub(super) fn grad_bytes(&self) -> u32 {
        self.value_slabs() * QUERIES * LINE
    }

    pub(super) fn key_bytes(&self) -> u32 {
        self.head_slabs() * self.keys * LINE
    }

    pub(super) fn value_bytes(&self) -> u32 {
        self.value_slabs() * self.keys * LINE
    }

    /// This configuration with as many stages as fit where a block can have `limit` bytes of shared memory: first
    /// of keys and values, two of each, then of queries, then more.
    pub fn filled(self, limit: u32) -> Self {
        let mut config = Self { query_stages: 1, key_stages: 1, value_stages: 1, ..self };
        let fits = |config: Self| config.check(limit).is_ok().then_some(config);
        for more in [
            |c: Self| Self { key_stages: 2, ..c },
            |c: Self| Self { value_stages: 2, ..c },
            |c: Self| Self { query_stages: 2, ..c },
            |c: Self| Self { key_stages: 3, ..c },
            |c: Self| Self { value_stages: 3, ..c },
        ] {
            config = fits(more(config)).unwrap_or(config);
        }
        config
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let smem = self.smem();
        let shared = smem.bytes;
        let multiple =
            |n: u32, of: u32, most: u32| n.is_multiple_of(of) && (of..=most).contains(&n);
        let stages = [self.query_stages, self.key_stages, self.value_stages];
        let rules = [
            (matches!(self.element, Element::Half(_)), "operands of f32".into()),
            (
                multiple(self.head_dim, 8, 256) && multiple(self.value_dim, 8, 256),
                format!("{}/{} elements (multiples of 8 up to 256)", self.head_dim, self.value_dim),
            ),
            (
                multiple(self.keys, 16, 128),
                format!("blocks of {} keys (a multiple of 16 up to 128)", self.keys),
            ),
            (stages.iter().all(|&n| n > 0), format!("stages of {stages:?}")),
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
        let queries = arena.region(self.query_stages * self.query_bytes(), ATOM);
        let grads = arena.region(self.query_stages * self.grad_bytes(), ATOM);
        let keys = arena.region(self.key_stages * self.key_bytes(), ATOM);
        let values = arena.region(self.value_stages * self.value_bytes(), ATOM);
        let [query_ring, grad_ring] = [(); 2].map(|()| Ring::new(&mut arena, self.query_stages));
        let key_ring = Ring::new(&mut arena, self.key_stages);
        let value_ring = Ring::new(&mut arena, self.value_stages);
        let tile_slots = TileSlots::new(&mut arena);
        let mut barriers = NamedBarriers::new();
        let meeting = barriers.each(GROUPS, WARPGROUP);
        SharedMap {
            queries,
            grads,
            keys,
            values,
            query_ring,
            grad_ring,
            key_ring,
            value_ring,
            tile_slots,
            meeting,
            named_barriers: barriers.used(),
            bytes: arena.used,
        }
    }

    /// The tiles of a launch.
    pub fn tile_shape(&self) -> TileShape {
        TileShape {
            side: Side::Queries,
            rows: QUERIES,
            cols: self.keys,
            mask: self.mask,
            lengths: self.lengths,
            blocks_per_sm: 1,
            persistent: true,
            ordered: false,
            bytes_of_column: u64::from(2 * (self.head_dim + self.value_dim)),
            section_bytes: SECTION_BYTES,
        }
    }
}
