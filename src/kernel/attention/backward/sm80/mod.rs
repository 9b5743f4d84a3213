//! The gradients on every GPU from Ampere on. Passes over all pairs of a query and a key rebuild the probabilities,
//! each for other gradients:
//!
//! ```text
//! rows      columns   a block of columns                            sums in registers
//! keys      queries   Sᵀ = K·Qᵀ   dPᵀ = V·dOᵀ   Pᵀ, dSᵀ in pairs   dV += Pᵀ·dO   dK += dSᵀ·Q
//!                                               shares of dQ = dS·K, added up in memory
//! queries   keys      S  = Q·Kᵀ   dP  = dO·Vᵀ   dS in pairs         dQ += dS·K
//! queries   keys      S  = Q·Kᵀ   dP  = dO·Vᵀ   of all sequences    dbias += dS
//!                                               and heads that share a bias
//! ```
//!
//! As in the forward pass, warps have tiles of 16 rows, and multiply with `mma.sync` what `cp.async` brought to
//! shared memory. A fragment of sums is the left operand of the next product as it is, so that neither P nor dS
//! leaves registers. Where a thread has no registers for both dK and dV, each takes a pass. Shares of dQ come in
//! whatever order, so that only those of heads of 64 and 128 elements, in 16 bits, without a bias, and where rounding may differ
//! from run to run, save the pass over tiles of queries.

mod bias;
mod choose;
mod config;
mod pass;
mod scores;
mod shares;
mod store;

pub use choose::{bias, choose};
pub use config::{Config, KeySums, Pass};

use super::Side;
use super::sums::{self, DqSums};
use super::work::Tiles;
use crate::kernel::ampere::copies::Operand;
use crate::kernel::attention::Name;
use crate::kernel::attention::scores::ScoreParams;
use crate::ptx::{Kernel, Reg, Source, Target};
use config::SharedMap;
use store::Destination;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Its parameters are those of [`Name`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("attention_backward", Target::Sm80, config.threads());
    k.blocks_per_sm(config.blocks_per_sm);
    let q = Operand::params(k, [Name::Q, Name::QRow, Name::QHead, Name::QBatch]);
    let key = Operand::params(k, [Name::K, Name::KRow, Name::KHead, Name::KBatch]);
    let v = || Operand::params(k, [Name::V, Name::VRow, Name::VHead, Name::VBatch]);
    let v = config.pass.has_score_grads().then(v);
    let grad = Operand::params(k, [Name::Grad, Name::GradRow, Name::GradHead, Name::GradBatch]);
    let (left, right) = match config.pass.side() {
        Side::Keys => ([Some(key), v], [q, grad]),
        Side::Queries => ([Some(q), Some(grad)], [key, v.expect("it has gradients of scores")]),
    };
    let names = [Name::RowMax, Name::RowLog, Name::Delta];
    let numbers = if config.pass.has_score_grads() { &names[..] } else { &names[..2] };
    let numbers = numbers.iter().map(|&name| k.pointer(name)).collect();
    let tile_shape = config.tile_shape(1);
    let score_params = ScoreParams::params(k, config.variant.score_mod, config.element);
    let out = Destination::params(k, config.pass);
    let tiles = Tiles::params(k, tile_shape);
    let dq_sums = config.pass.shares_queries().then(|| {
        let bytes = sums::BLOCK * config.variant.head_dim * 4;
        let lengths = config.variant.lengths;
        DqSums::params(k, lengths, [sums::BLOCK, bytes], tiles.size[0], tiles.sequences())
    });
    let smem = config.smem();
    let base = k.shared(smem.bytes);
    let g = Gradients {
        k,
        c: config,
        smem,
        base,
        left,
        right,
        numbers,
        score_params,
        out,
        tiles,
        dq_sums,
    };
    match config.pass {
        Pass::Keys(_) | Pass::Queries => g.run(),
        Pass::Bias { pairs, shared } => g.run_bias(pairs, shared),
    }
    k.finish()
}

struct Gradients<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    smem: SharedMap,
    base: Reg<'k, u32>,
    /// What rows and columns are of: as wide as a key, as wide as a value.
    left: [Option<Operand<'k>>; 2],
    right: [Operand<'k>; 2],
    /// Of each query what is subtracted from its scores, the logarithm and the delta: f32
    /// `[batch, heads, queries]`.
    numbers: Vec<Reg<'k, u64>>,
    score_params: ScoreParams<'k>,
    /// Where sums as wide as a key go, and such as wide as a value.
    out: [Option<Destination<'k>>; 2],
    tiles: Tiles<'k>,
    dq_sums: Option<DqSums<'k>>,
}
