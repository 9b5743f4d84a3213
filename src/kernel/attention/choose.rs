//! The choice of Hopper's kernel for a problem.

use super::sm90::{Config, Store};
use super::{Lengths, Mask, Problem};
use crate::kernel::{Device, Element};

/// The configuration for a problem. If it splits the keys, a kernel of
/// [`combine`](super::combine) follows.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    let head_dim = (problem.head_dim as u32).next_multiple_of(16);
    let value_dim = problem.value_dim as u32;
    let pack = pack(problem);
    let sequences = match problem.lengths {
        Lengths::Full | Lengths::Padded => problem.batch,
        Lengths::Packed => 1,
    };
    // Tiles of so many warpgroups.
    let groups = problem.queries.div_ceil((64 / pack).into());
    let tiles =
        |warpgroups: u64| groups.div_ceil(warpgroups) * problem.heads / u64::from(pack) * sequences;
    let most = if head_dim.max(value_dim) <= 64 { 3 } else { 2 };
    let whole = groups.min(most);
    // Few tiles: smaller ones, so that more multiprocessors have one.
    let few = tiles(whole) * 2 <= device.multiprocessors.into();
    let warpgroups = if few { 1 } else { whole };
    // The few that are left take a while each: the time of some blocks pays for putting parts together.
    let long = problem.seen_keys(64) >= 8 * 128;
    let split =
        tiles(1) * 2 <= device.multiprocessors.into() && long && problem.lengths != Lengths::Packed;
    let mut config = Config {
        half: problem.half,
        out: if split { Element::F32 } else { problem.out },
        head_dim,
        value_dim,
        rows: 64 * warpgroups as u32,
        keys: 16,
        stages: 2,
        slabs: 0,
        turns: warpgroups == 2,
        mask: problem.mask(),
        scores: problem.scores,
        lengths: problem.lengths,
        pack,
        split,
        lse: problem.lse || split,
        store: if split { Store::Direct } else { Store::Tma },
    };
    // H200, plain-PTX experiments: 176 keys were faster than 128, 160 and 192 at D = 128, and 128 than
    // 96 and 112 at D = 64, without a mask. Blocks that the mask cuts are half in vain.
    let most = if warpgroups == 2 && config.mask == Mask::None { 176 } else { 128 };
    let fits = |keys: &u32| Config { keys: *keys, ..config }.roomy();
    config.keys = (1..=most / 16).map(|n| 16 * n).rev().find(fits).unwrap_or(16);
    if config.store == Store::Tma {
        let fits = |slabs: &u32| Config { slabs: *slabs, ..config }.check().is_ok();
        config.slabs = (0..=config.result_slabs()).rev().find(fits).unwrap_or(0);
    }
    let fits = |stages: &u32| Config { stages: *stages, ..config }.check().is_ok();
    config.stages = (2..=4).rev().find(fits).unwrap_or(2);
    config
}

/// Heads of a tile: more than one where a head alone would not fill its rows.
fn pack(problem: &Problem) -> u32 {
    let group = problem.heads / problem.kv_heads;
    // Groups of 64 rows for the heads that share keys.
    let rows = |pack: u64| problem.queries.div_ceil(64 / pack) * (group / pack);
    let best =
        (1..=group.min(64)).filter(|&pack| group.is_multiple_of(pack)).min_by_key(|&p| rows(p));
    match best {
        Some(best) if rows(best) * 10 < rows(1) * 9 => best as u32,
        _ => 1,
    }
}
