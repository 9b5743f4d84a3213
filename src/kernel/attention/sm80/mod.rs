//! Attention on every GPU from Ampere on: warps copy keys and values into two stages (`cp.async`), and
//! multiply with `mma.sync` what they load from there (`ldmatrix`), one or two strips of 16 rows of
//! queries each.
//!
//! f16 and bf16 in `multiply`, f32 in `exact`: the same walk, the same places in shared memory.
//!
//! While a block of keys is at work, the next one is on its way. A warp's softmax runs while others
//! multiply.

mod attend;
mod choose;
mod config;
mod copies;
mod exact;
mod lines;
mod multiply;
mod store;

pub use super::{Launch, MAX_LENGTH};
pub use choose::choose;
pub use config::Config;

use super::scores::Shaping;
use super::work::{Logarithms, Memory, Tiles};
use crate::ptx::{Kernel, Reg, Source, Target};
use config::Plan;
use copies::Operand;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Parameters, in order; strides are in elements:
///
/// | | type | |
/// |---|---|---|
/// | `q`, `q_row`, `q_head`, `q_batch` | address, 3 × u64 | the queries |
/// | `k`, `k_row`, `k_head`, `k_batch` | address, 3 × u64 | the keys |
/// | `v`, `v_row`, `v_head`, `v_batch` | address, 3 × u64 | the values |
/// | `out_at`, `out_row`, `out_head`, `out_batch` | address, 3 × u64 | the result; with a split f32, `[parts, batch, heads, queries, value_dim]` |
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
/// | `lengths_q`, `lengths_k` | addresses | u32. [`Lengths::Padded`](super::Lengths::Padded): of each sequence; [`Lengths::Packed`](super::Lengths::Packed): where each begins, and the last one's end |
/// | `sequences` | u32 | only for [`Lengths::Packed`](super::Lengths::Packed) |
/// | `parts` | u32 | only for a split: that of [`Launch`] |
/// | `all_heads`, `columns`, `tiles`, `section` | u32 | those of [`Launch::order`] |
///
/// Addresses and strides are multiples of 16 bytes: rows must be so far apart, not so long. The batch of
/// packed sequences is one; a bias and slopes have a batch of sequences there, too.
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention", Target::Sm80, config.threads());
    k.blocks_per_sm(config.blocks_per_sm);
    let operands = ["q", "k", "v"].map(|name| Operand::params(k, name));
    let out = Memory::params(k, config.task.split);
    let lse = config.task.lse.then(|| Logarithms::params(k, config.task.split));
    let size = [k.param("queries"), k.param("keys")];
    let heads = [k.param("heads"), k.param("group")];
    let shaping = Shaping::params(k, config.task.scores, config.element);
    let tiles = Tiles::params(k, config.into(), size, heads);
    let plan = config.plan();
    let base = k.shared(plan.bytes);
    let a = Attention { k, c: config, plan, operands, out, lse, shaping, tiles, base };
    a.run();
    k.finish()
}

struct Attention<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    plan: Plan,
    /// Queries, keys and values.
    operands: [Operand<'k>; 3],
    out: Memory<'k>,
    lse: Option<Logarithms<'k>>,
    shaping: Shaping<'k>,
    tiles: Tiles<'k>,
    base: Reg<'k, u32>,
}
