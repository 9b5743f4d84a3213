//! Attention on Hopper: a thread of one warpgroup lets the copy engine (TMA) fill rings of blocks of
//! keys and values, up to three others have 64 rows of queries each, and multiply with wgmma.
//!
//! The products of a block's queries and keys begin together with the product of the exponentials and
//! values of the block before it: the softmax runs while the latter does.

mod attend;
mod config;
mod load;
mod store;

pub use config::{Config, Launch, MAX_LENGTH, Store};

use super::lengths::{Sequences, Side};
use super::mask::{Blocks, Sight};
use super::schedule::{Place, Schedule};
use super::scores::Shaping;
use super::{Lengths, Mask};
use crate::kernel::hopper::WARPGROUP;
use crate::ptx::{Kernel, Reg, Source, Target};
use config::Plan;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Parameters, in order; strides are in elements:
///
/// | | type | |
/// |---|---|---|
/// | `q` | descriptor | of the queries |
/// | `k`, `v` | descriptors | of keys and values |
/// | `out` | descriptor | only for [`Store::Tma`] |
/// | `out_at`, `out_row`, `out_head`, `out_batch` | address, 3 × u64 | only for [`Store::Direct`] and [`Lengths::Packed`]: strides between positions, heads, sequences |
/// | `out_part` | u64 | only for a split: from part to part |
/// | `lse` | address | only with [`Config::lse`]: f32, `[batch, heads, queries]` |
/// | `lse_part` | u64 | only for a split: from part to part |
/// | `queries`, `keys` | i32 | positions of the tensors |
/// | `heads`, `group` | u32 | heads of the queries, and how many share keys |
/// | `scale` | f32 | the scale times log₂e; with a soft cap the scale over the cap |
/// | `cap` | f32 | only with a soft cap: the cap times log₂e |
/// | `bias`, `bias_batch`, `bias_head`, `bias_query`, `bias_key` | address, 4 × u64 | only with a bias |
/// | `slopes`, `slopes_batch`, `slopes_head` | address, 2 × u64 | only with ALiBi: f32 |
/// | `right` | i32 | only with a mask: that of [`Launch`] |
/// | `left` | i32 | only for [`Mask::Window`]: that of [`Launch`] |
/// | `lengths_q`, `lengths_k` | addresses | u32. [`Lengths::Padded`]: of each sequence; [`Lengths::Packed`]: where each begins, and the last one's end |
/// | `sequences` | u32 | only for [`Lengths::Packed`] |
/// | `parts` | u32 | only for a split: that of [`Launch`] |
/// | `all_heads`, `columns`, `tiles`, `section` | u32 | those of [`Launch::order`] |
///
/// Descriptors have a swizzle of 128 bytes. Their dimensions, innermost first, and boxes:
///
/// | | dimensions | box |
/// |---|---|---|
/// | `q` | head_dim, queries, heads, batch | 64, 64, 1, 1 |
/// | `q` with [`Config::pack`] > 1 | head_dim, pack, queries, heads / pack, batch | 64, pack, [`Config::positions`], 1, 1 |
/// | `k` | head_dim, keys, kv_heads, batch | 64, [`Config::keys`], 1, 1 |
/// | `v` | value_dim, keys, kv_heads, batch | 64, [`Config::keys`], 1, 1 |
/// | `out` | as `q`, with value_dim | as `q`, [`Config::slab_cols`] wide |
///
/// The batch of [`Lengths::Packed`] is one; a bias and slopes have a batch of sequences there, too.
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention", Target::Sm90a, config.threads());
    k.blocks_per_sm(1);
    let plan = config.plan();
    let maps = [k.tensor_map("q"), k.tensor_map("k"), k.tensor_map("v")];
    let out_map = (config.store == Store::Tma).then(|| k.tensor_map("out"));
    let packed = config.lengths == Lengths::Packed;
    let part = |name| config.split.then(|| k.param(name));
    let out_memory = (config.store == Store::Direct || packed).then(|| Memory {
        address: k.pointer("out_at"),
        row: k.param("out_row"),
        head: k.param("out_head"),
        batch: k.param("out_batch"),
        part: part("out_part"),
    });
    let lse = config.lse.then(|| (k.pointer("lse"), part("lse_part")));
    let size = [k.param("queries"), k.param("keys")];
    let heads = [k.param("heads"), k.param("group")];
    let shaping = Shaping::params(k, config.scores);
    let right = (config.mask != Mask::None).then(|| k.param("right"));
    let left = (config.mask == Mask::Window).then(|| k.param("left"));
    let sequences = Sequences::params(k, config.lengths, size);
    let parts = config.split.then(|| k.param("parts"));
    let schedule = Schedule::params(k);
    let base = k.shared(plan.bytes);
    let thread = k.thread();
    let warp = k.broadcast(thread / 32, 0);
    let group = k.broadcast(thread / WARPGROUP, 0);

    k.if_(warp.eq(0), || {
        k.if_(k.elect(), || {
            maps.into_iter().chain(out_map).for_each(|map| k.prefetch_tensor_map(map));
            plan.query_ring.init(k, base, 1);
            plan.key_ring.init(k, base, config.consumers());
            plan.value_ring.init(k, base, config.consumers());
        })
    });
    k.sync_block();
    k.wait_for_stream();
    k.let_next_start();

    let a = Attention {
        k,
        c: config,
        plan,
        maps,
        out_map,
        out_memory,
        lse,
        size,
        heads,
        shaping,
        right,
        left,
        sequences,
        parts,
        schedule,
        base,
    };
    k.if_else(
        group.eq(0),
        || {
            if let Some([give, _]) = config.registers() {
                k.give_registers(give);
            }
            k.if_(warp.eq(0), || a.produce());
        },
        || {
            if let Some([_, take]) = config.registers() {
                k.take_registers(take);
            }
            a.consume(thread - WARPGROUP, group - 1);
        },
    );
    k.finish()
}

