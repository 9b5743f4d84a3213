//! dQ on Hopper. A block of threads has a tile of 128 queries, whose dQ stays in registers, and walks over
//! blocks of keys. Each of two warpgroups has 64 queries:
//!
//! ```text
//! S  = Q·Kᵀ     dP = dO·Vᵀ     from shared memory
//! P, dS         in registers
//! dQ += dS·K                   left operand from registers
//! ```
//!
//! Nothing is added up between blocks of threads: the result is the same in every run.

mod attend;
mod config;
mod load;
mod store;

pub use config::Config;

use super::super::work::Tiles;
use super::schedule::TileSchedule;
use crate::kernel::attention::scores::ScoreParams;
use crate::kernel::attention::{Lengths, Name};
use crate::kernel::hopper::WARPGROUP;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Kernel, Reg, Source, Target};
use config::{GROUPS, REGISTERS, SharedMap};

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention_queries", Target::Sm90a, config.threads());
    k.blocks_per_sm(1);
    let smem = config.smem();
    let maps = [Name::Q, Name::K, Name::V, Name::Grad].map(|name| k.tensor_map(name));
    let out_map = k.tensor_map(Name::Dq);
    let packed = config.lengths == Lengths::Packed;
    let out_memory = packed.then(|| {
        let [row, head] = [Name::DqRow, Name::DqHead].map(|name| k.param(name));
        [k.pointer(Name::DqAt), row, head]
    });
    let row_memory = [Name::RowMax, Name::RowLog, Name::Delta].map(|name| k.pointer(name));
    let grad_scale = k.param(Name::GradScale);
    let score_params = ScoreParams::params(k, config.score_mod, config.element);
    let tiles = Tiles::params(k, config.tile_shape());
    let base = k.shared(smem.bytes);
    let schedule = TileSchedule::params(k, config.lengths, smem.tile_slots, base);
    let thread = k.thread();
    let warp = k.shfl_idx(thread / 32, 0);
    let group = k.shfl_idx(thread / WARPGROUP, 0);

    k.if_(warp.eq(0), || {
        k.if_(k.elect_sync(), || {
            maps.into_iter().chain([out_map]).for_each(|map| k.prefetch_tensor_map(map));
            for ring in [smem.key_ring, smem.value_ring, smem.query_ring, smem.grad_ring] {
                ring.init(k, base, GROUPS);
            }
            smem.tile_slots.ring().init(k, base, GROUPS * WARPGROUP / WARP);
        })
    });
    k.sync_block();
    k.griddepcontrol_wait();
    k.griddepcontrol_launch_dependents();

    let a = Backward {
        k,
        c: config,
        smem,
        maps,
        out_map,
        out_memory,
        row_memory,
        grad_scale,
        score_params,
        tiles,
        schedule,
        base,
    };
    let [give, take] = REGISTERS;
    k.if_else(
        group.eq(0),
        || {
            k.setmaxnreg_dec(give);
            k.if_(warp.eq(0), || a.load());
        },
        || {
            k.setmaxnreg_inc(take);
            a.consume(thread - WARPGROUP, group - 1);
        },
    );
    k.finish()
}

struct Backward<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    smem: SharedMap,
    /// The descriptors of queries, keys, values and the result's gradient.
    maps: [Reg<'k, u64>; 4],
    /// That of dQ.
    out_map: Reg<'k, u64>,
    /// dQ for threads: its address, and strides of rows and heads in elements. The batch is one.
    out_memory: Option<[Reg<'k, u64>; 3]>,
    /// Of each query its maximum, its logarithm, its delta.
    row_memory: [Reg<'k, u64>; 3],
    grad_scale: Reg<'k, f32>,
    score_params: ScoreParams<'k>,
    tiles: Tiles<'k>,
    schedule: TileSchedule<'k>,
    base: Reg<'k, u32>,
}
