//! Elements in their own type over a power of two, such that f16 can have some times as much of each.

use super::{BYTES, Name, THREADS, Weight};
use crate::kernel::Element;
use crate::ptx::{Reg, Source};

/// The least of largest magnitudes that leave f16 its digits.
pub const NEAREST: f32 = 1.0 / 256.0;
/// The largest that f16 has, roundings included.
pub const FARTHEST: f32 = 32_768.0;

/// The power of two of the largest magnitude if f16 has not `farthest` times that, or few digits of it; else 1, as of what is not
/// finite.
fn power<'k>(peak: Reg<'k, f32>, farthest: u32) -> Reg<'k, f32> {
    const INFINITY: u32 = 0x7f80_0000;
    let k = peak.kernel();
    let element = peak * farthest as f32;
    let stays = element.ge(NEAREST) & element.le(FARTHEST);
    let none = peak.eq(0.0) | peak.cast::<u32>().ge(INFINITY);
    let power = (peak.cast::<u32>() & INFINITY).cast::<f32>().max(f32::MIN_POSITIVE);
    k.select(stays | none, k.var(1f32), power)
}

/// A thread has four elements that follow each other.
pub(super) fn emit(weight: &Weight, farthest: u32) -> Source {
    let k = weight.k;
    let (codes, scales) = (k.pointer(Name::Codes), k.pointer(Name::Scales));
    let all = weight.rows * weight.cols;
    let first = (k.block_x() * THREADS + k.thread()) * BYTES;
    k.if_(first.lt(all), || {
        let always = first.lt(all);
        let [below, above] = weight.range(k.var(0u32), always);
        let scale = power(above.max(below), farthest);
        let quotients = [0, 1, 2, 3].map(|i| {
            // Past the end the last one again.
            let place = (first + i).min(all - 1);
            let row = place / weight.cols;
            let col = place - row * weight.cols;
            weight.load(weight.address(row, col), always) / scale
        });
        k.when(first.eq(0), || k.st_global(scales, [scale]));
        let to = codes.element(first, weight.element.size());
        match weight.element {
            Element::F32 => k.st_global(to, quotients),
            Element::Half(half) => k.st_global(to, quotients.map(|x| k.cvt_rn(half, x))),
        }
    });
    k.finish()
}
