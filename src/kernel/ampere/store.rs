//! Rows of accumulators, stored by the threads that have them.

use crate::kernel::Element;
use crate::ptx::{Reg, Value};

/// Stores a row, of which this lane has the pairs from column `2 · (lane % 4)` of each 8 on, if it is `inside`.
/// `at` gives the address of a column.
pub fn store_row<'k>(
    out: Element,
    pairs: &[[Reg<'k, f32>; 2]],
    lane: Reg<'k, u32>,
    inside: Reg<'k, bool>,
    at: impl Fn(Reg<'k, u32>) -> Reg<'k, u64>,
) {
    let (k, size) = (lane.kernel(), out.size());
    let bytes = |col: usize| (col * size as usize) as i64;
    let col = lane % 4 * 2;
    match out {
        Element::F32 => {
            let at = at(col);
            k.if_(inside, || {
                for (j, &pair) in pairs.iter().enumerate() {
                    k.st_global(at.at(bytes(8 * j)), pair);
                }
            });
        }
        Element::Half(half) => {
            let pairs: Vec<_> = pairs.iter().map(|&[a, b]| k.cvt_rn_x2(half, a, b)).collect();
            // Even lanes take both lanes' pairs of 8 columns, odd ones those of the next 8: the four lanes of
            // a row store 32 bytes together.
            let odd = (lane % 2).ne(0);
            let both = pairs.chunks_exact(2);
            let rest = both.remainder();
            let quads: Vec<_> = both
                .map(|pair| {
                    let kept = k.select(odd, pair[1], pair[0]);
                    let got = k.shfl_bfly(k.select(odd, pair[0], pair[1]), 1);
                    [k.select(odd, got, kept), k.select(odd, kept, got)]
                })
                .collect();
            let first = at(col + lane % 2 * 6);
            let last = rest.first().map(|&pair| (pair, at(col)));
            k.if_(inside, || {
                for (j, &quad) in quads.iter().enumerate() {
                    k.st_global(first.at(bytes(16 * j)), quad);
                }
                if let Some((pair, last)) = last {
                    k.st_global(last.at(bytes(16 * quads.len())), [pair]);
                }
            });
        }
    }
}

/// Stores a row of `dim` columns of [`add_lines`](super::tf32x3::add_lines): of each 32 this lane has eight that
/// follow each other, the first four of them the first ones of four pairs.
pub fn store_tf32x3_row<'k>(
    dim: Value<'k, u32>,
    pairs: &[[Reg<'k, f32>; 2]],
    lane: Reg<'k, u32>,
    inside: Reg<'k, bool>,
    at: impl Fn(Reg<'k, u32>) -> Reg<'k, u64>,
) {
    let k = lane.kernel();
    let col = lane % 4 * 8;
    let at = at(col);
    for (panel, pairs) in (0..).zip(pairs.chunks(4)) {
        let first = panel * 32;
        let inside = match dim {
            Value::Literal(dim) if first + 32 <= dim => inside,
            Value::Literal(dim) => inside & col.lt(dim - first),
            Value::Reg(dim) => inside & (col + first).lt(dim),
        };
        k.if_(inside, || {
            for half in 0..2 {
                let to = at.at((4 * (first + 4 * half)).into());
                let quad: [_; 4] = std::array::from_fn(|j| pairs[j][half as usize]);
                k.st_global(to, quad);
            }
        });
    }
}
