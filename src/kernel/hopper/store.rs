//! From registers to global memory by TMA, slab after slab: fragments of accumulators become swizzled lines in
//! shared memory, which TMA stores.

use super::{LINE, Lane, Warpgroup};
use crate::kernel::Element;
use crate::ptx::{Half, Kernel, Reg};

/// Which dimension of the result a slab's lines are along.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A line is a row of the accumulators: 64 lines.
    Rows,
    /// A line is a column of the accumulators.
    Columns,
}

/// A warpgroup's way from accumulators to the tensor: room for some slabs, which are written and stored in turn.
///
/// ```text
/// all fit      wait all read · write 0 1 2 · sync · TMA 0 1 2
/// half a time  wait all read · write 0 1 · sync · TMA 0 1
///                   wait half read · write 2 3 · sync · TMA 2 3   while 0 1 are read, ...
/// ```
pub struct SlabStore<'k> {
    /// The tensor's descriptor.
    pub map: Reg<'k, u64>,
    /// Its type.
    pub out: Element,
    /// Whether slabs are added to what is there: none may overlap.
    pub adds: bool,
    pub direction: Direction,
    /// Where this warpgroup's slabs begin.
    pub memory: Reg<'k, u32>,
    /// How many there is room for: 1, or an even number unless all of the result fit.
    pub room: u32,
    /// Bytes of a slab, and of each of the boxes that make it up.
    pub slab_bytes: u32,
    pub box_bytes: u32,
    pub group: Warpgroup<'k>,
}

impl<'k> SlabStore<'k> {
    /// Stores slabs: `accumulators` gives a thread's fragments of one, `boxes` the coordinates of its boxes. What
    /// was stored may still be read from shared memory afterwards.
    pub fn run<S, P: IntoIterator<Item = Vec<Reg<'k, u32>>>>(
        &self,
        slabs: &[S],
        accumulators: impl Fn(&S) -> Vec<Reg<'k, f32>>,
        boxes: impl Fn(&S) -> P,
    ) {
        let (k, Warpgroup { lane, leader, .. }) = (self.memory.kernel(), self.group);
        let count = slabs.len() as u32;
        // All at once if they fit, else half of the memory is written while the other is read.
        let (step, pending) = match count <= self.room || self.room == 1 {
            true => (self.room.min(count), 0),
            false => (self.room / 2, 1),
        };
        for (round, batch) in (0..).zip(slabs.chunks(step as usize)) {
            let to = |i: u32| {
                self.memory + (round * step + i) % (step * (1 + pending)) * self.slab_bytes
            };
            // What was there has left its memory.
            k.when(leader, || k.tma_wait_read(if round == 0 { 0 } else { pending }));
            self.group.sync();
            for (i, slab) in (0..).zip(batch) {
                let accumulators = accumulators(slab);
                match self.direction {
                    Direction::Rows => write(k, self.out, &accumulators, to(i), lane),
                    Direction::Columns => write_columns(k, self.out, &accumulators, to(i), lane),
                }
            }
            k.fence_proxy_async();
            self.group.sync();
            for (i, slab) in (0..).zip(batch) {
                for (j, at) in (0..).zip(boxes(slab)) {
                    let from = to(i).at(j * i64::from(self.box_bytes));
                    k.when(leader, || match self.adds {
                        true => k.tma_reduce_add(self.map, &at, from),
                        false => k.tma_store(self.map, &at, from),
                    });
                }
            }
            k.when(leader, || k.tma_commit());
        }
    }
}

/// Columns of a slab: a line.
pub fn columns(out: Element) -> u32 {
    LINE / out.size()
}

/// Writes a slab. `accumulators` are a thread's fragments of its columns, or of the first ones, a multiple
/// of 8: what follows them is undefined.
pub fn write<'k>(
    k: &'k Kernel,
    out: Element,
    accumulators: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    lane: Lane<'k>,
) {
    match out {
        Element::Half(half) => write_half(k, half, accumulators, to, lane),
        Element::F32 => write_f32(k, accumulators, to, lane),
    }
}

