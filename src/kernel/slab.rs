//! Fragments of sums to slabs of swizzled lines, as the copy engine stores them.

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

/// Writes a slab whose lines are columns, each of the warpgroup's 64 rows: 16-bit elements in one piece,
/// f32 in two of 32 rows each. `sums` are a thread's fragments of all columns, a multiple of 16.
pub fn write_columns<'k>(
    k: &'k Kernel,
    out: Element,
    sums: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    seat: Seat<'k>,
) {
    match out {
        Element::Half(half) => write_half_columns(k, half, sums, to, seat),
        Element::F32 => write_f32_columns(k, sums, to, seat),
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
        let to = start + chunk * 16;
        let packed = std::array::from_fn(|j| match eight.get(2 * j..2 * j + 2) {
            Some(pair) => k.pack(half, pair[0], pair[1]),
            None => k.var(0),
        });
        k.stmatrix(to, packed, false);
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

fn write_half_columns<'k>(
    k: &'k Kernel,
    half: Half,
    sums: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    Seat { lane, warp }: Seat<'k>,
) {
    // Two blocks of 8 columns, of 8 rows and the 8 below them.
    let line = lane / 16 * 8 + lane % 8;
    let chunk = (warp * 2 + lane / 8 % 2) ^ (lane % 8);
    let start = to + line * LINE + chunk * 16;
    for (i, eight) in (0..).zip(sums.chunks(8)) {
        let packed = std::array::from_fn(|j| k.pack(half, eight[2 * j], eight[2 * j + 1]));
        k.stmatrix(start.at((i * 16 * LINE).into()), packed, true);
    }
}

fn write_f32_columns<'k>(
    k: &'k Kernel,
    sums: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    Seat { lane, warp }: Seat<'k>,
) {
    let row = lane / 4;
    let piece = to + warp / 2 * (sums.len() as u32 * 2 * LINE) + row % 4 * 4;
    for odd in 0..2 {
        let line = lane % 4 * 2 + odd;
        for below in 0..2 {
            let chunk = (warp % 2 * 4 + row / 4 + 2 * below) ^ line;
            let start = piece + line * LINE + chunk * 16;
            for (i, quad) in (0..).zip(sums.chunks(4)) {
                let sum = quad[(2 * below + odd) as usize];
                k.st_shared(start.at((i * 8 * LINE).into()), [sum]);
            }
        }
    }
}
