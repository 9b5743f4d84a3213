//! dK and dV on Hopper. A block of threads has a tile of keys, whose dK and dV stay in registers, and walks
//! over blocks of queries, of all heads that share the keys:
//!
//! ```text
//! Sᵀ  = K·Qᵀ     dPᵀ = V·dOᵀ     from shared memory
//! P, dS                          in registers
//! dV += Pᵀ·dO    dK += dSᵀ·Q     left operands from registers
//! ```
//!
//! Two warpgroups multiply. [`Form`] says how they share the work. Of heads that are not wide they make dQ, too:
//!
//! ```text
//! dQ  = dS·K                     dS by way of shared memory; a half each, to shared memory, from where it is
//!                                added to sums in global memory
//! ```
//!
//! Of the warpgroup that does not multiply one warp lets TMA load, one adds up dQ, and one fetches what is known
//! of queries.

mod attend;
mod config;
mod load;
mod pointwise;
mod store;
mod wide;

pub use config::{Config, Form};

use super::super::sums::DqSums;
use super::super::work::Tiles;
use super::schedule::TileSchedule;
use crate::kernel::attention::scores::ScoreParams;
use crate::kernel::attention::{Lengths, Name};
use crate::kernel::hopper::WARPGROUP;
use crate::ptx::{Kernel, Reg, Source, Target};
use config::{REGISTERS, SharedMap};
use store::GradMemory;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention_keys", Target::Sm90a, config.threads());
    k.blocks_per_sm(1);
    let smem = config.smem();
    let maps = [Name::Q, Name::K, Name::V, Name::Grad].map(|name| k.tensor_map(name));
    let out_maps = [Name::Dk, Name::Dv].map(|name| k.tensor_map(name));
    let packed = config.lengths == Lengths::Packed;
    let out_memory = packed.then(|| GradMemory::params(k));
    let row_memory = [Name::RowMax, Name::RowLog, Name::Delta].map(|name| k.pointer(name));
    let grad_scale = k.param(Name::GradScale);
    let score_params = ScoreParams::params(k, config.score_mod, config.element);
    let tiles = Tiles::params(k, config.tile_shape(1));
    let dq_sums = (config.form == Form::Fused).then(|| {
        let bytes = [config.queries, config.dq_block_bytes()];
        DqSums::params(k, config.lengths, bytes, tiles.size[0], tiles.sequences())
    });
    let dq_turns = config.ordered.then(|| k.pointer(Name::DqTurns));
    let base = k.shared(smem.bytes);
    let schedule = TileSchedule::params(k, config.lengths, smem.tile_slots, base);
    let thread = k.thread();
    let warp = k.shfl_idx(thread / 32, 0);
    let group = k.shfl_idx(thread / WARPGROUP, 0);

    k.if_(warp.eq(0), || {
        k.if_(k.elect_sync(), || {
            maps.into_iter().chain(out_maps).for_each(|map| k.prefetch_tensor_map(map));
            for (ring, consumers) in smem.rings(config) {
                ring.init(k, base, consumers);
            }
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
        out_maps,
        out_memory,
        row_memory,
        grad_scale,
        score_params,
        tiles,
        schedule,
        dq_sums,
        dq_turns,
        base,
    };
    let [give, take] = REGISTERS;
    k.if_else(
        group.eq(0),
        || {
            k.setmaxnreg_dec(give);
            k.if_(warp.eq(0), || a.load());
            k.if_(warp.eq(1), || a.fetch_rows());
            if let Some(sums) = a.dq_sums {
                k.if_(warp.eq(2), || a.add_up(sums));
            }
        },
        || {
            k.setmaxnreg_inc(take);
            let (thread, number) = (thread - WARPGROUP, group - 1);
            match config.form {
                Form::Fused => a.consume(thread, number),
                Form::Wide => a.consume_wide(thread, number),
            }
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
    /// Those of dK and dV.
    out_maps: [Reg<'k, u64>; 2],
    out_memory: Option<GradMemory<'k>>,
    /// Of each query its maximum, its logarithm, its delta.
    row_memory: [Reg<'k, u64>; 3],
    grad_scale: Reg<'k, f32>,
    score_params: ScoreParams<'k>,
    tiles: Tiles<'k>,
    schedule: TileSchedule<'k>,
    dq_sums: Option<DqSums<'k>>,
    /// Whose turn it is to add to each block of them, if that matters.
    dq_turns: Option<Reg<'k, u64>>,
    base: Reg<'k, u32>,
}