/// Writes a slab whose lines are columns, each of the warpgroup's 64 rows: 16-bit elements in one piece,
/// f32 in two of 32 rows each. `accumulators` are a thread's fragments of all columns, a multiple of 16.
pub fn write_columns<'k>(
    k: &'k Kernel,
    out: Element,
    accumulators: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    lane: Lane<'k>,
) {
    match out {
        Element::Half(half) => write_half_columns(k, half, accumulators, to, lane),
        Element::F32 => write_f32_columns(k, accumulators, to, lane),
    }
}

fn write_half<'k>(
    k: &'k Kernel,
    half: Half,
    accumulators: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    Lane { lane, warp }: Lane<'k>,
) {
    let start = to + (warp * 16 + lane % 16) * LINE;
    for (i, eight) in accumulators.chunks(8).enumerate() {
        // Two blocks of 8 columns: lanes 0 to 15 address the first, the others the second.
        let chunk = (lane / 16 + 2 * i as u32) ^ (lane % 8);
        let to = start + chunk * 16;
        let packed = std::array::from_fn(|j| match eight.get(2 * j..2 * j + 2) {
            Some(pair) => k.cvt_rn_x2(half, pair[0], pair[1]),
            None => k.var(0),
        });
        k.stmatrix(to, packed, false);
    }
}

fn write_f32<'k>(
    k: &'k Kernel,
    accumulators: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    Lane { lane, warp }: Lane<'k>,
) {
    let row = lane / 4;
    let start = to + (warp * 16 + row) * LINE + lane % 2 * 8;
    for (i, quad) in accumulators.chunks(4).enumerate() {
        let chunk = (lane % 4 / 2 + 2 * i as u32) ^ (row % 8);
        let at = start + chunk * 16;
        k.st_shared(at, [quad[0], quad[1]]);
        k.st_shared(at.at((8 * LINE).into()), [quad[2], quad[3]]);
    }
}

fn write_half_columns<'k>(
    k: &'k Kernel,
    half: Half,
    accumulators: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    lane: Lane<'k>,
) {
    let pair = |pair: &[Reg<'k, f32>]| k.cvt_rn_x2(half, pair[0], pair[1]);
    let packed: Vec<_> = accumulators.chunks(2).map(pair).collect();
    write_packed_columns(k, &packed, to, lane);
}

/// [`write_columns`] of 16-bit elements that are packed in pairs, as a left operand is.
pub fn write_packed_columns<'k>(
    k: &'k Kernel,
    packed: &[Reg<'k, u32>],
    to: Reg<'k, u32>,
    Lane { lane, warp }: Lane<'k>,
) {
    // Two blocks of 8 columns, of 8 rows and the 8 below them.
    let line = lane / 16 * 8 + lane % 8;
    let chunk = (warp * 2 + lane / 8 % 2) ^ (lane % 8);
    let start = to + line * LINE + chunk * 16;
    for (i, four) in (0..).zip(packed.chunks(4)) {
        let four = four.try_into().expect("columns are a multiple of 16");
        k.stmatrix(start.at((i * 16 * LINE).into()), four, true);
    }
}

fn write_f32_columns<'k>(
    k: &'k Kernel,
    accumulators: &[Reg<'k, f32>],
    to: Reg<'k, u32>,
    Lane { lane, warp }: Lane<'k>,
) {
    let row = lane / 4;
    let piece = to + warp / 2 * (accumulators.len() as u32 * 2 * LINE) + row % 4 * 4;
    for odd in 0..2 {
        let line = lane % 4 * 2 + odd;
        for below in 0..2 {
            let chunk = (warp % 2 * 4 + row / 4 + 2 * below) ^ line;
            let start = piece + line * LINE + chunk * 16;
            for (i, quad) in (0..).zip(accumulators.chunks(4)) {
                let sum = quad[(2 * below + odd) as usize];
                k.st_shared(start.at((i * 8 * LINE).into()), [sum]);
            }
        }
    }
}
