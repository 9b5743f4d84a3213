//! Attention on Hopper: a thread of one warpgroup lets TMA fill rings of blocks of
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

use super::scores::ScoreParams;
use super::work::{OutputView, RowsMemory, Tiles};
use super::{Lengths, Name};
use crate::kernel::hopper::WARPGROUP;
use crate::ptx::{Kernel, Reg, Source, Target};
use config::SharedMap;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention", Target::Sm90a, config.threads());
    k.blocks_per_sm(1);
    let smem = config.smem();
    let maps = [Name::Q, Name::K, Name::V].map(|name| k.tensor_map(name));
    let out_map = (config.store == Store::Tma).then(|| k.tensor_map(Name::Out));
    let packed = config.variant.lengths == Lengths::Packed;
    let out_memory = (config.store == Store::Direct || packed)
        .then(|| OutputView::params(k, config.variant.split));
    let rows_memory = RowsMemory::params(k, &config.variant);
    let size = [k.param(Name::Queries), k.param(Name::Keys)];
    let heads = [k.param(Name::Heads), k.param(Name::Group)];
    let score_params = ScoreParams::params(k, config.variant.score_mod, config.element);
    let tiles = Tiles::params(k, config.into(), size, heads);
    let base = k.shared(smem.bytes);
    let thread = k.thread();
    let warp = k.shfl_idx(thread / 32, 0);
    let group = k.shfl_idx(thread / WARPGROUP, 0);

    k.if_(warp.eq(0), || {
        k.if_(k.elect_sync(), || {
            maps.into_iter().chain(out_map).for_each(|map| k.prefetch_tensor_map(map));
            smem.query_ring.init(k, base, 1);
            smem.key_ring.init(k, base, config.consumers());
            smem.value_ring.init(k, base, config.consumers());
        })
    });
    k.sync_block();
    k.griddepcontrol_wait();
    k.griddepcontrol_launch_dependents();

    let a = Attention {
        k,
        c: config,
        smem,
        maps,
        out_map,
        out_memory,
        rows_memory,
        score_params,
        tiles,
        base,
    };
    k.if_else(
        group.eq(0),
        || {
            if let Some([give, _]) = config.registers() {
                k.setmaxnreg_dec(give);
            }
            k.if_(warp.eq(0), || a.produce());
        },
        || {
            if let Some([_, take]) = config.registers() {
                k.setmaxnreg_inc(take);
            }
            a.consume(thread - WARPGROUP, group - 1);
        },
    );
    k.finish()
}

struct Attention<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    smem: SharedMap,
    /// The descriptors of queries, keys and values.
    maps: [Reg<'k, u64>; 3],
    out_map: Option<Reg<'k, u64>>,
    out_memory: Option<OutputView<'k>>,
    rows_memory: RowsMemory<'k>,
    score_params: ScoreParams<'k>,
    tiles: Tiles<'k>,
    base: Reg<'k, u32>,
}
