//! The choice of Hopper's kernel for a problem.

use super::sm90::{Config, Store};
use super::{Mask, Problem};
use crate::kernel::Device;

/// The configuration for a problem.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    let head_dim = (problem.head_dim as u32).next_multiple_of(16);
    let value_dim = problem.value_dim as u32;
    let widest = head_dim.max(value_dim);
    let tiles = |rows: u64| problem.queries.div_ceil(rows) * problem.heads * problem.batch;
    let most = if widest <= 64 { 192 } else { 128 };
    let whole = problem.queries.min(most).next_multiple_of(64) as u32;
    // Few tiles: smaller ones, so that more multiprocessors have one.
    let few = tiles(whole.into()) * 2 <= device.multiprocessors.into();
    let rows = if few { 64 } else { whole };
    let mut config = Config {
        half: problem.half,
        out: problem.out,
        head_dim,
        value_dim,
        rows,
        keys: 16,
        stages: 2,
        slabs: 0,
        turns: rows == 128,
        mask: problem.mask(),
        scores: problem.scores,
        lengths: problem.lengths,
        lse: problem.lse,
        store: Store::Tma,
    };
    // H200, plain-PTX experiments: 176 keys were faster than 128, 160 and 192 at D = 128, and 128 than
    // 96 and 112 at D = 64, without a mask. Blocks that the mask cuts are half in vain.
    let most = if rows == 128 && config.mask == Mask::None { 176 } else { 128 };
    let fits = |keys: &u32| Config { keys: *keys, ..config }.roomy();
    config.keys = (1..=most / 16).map(|n| 16 * n).rev().find(fits).unwrap_or(16);
    let fits = |slabs: &u32| Config { slabs: *slabs, ..config }.check().is_ok();
    config.slabs = (0..=config.result_slabs()).rev().find(fits).unwrap_or(0);
    let fits = |stages: &u32| Config { stages: *stages, ..config }.check().is_ok();
    config.stages = (2..=4).rev().find(fits).unwrap_or(2);
    config
}
