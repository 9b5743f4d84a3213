//! Packed codes to elements, `scale · (decode(code) − zero)` in f32, rounded once; through shared memory, so that
//! lanes side by side store elements side by side.

use super::{Name, THREADS};
use crate::kernel::Element;
use crate::kernel::w4::nibbles::{NF4, nf4_value};
use crate::kernel::w4::weight::zero_place;
use crate::kernel::w4::{BLOCK, BLOCK_BYTES, Codes, Scheme};
use crate::ptx::{Kernel, Reg, Source, Target};

/// 2²³: a float whose last bit is 1.
const EXACT: u32 = 0x4b00_0000;

/// The kernel.
pub fn emit(scheme: &Scheme, out: Element, transposed: bool) -> Source {
    let k = &Kernel::new("w4_elements", Target::Sm80, THREADS);
    // Without a bound ptxas takes so few registers that it spills.
    k.blocks_per_sm(4);
    let codes = k.pointer(Name::Codes);
    let (scales, scale_line) = (k.pointer(Name::Scales), k.param::<u64>(Name::ScaleLine));
    let zeros = scheme.zeros.then(|| (k.pointer(Name::Zeros), k.param::<u64>(Name::ZeroLine)));
    let (to, line) = (k.pointer(Name::Out), k.param::<u64>(Name::OutLine));
    let (rows, cols) = (k.param::<u32>(Name::K), k.param::<u32>(Name::N));
    let tile = Tile::new(out, transposed);
    let base = k.shared(tile.bytes() + 4 * NF4.len() as u32);
    let table = base + tile.bytes();
    let (kb, nb, thread) = (k.block_x(), k.block_y(), k.thread());
    let (warp, lane) = (thread / 32, thread % 32);

    let block = nb.mul_wide(rows.div_ceil(BLOCK)) + kb.wide();
    let from = codes + block * u64::from(BLOCK_BYTES);
    let words = k.ld_global_nc::<u32, 4>(from.element(thread, 16));
    if scheme.codes == Codes::Nf4 {
        k.if_(thread.lt(NF4.len() as u32), || {
            k.st_shared(table + thread * 4, [nf4_value(k, thread)]);
        });
        k.sync_block();
    }

    // The lane's two columns, and how much of the sums of a group each subtracts and is multiplied by.
    let columns = [0, 8].map(|more| warp * 16 + lane / 4 + more);
    let group_of = |step: u32| match scheme.group {
        None => k.var(0u32),
        Some(group) => ((kb * BLOCK + step * 16) / group).min((rows - 1) / group),
    };
    let of_group = |step: u32| {
        let group = group_of(step).wide();
        columns.map(|column| {
            let column = (nb * BLOCK + column).min(cols - 1);
            let at = scales + (group * scale_line + column.wide()) * u64::from(scheme.scale.size());
            let scale = match scheme.scale {
                Element::F32 => k.ld_global_nc::<f32, 1>(at)[0],
                Element::Half(half) => k.widen(half, k.ld_global_nc::<u16, 1>(at)[0]),
            };
            let zero = match (scheme.codes, zeros) {
                (Codes::Nf4, _) => None,
                (Codes::Int8 | Codes::E4m3, _) => unreachable!("bytes are not packed"),
                (Codes::Int4, None) => Some(k.var(EXACT | 8)),
                (Codes::Int4, Some((zeros, line))) => {
                    let at = zeros + (group * line + zero_place(column).wide());
                    Some(k.ld_global_nc_u8(at) | EXACT)
                }
            };
            (scale, zero.map(|zero| zero.cast::<f32>()))
        })
    };
    let mut groups = of_group(0);
    for (step, &word) in (0..4u32).zip(&words) {
        let begins = scheme.group.is_some_and(|rows| step > 0 && (step * 16).is_multiple_of(rows));
        if begins {
            groups = of_group(step);
        }
        for pair in 0..4u32 {
            let (right, below) = (pair % 2, pair / 2 * 8);
            let (scale, zero) = groups[right as usize];
            let values = scheme.codes.bits(pair).map(|bit| {
                let code = word.bfe(bit, 4);
                let value = match zero {
                    Some(zero) => (code | EXACT).cast::<f32>() - zero,
                    None => k.ld_shared::<f32, 1>(table + code * 4)[0],
                };
                value * scale
            });
            let row = lane % 4 * 2 + (step * 16 + below);
            tile.write(base, row, columns[right as usize], values);
        }
    }
    k.sync_block();
    let (lines, length) = if transposed { (cols, rows) } else { (rows, cols) };
    let (at, along) = if transposed { (nb, kb) } else { (kb, nb) };
    tile.store(base, thread, (to, line), [at * BLOCK, along * BLOCK], [lines, length]);
    k.finish()
}

