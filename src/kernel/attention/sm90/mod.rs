//! Attention on Hopper: a thread of one warpgroup lets the copy engine (TMA) fill rings of blocks of
//! keys and values, up to three others have 64 rows of queries each, and multiply with wgmma.
//!
//! The products of a block's queries and keys begin together with the product of the exponentials and
//! values of the block before it: the softmax runs while the latter does.

mod attend;
mod config;
mod load;
mod store;

pub use super::{Launch, MAX_LENGTH};
pub use config::{Config, Store};

use super::Lengths;
use super::scores::Shaping;
use super::work::{Logarithms, Memory, Tiles};
use crate::kernel::Element;
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
/// | `lse` | address | only with [`Task::lse`](super::Task::lse): f32, `[batch, heads, queries]` |
/// | `lse_part` | u64 | only for a split: from part to part |
/// | `queries`, `keys` | i32 | positions of the tensors |
/// | `heads`, `group` | u32 | heads of the queries, and how many share keys |
/// | `scale` | f32 | the scale times log₂e; with a soft cap the scale over the cap |
/// | `cap` | f32 | only with a soft cap: the cap times log₂e |
/// | `bias`, `bias_batch`, `bias_head`, `bias_query`, `bias_key` | address, 4 × u64 | only with a bias |
/// | `slopes`, `slopes_batch`, `slopes_head` | address, 2 × u64 | only with ALiBi: f32 |
/// | `right` | i32 | only with a mask: that of [`Launch`] |
/// | `left` | i32 | only for [`Mask::Window`](super::Mask::Window): that of [`Launch`] |
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
/// | `q` with [`Task::pack`](super::Task::pack) > 1 | head_dim, pack, queries, heads / pack, batch | 64, pack, [`Config::positions`], 1, 1 |
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
    let packed = config.task.lengths == Lengths::Packed;
    let out_memory =
        (config.store == Store::Direct || packed).then(|| Memory::params(k, config.task.split));
    let lse = config.task.lse.then(|| Logarithms::params(k, config.task.split));
    let size = [k.param("queries"), k.param("keys")];
    let heads = [k.param("heads"), k.param("group")];
    let shaping = Shaping::params(k, config.task.scores, Element::Half(config.half));
    let tiles = Tiles::params(k, config.into(), size, heads);
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

    let a = Attention { k, c: config, plan, maps, out_map, out_memory, lse, shaping, tiles, base };
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

struct Attention<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    plan: Plan,
    /// Of queries, keys and values.
    maps: [Reg<'k, u64>; 3],
    out_map: Option<Reg<'k, u64>>,
    out_memory: Option<Memory<'k>>,
    lse: Option<Logarithms<'k>>,
    shaping: Shaping<'k>,
    tiles: Tiles<'k>,
    base: Reg<'k, u32>,
}
