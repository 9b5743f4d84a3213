//! Products of f32, on tensor cores that take 11 bits of a float: each is the sum of two such numbers, and a
//! product the sum of three (the fourth is below the last bit).
//!
//! `mma` rounds towards zero, so that a long sum in it drifts: after every few steps it is added to one
//! of rounded additions. The small products are a 2000th of it, and their drift does not matter.
//!
//! Sums become a left operand without changing lanes: what a lane has of columns `2t` and `2t + 1` is given as
//! what it would have of `t` and `t + 4`, and the right operand's lines in the same order.

use super::product::{Fragment, Lines};
use super::swizzle::{CHUNK, Fragments};
use super::tile::SwizzledTile;
use crate::ptx::{Kernel, Mma, Reg};

/// Steps of 8 after which a sum is added to the total.
const STEPS: u32 = 4;
/// Columns of a line that a lane loads together: those of as many `mma`.
const COLUMNS: usize = 4;

/// Floats as sums of two.
struct Parts<'k, const N: usize> {
    big: [Reg<'k, u32>; N],
    small: [Reg<'k, u32>; N],
}

impl<'k, const N: usize> Parts<'k, N> {
    /// `big` is rounded to 11 bits, halves away from zero; `small` is exact, and `mma` cuts off its last
    /// bit or two. (`cvt.rna.tf32` takes twice the instructions.) Of an infinity `small` is NaN.
    fn of(values: [Reg<'k, u32>; N]) -> Self {
        let big = values.map(|x| (x + 0x1000) & 0xffff_e000);
        let small = |i: usize| values[i].cast::<f32>() - big[i].cast::<f32>();
        Self { big, small: std::array::from_fn(|i| small(i).cast()) }
    }
}

/// A sum of products while it grows.
struct Sum<'k> {
    total: Option<[Reg<'k, f32>; 4]>,
    big: [Reg<'k, f32>; 4],
    small: [Reg<'k, f32>; 4],
    steps: u32,
}

impl<'k> Sum<'k> {
    fn new(k: &'k Kernel) -> Self {
        let small = k.regs();
        small.iter().for_each(|sum: &Reg<f32>| sum.set(0.0));
        Self { total: None, big: k.regs(), small, steps: 0 }
    }

    fn add(&mut self, k: &'k Kernel, left: &Parts<'k, 4>, right: &Parts<'k, 2>) {
        if self.steps == STEPS {
            *self = Self { total: Some(self.total()), big: k.regs(), small: self.small, steps: 0 };
        }
        if self.steps == 0 {
            self.big.iter().for_each(|sum| sum.set(0.0));
        }
        self.steps += 1;
        for (sum, a, b) in [
            (self.small, left.small, right.big),
            (self.big, left.big, right.big),
            (self.small, left.big, right.small),
        ] {
            k.mma_tf32(sum, Mma { a, b });
        }
    }

    fn total(&self) -> [Reg<'k, f32>; 4] {
        match self.total {
            None => self.big,
            Some(total) => std::array::from_fn(|i| total[i] + self.big[i]),
        }
    }

    /// An infinite sum is that of the big parts: the small ones of an infinity are NaN.
    fn finish(&self) -> [Reg<'k, f32>; 4] {
        let (total, small) = (self.total(), self.small);
        std::array::from_fn(|i| {
            let finite = total[i].abs().lt(f32::INFINITY);
            finite.kernel().select(finite, total[i] + small[i], total[i])
        })
    }
}

/// [`multiply_lines`](super::product::multiply_lines) for f32, of a left operand in shared memory. `serial`: the warp's lanes meet at each step, or
/// ptxas loads more of them at once than there are registers for.
pub fn multiply_lines<'k>(
    sums: &[&[Reg<'k, f32>]],
    (left, left_at): (Lines<'k>, Fragments<'k>),
    lines: Lines<'k>,
    serial: bool,
) {
    let k = lines.start.kernel();
    let right_at = lines.fragments();
    let parts = || (0..lines.tile.count / 8).map(|_| Sum::new(k)).collect::<Vec<_>>();
    let mut all: Vec<_> = sums.iter().map(|_| parts()).collect();
    for step in 0..lines.tile.steps() {
        if serial {
            k.bar_warp_sync();
        }
        let left: Vec<_> = (0..sums.len() as u32)
            .map(|block| Parts::of(k.ldmatrix(left_at.at(left.block(block, step)), false)))
            .collect();
        for block in 0..lines.tile.count / 16 {
            let right = k.ldmatrix(right_at.at(lines.block(block, step)), false);
            for (i, pair) in right.chunks(2).enumerate() {
                let right = Parts::of([pair[0], pair[1]]);
                for (sums, left) in all.iter_mut().zip(&left) {
                    sums[2 * block as usize + i].add(k, left, &right);
                }
            }
        }
    }
    for (sums, all) in sums.iter().zip(&all) {
        let all = all.iter().flat_map(Sum::finish);
        sums.iter().zip(all).for_each(|(sum, value)| sum.set(value));
    }
}

/// [`left`](super::product::left) for f32: operands of 8 columns each.
pub fn left<'k>(sums: &[Reg<'k, f32>]) -> Vec<Fragment<'k>> {
    let order = |quad: &[Reg<'k, f32>]| [0, 2, 1, 3].map(|i| quad[i].cast());
    sums.chunks(4).map(order).collect()
}

/// [`add_lines`](super::product::add_lines) for f32; a lane finds its part of lines by
/// [`SwizzledTile::quads`]. Of each 32 columns, a lane's of `mma` number `j` are `8t + j` and `8t + 4 + j`.
/// `always` is a predicate for [`Kernel::apart`].
pub fn add_lines<'k>(
    sums: &[&[Reg<'k, f32>]],
    left: &[Vec<Fragment<'k>>],
    lines: Lines<'k>,
    always: impl Fn() -> Reg<'k, bool>,
) {
    let (even, tile) = (lines.start, lines.tile);
    let k = even.kernel();
    let odd = (even ^ CHUNK) + SwizzledTile::BYTES;
    let parts = |left: &Vec<Fragment<'k>>| left.iter().map(|&p| Parts::of(p)).collect::<Vec<_>>();
    let left: Vec<_> = left.iter().map(parts).collect();
    for panel in 0..tile.panels() {
        k.apart(always(), || {
            let parts = || (0..COLUMNS).map(|_| Sum::new(k)).collect::<Vec<_>>();
            let mut all: Vec<_> = sums.iter().map(|_| parts()).collect();
            for step in 0..tile.count / 8 {
                let at = panel * tile.panel_bytes() + step * 8 * SwizzledTile::BYTES;
                let at = (at + lines.region).into();
                let rows = [even, odd].map(|row| k.ld_shared::<u32, COLUMNS>(row.at(at)));
                for j in 0..COLUMNS {
                    let right = Parts::of(rows.map(|row| row[j]));
                    for (sums, left) in all.iter_mut().zip(&left) {
                        sums[j].add(k, &left[step as usize], &right);
                    }
                }
            }
            for (sums, more) in sums.iter().zip(&all) {
                let more = more.iter().flat_map(Sum::finish);
                let first = panel as usize * 4 * COLUMNS;
                sums[first..].iter().zip(more).for_each(|(sum, more)| sum.increase(more));
            }
        });
    }
}