/// The result, for threads.
#[derive(Clone, Copy)]
struct Memory<'k> {
    address: Reg<'k, u64>,
    row: Reg<'k, u64>,
    head: Reg<'k, u64>,
    batch: Reg<'k, u64>,
    part: Option<Reg<'k, u64>>,
}

struct Attention<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    plan: Plan,
    /// Of queries, keys and values.
    maps: [Reg<'k, u64>; 3],
    out_map: Option<Reg<'k, u64>>,
    out_memory: Option<Memory<'k>>,
    /// And the stride of parts.
    lse: Option<(Reg<'k, u64>, Option<Reg<'k, u64>>)>,
    /// Queries and keys of the tensors.
    size: [Reg<'k, i32>; 2],
    /// Heads of the queries, and of those how many share keys.
    heads: [Reg<'k, u32>; 2],
    shaping: Shaping<'k>,
    right: Option<Reg<'k, i32>>,
    left: Option<Reg<'k, i32>>,
    sequences: Sequences<'k>,
    parts: Option<Reg<'k, u32>>,
    schedule: Schedule<'k>,
    base: Reg<'k, u32>,
}

/// A tile of queries, or a part of its keys.
#[derive(Clone, Copy)]
struct Work<'k> {
    /// In the tensors.
    batch: Reg<'k, u32>,
    sequence: Reg<'k, u32>,
    /// The number of its pack of heads, and the first one.
    pack: Reg<'k, u32>,
    head: Reg<'k, u32>,
    /// Of keys and values.
    kv_head: Reg<'k, u32>,
    part: Option<Reg<'k, u32>>,
    /// The tile's first query.
    first: Reg<'k, i32>,
    queries: Side<'k>,
    keys: Side<'k>,
    sight: Sight<'k>,
    blocks: Blocks<'k>,
}

impl<'k> Attention<'k, '_> {
    /// Runs `body` for each tile of this block.
    fn tiles(&self, body: impl FnOnce(Work<'k>)) {
        let (k, c) = (self.k, self.c);
        let packs = if c.pack == 1 { self.heads[0] } else { self.heads[0] / c.pack };
        self.schedule.for_each(|Place { head, column }| {
            if c.lengths == Lengths::Packed {
                let found = self.sequences.find(column, c.tile_positions());
                // Those with the most keys first.
                let tile = match c.mask {
                    Mask::Right => found.tiles - 1 - found.tile,
                    Mask::None | Mask::Window => found.tile,
                };
                k.if_(found.exists, || {
                    let queries = found.queries;
                    body(self.work((k.var(0), found.sequence), head, (tile, None), queries));
                });
            } else {
                let (tile, part) = match self.parts {
                    None => (column, None),
                    Some(parts) => (column / parts, Some(column % parts)),
                };
                let batch = head / packs;
                let queries = self.sequences.side(0, batch);
                body(self.work((batch, batch), head - batch * packs, (tile, part), queries));
            }
        });
    }

    fn work(
        &self,
        (batch, sequence): (Reg<'k, u32>, Reg<'k, u32>),
        pack: Reg<'k, u32>,
        (tile, part): (Reg<'k, u32>, Option<Reg<'k, u32>>),
        queries: Side<'k>,
    ) -> Work<'k> {
        let c = self.c;
        let keys = self.sequences.side(1, sequence);
        let first = (tile * c.tile_positions()).cast::<i32>();
        let offset = keys.count - queries.count;
        let sight = Sight {
            keys: keys.count,
            end: self.right.map(|right| offset + right + 1),
            begin: self.left.map(|left| offset - left),
        };
        let last = (first + c.tile_positions() as i32).min(queries.count);
        let mut blocks = sight.blocks(first, last, c.keys);
        if c.lengths == Lengths::Padded {
            blocks.end = blocks.end.or_else(first.lt(queries.count), 0);
        }
        if let (Some(part), Some(parts)) = (part, self.parts) {
            let each = (blocks.end - blocks.begin).or_zero() + (parts - 1);
            let each = each / parts;
            blocks.begin = blocks.begin + (part * each).cast();
            blocks.end = blocks.end.min(blocks.begin + each.cast());
        }
        let head = if c.pack == 1 { pack } else { pack * c.pack };
        let kv_head = head / self.heads[1];
        Work { batch, sequence, pack, head, kv_head, part, first, queries, keys, sight, blocks }
    }
}
