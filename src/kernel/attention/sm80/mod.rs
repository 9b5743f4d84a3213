//! Attention on every GPU from Ampere on: warps copy keys and values into two stages (`cp.async`), and
//! multiply with `mma.sync` what they load from there (`ldmatrix`), one or two tiles of 16 rows of
//! queries each.
//!
//! f16 and bf16 by `ampere::product`, f32 by `ampere::tf32x3`: the same loop, the same layout of shared memory.
//!
//! While one block of keys is multiplied, the next one is copied. A warp's softmax runs while others
//! multiply.

mod attend;
mod choose;
mod config;
mod store;

pub use super::{Launch, MAX_LENGTH};
pub use choose::choose;
pub use config::Config;

use super::Name;
use super::scores::ScoreParams;
use super::work::{OutputView, RowsMemory, Tiles};
use crate::kernel::ampere::copies::Operand;
use crate::ptx::{Kernel, Reg, Source, Target};
use config::SharedMap;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention", Target::Sm80, config.threads());
    k.blocks_per_sm(config.blocks_per_sm);
    let operands = [
        [Name::Q, Name::QRow, Name::QHead, Name::QBatch],
        [Name::K, Name::KRow, Name::KHead, Name::KBatch],
        [Name::V, Name::VRow, Name::VHead, Name::VBatch],
    ]
    .map(|names| Operand::params(k, names));
    let out = OutputView::params(k, config.variant.split);
    let rows_memory = RowsMemory::params(k, &config.variant);
    let size = [k.param(Name::Queries), k.param(Name::Keys)];
    let heads = [k.param(Name::Heads), k.param(Name::Group)];
    let score_params = ScoreParams::params(k, config.variant.score_mod, config.element);
    let tiles = Tiles::params(k, config.into(), size, heads);
    let smem = config.smem();
    let base = k.shared(smem.bytes);
    let a = Attention { k, c: config, smem, operands, out, rows_memory, score_params, tiles, base };
    a.run();
    k.finish()
}

struct Attention<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    smem: SharedMap,
    /// Queries, keys and values.
    operands: [Operand<'k>; 3],
    out: OutputView<'k>,
    rows_memory: RowsMemory<'k>,
    score_params: ScoreParams<'k>,
    tiles: Tiles<'k>,
    base: Reg<'k, u32>,
}
