//! Fragments of sums to slabs of 64 swizzled lines, as the copy engine stores them.

use super::Element;
use super::hopper::LINE;
use crate::ptx::{Half, Kernel, Reg};

/// Where a thread stands in its warpgroup.
#[derive(Clone, Copy)]
pub struct Seat<'k> {
    pub lane: Reg<'k, u32>,
    /// 0 to 3.
    pub warp: Reg<'k, u32>,
}

/// Columns of a slab: a line.
pub fn columns(out: Element) -> u32 {
    LINE / out.size()
}

/// Writes a slab. `sums` are a thread's fragments of its columns, or of the first ones, a multiple
/// of 8: what is behind them is undefined.
pub fn write<'k>(
    k: &'k Kernel,
    out: Element,
    sums: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    seat: Seat<'k>,
) {
    match out {
        Element::Half(half) => write_half(k, half, sums, to, seat),
        Element::F32 => write_f32(k, sums, to, seat),
    }
}

fn write_half<'k>(
    k: &'k Kernel,
    half: Half,
    sums: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    Seat { lane, warp }: Seat<'k>,
) {
    let start = to + (warp * 16 + lane % 16) * LINE;
    for (i, eight) in sums.chunks(8).enumerate() {
        // Two blocks of 8 columns: lanes 0 to 15 address the first, the others the second.
        let chunk = (lane / 16 + 2 * i as u32) ^ (lane % 8);
        let packed = std::array::from_fn(|j| match eight.get(2 * j..2 * j + 2) {
            Some(pair) => k.pack(half, pair[0], pair[1]),
            None => k.var(0),
        });
        k.stmatrix(start + chunk * 16, packed, false);
    }
}

fn write_f32<'k>(
    k: &'k Kernel,
    sums: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    Seat { lane, warp }: Seat<'k>,
) {
    let row = lane / 4;
    let start = to + (warp * 16 + row) * LINE + lane % 2 * 8;
    for (i, quad) in sums.chunks(4).enumerate() {
        let chunk = (lane % 4 / 2 + 2 * i as u32) ^ (row % 8);
        let at = start + chunk * 16;
        k.st_shared(at, [quad[0], quad[1]]);
        k.st_shared(at.at((8 * LINE).into()), [quad[2], quad[3]]);
    }
}
