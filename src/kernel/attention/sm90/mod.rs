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

use crate::kernel::attention::Lengths;
use crate::kernel::attention::Mask;
use crate::kernel::attention::mask::{Blocks, Sight};
use crate::kernel::attention::schedule::Schedule;
use crate::kernel::hopper::WARPGROUP;
use crate::ptx::{Kernel, Reg, Source, Target};
use config::Plan;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Parameters, in order:
///
/// | | type | |
/// |---|---|---|
/// | `q`, `k`, `v` | descriptor | dimensions (elements, positions, heads, batch), innermost first, any strides; boxes of 64 elements and 64 positions for `q`, [`Config::keys`] positions for `k` and `v`; swizzle of 128 bytes |
/// | `out` | descriptor | only for [`Store::Tma`]: as `q`, boxes of [`Config::slab_cols`] elements and 64 positions |
/// | `out_at`, `out_row`, `out_head`, `out_batch` | address, 3 × u64 | only for [`Store::Direct`]: strides in elements |
/// | `lse` | address | only with [`Config::lse`]: f32, `[batch, heads, queries]` |
/// | `queries`, `keys` | i32 | positions of a sequence |
/// | `heads`, `group` | u32 | heads of `q`, and those that share keys |
/// | `scale` | f32 | the scale times log₂e |
/// | `right` | i32 | only for masks: that of [`Launch`] |
/// | `left` | i32 | only for [`Mask::Window`]: that of [`Launch`] |
/// | `all_heads`, `columns`, `tiles`, `section` | u32 | those of [`Launch::order`] |
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention", Target::Sm90a, config.threads());
    k.blocks_per_sm(1);
    let plan = config.plan();
    let (q, keys, values) = (k.tensor_map("q"), k.tensor_map("k"), k.tensor_map("v"));
    let out_map = (config.store == Store::Tma).then(|| k.tensor_map("out"));
    let out_memory = (config.store == Store::Direct).then(|| Memory {
        address: k.pointer("out_at"),
        row: k.param("out_row"),
        head: k.param("out_head"),
        batch: k.param("out_batch"),
    });
    let lse = config.lse.then(|| k.pointer("lse"));
    let size = [k.param("queries"), k.param("keys")];
    let heads = [k.param("heads"), k.param("group")];
    let scale = k.param("scale");
    let right = (config.mask != Mask::None).then(|| k.param("right"));
    let left = (config.mask == Mask::Window).then(|| k.param("left"));
    let schedule = Schedule::params(k);
    let base = k.shared(plan.bytes);
    let thread = k.thread();
    let warp = k.broadcast(thread / 32, 0);
    let group = k.broadcast(thread / WARPGROUP, 0);

    k.if_(warp.eq(0), || {
        k.if_(k.elect(), || {
            [Some(q), Some(keys), Some(values), out_map]
                .into_iter()
                .flatten()
                .for_each(|map| k.prefetch_tensor_map(map));
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
        maps: [q, keys, values],
        out_map,
        out_memory,
        lse,
        size,
        heads,
        scale,
        right,
        left,
        schedule,
        base,
    };
    k.if_else(
        group.eq(0),
        || {
            if let Some([give, _]) = config.registers() {
                k.give_registers(give);
            }
            k.if_(warp.eq(0), || k.if_(k.elect(), || a.produce()));
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
}

struct Attention<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    plan: Plan,
    /// Of queries, keys and values.
    maps: [Reg<'k, u64>; 3],
    out_map: Option<Reg<'k, u64>>,
    out_memory: Option<Memory<'k>>,
    lse: Option<Reg<'k, u64>>,
    /// Queries and keys.
    size: [Reg<'k, i32>; 2],
    /// Heads of the queries, and of those how many share keys.
    heads: [Reg<'k, u32>; 2],
    scale: Reg<'k, f32>,
    right: Option<Reg<'k, i32>>,
    left: Option<Reg<'k, i32>>,
    schedule: Schedule<'k>,
    base: Reg<'k, u32>,
}

/// A tile of queries.
#[derive(Clone, Copy)]
struct Work<'k> {
    batch: Reg<'k, u32>,
    head: Reg<'k, u32>,
    /// Of keys and values.
    kv_head: Reg<'k, u32>,
    /// The tile's first query.
    first: Reg<'k, i32>,
    /// Queries of the sequence.
    queries: Reg<'k, i32>,
    sight: Sight<'k>,
    blocks: Blocks<'k>,
}

impl<'k> Attention<'k, '_> {
    /// Runs `body` for each tile of this block.
    fn tiles(&self, body: impl FnOnce(Work<'k>)) {
        self.schedule.for_each(|place| {
            let [heads, group] = self.heads;
            let batch = place.head / heads;
            let head = place.head - batch * heads;
            debug_assert_eq!(self.c.lengths, Lengths::Full);
            let [queries, keys] = self.size;
            let first = (place.column * self.c.rows).cast::<i32>();
            let offset = keys - queries;
            let sight = Sight {
                keys,
                end: self.right.map(|right| offset + right + 1),
                begin: self.left.map(|left| offset - left),
            };
            let last = (first + self.c.rows as i32).min(queries);
            let blocks = sight.blocks(first, last, self.c.keys);
            body(Work { batch, head, kv_head: head / group, first, queries, sight, blocks });
        });
    }
}
