//! Sizes around the tiles, and empty ones.

use candle_core::Device;

use super::problem::{Leaves, Problem};
use super::{Sizes, grid, run};
use crate::suites::Layout::*;

/// Rows and head dimensions around the tiles, causal rows that see nothing, keys shared by 1, 2, 4
/// and all query heads.
const SIZES: [Sizes; 20] = [
    (&[], 1, [1, 1, 1, 1]),
    (&[], 1, [1, 300, 64, 64]),
    (&[], 1, [300, 1, 8, 16]),
    (&[], 1, [65, 64, 80, 80]),
    (&[1], 1, [16, 16, 16, 16]),
    (&[3], 3, [15, 16, 8, 8]),
    (&[4], 2, [17, 15, 16, 40]),
    (&[6], 1, [1, 17, 128, 64]),
    (&[1, 1], 1, [64, 257, 256, 256]),
    (&[1, 1], 1, [257, 300, 1, 128]),
    (&[1, 1], 1, [300, 300, 64, 64]),
    (&[1, 2], 1, [257, 64, 40, 1]),
    (&[1, 2], 2, [65, 63, 64, 80]),
    (&[1, 2], 2, [128, 128, 128, 128]),
    (&[1, 4], 1, [128, 127, 8, 64]),
    (&[1, 8], 2, [63, 65, 16, 16]),
    (&[2, 1], 1, [127, 128, 80, 40]),
    (&[2, 4], 1, [16, 63, 40, 8]),
    (&[2, 6], 3, [17, 65, 8, 16]),
    (&[3, 2], 2, [1, 16, 64, 64]),
];

const EMPTY: [Sizes; 10] = [
    (&[], 1, [0, 4, 8, 8]),
    (&[], 1, [3, 0, 8, 8]),
    (&[], 1, [3, 4, 8, 0]),
    (&[], 1, [0, 0, 8, 0]),
    (&[0], 0, [3, 4, 8, 8]),
    (&[0], 2, [3, 4, 8, 8]),
    (&[2, 0], 0, [3, 4, 8, 8]),
    (&[0, 4], 2, [3, 4, 8, 8]),
    (&[2, 4], 2, [0, 4, 8, 8]),
    (&[2, 4], 2, [3, 0, 8, 8]),
];

pub fn sizes(device: &Device) {
    run("flash_attn sizes", device, grid(&SIZES));
}

pub fn empty(device: &Device) {
    let layouts = [Plain, Narrowed, Rows, Columns, Expanded].map(|l| Leaves::Each([l; 3]));
    let problems = layouts.map(|leaves| grid(&EMPTY).map(move |p| Problem { leaves, ..p }));
    run("flash_attn empty", device, problems.into_iter().flatten());
}
