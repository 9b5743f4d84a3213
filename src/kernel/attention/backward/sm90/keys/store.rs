//! dK and dV of a warpgroup's keys.

use super::Backward;
use crate::kernel::attention::backward::Side;
use crate::kernel::attention::backward::sm90::store::{GradRows, GradTile};
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::attention::{Lengths, Name};
use crate::kernel::hopper::{SLAB, SLAB_BYTES, Warpgroup};
use crate::ptx::{Kernel, Reg};

/// dK and dV for threads: addresses, and strides of rows and heads in elements. The batch is one.
pub(super) struct GradMemory<'k>([[Reg<'k, u64>; 3]; 2]);

impl<'k> GradMemory<'k> {
    pub fn params(k: &'k Kernel) -> Self {
        let one = |[at, row, head]: [Name; 3]| [k.pointer(at), k.param(row), k.param(head)];
        let names =
            [[Name::DkAt, Name::DkRow, Name::DkHead], [Name::DvAt, Name::DvRow, Name::DvHead]];
        Self(names.map(one))
    }
}

/// A gradient of keys or of values.
pub(super) struct Gradient<'k, 'a> {
    /// dK (0) or dV (1).
    pub which: usize,
    pub sums: &'a [Reg<'k, f32>],
    /// Where its slabs are staged.
    pub memory: Reg<'k, u32>,
}

impl<'k> Backward<'k, '_> {
    /// Stores gradients of this warpgroup's keys, the first of which is `first`. What they are staged in can be
    /// written afterwards.
    pub(super) fn store(
        &self,
        warps: Warpgroup<'k>,
        work: &WorkTile<'k>,
        first: Reg<'k, i32>,
        gradients: &[Gradient<'k, '_>],
    ) {
        let (k, c) = (self.k, self.c);
        let row = first + (warps.lane.warp * 16 + warps.lane.lane / 4).cast();
        let positions = [row, row + 8];
        let stored = positions.map(|at| self.tiles.stored(Side::Keys, at, work.keys.count));
        let finished = |Gradient { which, sums, .. }: &Gradient<'k, '_>| {
            let finish = |(i, &sum): (usize, &Reg<'k, f32>)| {
                let sum = if *which == 0 { sum * self.grad_scale } else { sum };
                stored[i / 2 % 2].1.map_or(sum, |some| k.select(some, sum, 0.0))
            };
            sums.iter().enumerate().map(finish).collect::<Vec<_>>()
        };
        let finished: Vec<_> = gradients.iter().map(finished).collect();
        let slabs = || {
            for (Gradient { which, memory, .. }, sums) in gradients.iter().zip(&finished) {
                let tile = GradTile {
                    element: c.element,
                    group: warps,
                    map: self.out_maps[*which],
                    memory: *memory,
                    pitch: SLAB_BYTES,
                    position: work.keys.at(first),
                    head: work.head,
                    batch: work.batch,
                };
                tile.store(sums);
            }
            k.when(warps.leader, || k.tma_wait_read(0));
            warps.sync();
        };
        match &self.out_memory {
            None => slabs(),
            Some(memory) => {
                // TMA would write over the next sequence.
                debug_assert_eq!(c.lengths, Lengths::Packed);
                let rows = GradRows {
                    element: c.element,
                    lane: warps.lane,
                    head: work.head,
                    positions: positions.map(|at| work.keys.at(at)),
                    inside: stored.map(|(inside, _)| inside),
                };
                let whole = (first + SLAB as i32).le(work.keys.count);
                k.if_else(whole, slabs, || {
                    for (Gradient { which, .. }, sums) in gradients.iter().zip(&finished) {
                        rows.store(sums, memory.0[*which]);
                    }
                });
            }
        }
    }
}