/// A block's elements in shared memory.
#[derive(Clone, Copy)]
struct Tile {
    out: Element,
    transposed: bool,
}

impl Tile {
    fn new(out: Element, transposed: bool) -> Self {
        Self { out, transposed }
    }

    /// Bytes from line to line: an odd number of 16, and such that pairs of lines are in different banks.
    fn pitch(self) -> u32 {
        BLOCK * self.out.size() + 16
    }

    fn bytes(self) -> u32 {
        BLOCK * self.pitch()
    }

    /// Two elements of rows that follow each other.
    fn write<'k>(
        self,
        base: Reg<'k, u32>,
        row: Reg<'k, u32>,
        column: Reg<'k, u32>,
        values: [Reg<'k, f32>; 2],
    ) {
        let k = base.kernel();
        let size = self.out.size();
        let (line, along) = if self.transposed { (column, row) } else { (row, column) };
        let at = base + (line * self.pitch() + along * size);
        let next = self.pitch().into();
        let [a, b] = values;
        match (self.out, self.transposed) {
            (Element::F32, true) => k.st_shared(at, values),
            (Element::F32, false) => {
                k.st_shared(at, [a]);
                k.st_shared(at.at(next), [b]);
            }
            (Element::Half(half), true) => k.st_shared(at, [k.cvt_rn_x2(half, a, b)]),
            (Element::Half(half), false) => {
                k.st_shared(at, [k.cvt_rn(half, a)]);
                k.st_shared(at.at(next), [k.cvt_rn(half, b)]);
            }
        }
    }

    /// Stores all of them that the matrix has: 16 bytes at once where its lines begin at such multiples, and have a
    /// multiple of as many.
    fn store<'k>(
        self,
        base: Reg<'k, u32>,
        thread: Reg<'k, u32>,
        (to, pitch): (Reg<'k, u64>, Reg<'k, u64>),
        [first_line, first]: [Reg<'k, u32>; 2],
        [lines, length]: [Reg<'k, u32>; 2],
    ) {
        let k = base.kernel();
        let size = self.out.size();
        let unit = self.out.per_chunk();
        let of_line = BLOCK / unit;
        let whole = ((length | pitch.low()) % unit).eq(0);
        k.for_(thread, BLOCK * of_line, THREADS, |i| {
            let (line, along) = (i / of_line, i % of_line * unit);
            let from = base + (line * self.pitch() + along * size);
            let (line, along) = (first_line + line, first + along);
            let at = to + (line.wide() * pitch + along.wide()) * u64::from(size);
            let inside = line.lt(lines);
            let chunk = k.ld_shared::<u32, 4>(from);
            k.if_else(
                whole,
                || k.when(inside & along.lt(length), || k.st_global(at, chunk)),
                || {
                    for one in 0..unit {
                        let here = (one * size).into();
                        let there = inside & (along + one).lt(length);
                        match self.out {
                            Element::F32 => {
                                k.when(there, || k.st_global(at.at(here), [chunk[one as usize]]));
                            }
                            Element::Half(_) => {
                                let [x] = k.ld_shared::<u16, 1>(from.at(here));
                                k.when(there, || k.st_global(at.at(here), [x]));
                            }
                        }
                    }
                },
            );
        });
    }
}
