//! Views of all kinds as q, k, v and bias, and as the upstream gradient.

use candle_core::DType::{F16, F32};
use candle_core::Device;

use super::options::{Bias, Options};
use super::problem::{Leaves, Loss, Problem};
use super::{SMALL, Sizes, grid, run};
use crate::suites::Layout::{self, *};

/// Views of all kinds, also of one tensor as q, k and v.
pub fn layouts(device: &Device) {
    let ranks: [Sizes; 3] = [(&[], 1, [9, 13, 8, 24]), (&[4], 2, [9, 13, 8, 24]), SMALL];
    let each = Layout::ALL.into_iter().flat_map(|l| {
        let mixed = [[l, Plain, Plain], [Plain, l, Transposed], [Narrowed, Expanded, l]];
        mixed.into_iter().chain([[l; 3]]).map(Leaves::Each)
    });
    let each = each.flat_map(|leaves| grid(&ranks).map(move |p| Problem { leaves, ..p }));
    let square = grid(&[(&[2, 3], 3, [17, 17, 16, 16])]);
    let one = [Leaves::Fused, Leaves::Shared].into_iter();
    let one = one.flat_map(|leaves| square.clone().map(move |p| Problem { leaves, ..p }));
    run("flash_attn layouts", device, each.chain(one));
}

/// Upstream gradients and views of all kinds through the other layout and a bias.
pub fn option_layouts(device: &Device) {
    let options = |i: usize| Options {
        bshd: i.is_multiple_of(2),
        causal: i.is_multiple_of(3),
        wide: i.is_multiple_of(5),
        bias: i.is_multiple_of(4).then(Bias::default),
        ..Options::default()
    };
    let ranks: [Sizes; 3] = [(&[], 1, [9, 13, 8, 24]), (&[4], 2, [9, 13, 8, 24]), SMALL];
    let mut problems = vec![];
    for p in grid(&ranks) {
        for (i, layout) in Layout::ALL.into_iter().enumerate() {
            let leaves = Leaves::Each([layout, Layout::ALL[(i + 2) % 8], Layout::ALL[(i + 5) % 8]]);
            let loss = [Loss::Weighted, Loss::Sum, Loss::Transposed, Loss::Cast(F16)][i % 4];
            problems.push(Problem { leaves, loss, options: options(i), ..p.clone() });
        }
    }
    for p in grid(&[(&[2, 3], 3, [17, 17, 16, 16])]) {
        for leaves in [Leaves::Fused, Leaves::Shared] {
            problems.push(Problem { leaves, options: options(0), ..p.clone() });
        }
    }
    run("flash_attn option layouts", device, problems);
}

/// Upstream gradients of several forms, and each input alone tracked.
pub fn upstream(device: &Device) {
    let losses = [Loss::Weighted, Loss::Sum, Loss::Transposed, Loss::Cast(F16), Loss::Cast(F32)];
    let tracked = [[true; 3], [true, false, false], [false, true, false], [false, false, true]];
    let problems = losses.into_iter().flat_map(|loss| {
        tracked.map(|tracked| grid(&[SMALL]).map(move |p| Problem { loss, tracked, ..p }))
    });
    run("flash_attn upstream", device, problems.flatten());
}
