//! The choice of Hopper's kernels for a problem.

use super::super::Problem;
use super::keys::{self, Form};
use super::queries;
use crate::kernel::attention::{Lengths, Mask};
use crate::kernel::{Device, Element};

/// Heads up to this width are narrow: dK and dV leave registers for blocks of 128 queries.
const NARROW: u32 = 64;
/// Up to this width dK and dV of 64 keys fit the registers of a warpgroup.
const MIDDLE: u32 = 128;

/// The kernels for a problem of 16-bit operands: dK and dV, and dQ unless the first one makes it, too.
pub fn choose(problem: &Problem, device: &Device) -> (keys::Config, Option<queries::Config>) {
    let attention = &problem.attention;
    debug_assert!(matches!(attention.element, Element::Half(_)), "f32 is for the portable kernels");
    let width = |dim: u64| (dim as u32).next_multiple_of(8);
    let [head_dim, value_dim] = [attention.head_dim, attention.value_dim].map(width);
    let widest = head_dim.max(value_dim);
    let scores = attention.score_mod;
    // What a score modification takes of registers decides about the size of blocks, and so do both ends of a window
    // and those of sequences.
    let cut = attention.mask() == Mask::Window && attention.lengths != Lengths::Full;
    let (form, rows) = match () {
        () if scores.bias.is_some() => (Form::Wide, if widest <= MIDDLE { 64 } else { 32 }),
        () if widest > MIDDLE || (scores.softcap && widest > NARROW) => (Form::Wide, 64),
        () if scores.plain() && widest <= NARROW && !cut => (Form::Fused, 128),
        () => (Form::Fused, 64),
    };
    let keys = keys::Config {
        form,
        element: attention.element,
        head_dim,
        value_dim,
        mask: attention.mask(),
        score_mod: scores,
        lengths: attention.lengths,
        grouped: attention.heads != attention.kv_heads,
        queries: rows,
        stages: 1,
        ordered: problem.deterministic && form == Form::Fused,
    };
    // The same of blocks of keys.
    let modified = scores.bias.is_some() || (scores.softcap && widest > MIDDLE);
    let blocks = if modified && widest > NARROW { 32 } else { 64 };
    let queries = (form != Form::Fused).then(|| queries::Config {
        element: attention.element,
        head_dim,
        value_dim,
        mask: attention.mask(),
        score_mod: scores,
        lengths: attention.lengths,
        keys: blocks,
        query_stages: 1,
        key_stages: 1,
        value_stages: 1,
    });
    let limit = device.shared_per_block;
    (keys.filled(limit), queries.map(|config| config.filled(limit)))
}
