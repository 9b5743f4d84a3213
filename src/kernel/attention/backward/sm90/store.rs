//! From accumulators to dK and dV: scaled, staged, stored.

use super::Backward;
use super::attend::Group;
use super::config::DS_STAGES;
use crate::kernel::Element;
use crate::kernel::attention::backward::Side;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::attention::{Lengths, Name};
use crate::kernel::hopper::store::{Direction, SlabStore};
use crate::kernel::hopper::{SLAB, SLAB_BYTES};
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

impl<'k> Backward<'k, '_> {
    /// Stores this warpgroup's rows of dK and dV.
    pub(super) fn store(&self, g: &Group<'k>, work: &WorkTile<'k>, positions: [Reg<'k, i32>; 2]) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let rows = positions.map(|at| self.tiles.stored(Side::Keys, at, work.keys.count));
        let some = |i: usize, sum: Reg<'k, f32>| match rows[i / 2 % 2].1 {
            None => sum,
            Some(some) => k.select(some, sum, 0.0),
        };
        let scaled = |(i, &sum): (usize, &Reg<'k, f32>)| some(i, sum * self.grad_scale);
        let dk: Vec<_> = g.dk.iter().enumerate().map(scaled).collect();
        let dv: Vec<_> = g.dv.iter().enumerate().map(|(i, &sum)| some(i, sum)).collect();
        let first = work.first + (g.warps.number * SLAB).cast();
        let number = g.warps.number;
        let staged = [
            self.base + smem.ds + number * (DS_STAGES * c.ds_bytes()),
            self.base + smem.dq + number * c.dq_pitch(),
        ];
        let slabs = || {
            for (i, sums) in [&dk, &dv].into_iter().enumerate() {
                self.store_slabs(g, work, first, sums, self.out_maps[i], staged[i]);
            }
            k.when(g.warps.leader, || k.tma_wait_read(0));
            g.warps.sync();
        };
        match &self.out_memory {
            None => slabs(),
            Some(memory) => {
                // TMA would write over the next sequence.
                debug_assert_eq!(c.lengths, Lengths::Packed);
                let whole = (first + SLAB as i32).le(work.keys.count);
                k.if_else(whole, slabs, || {
                    for (i, sums) in [&dk, &dv].into_iter().enumerate() {
                        let inside = rows.map(|(inside, _)| inside);
                        self.store_rows(g, work, positions, inside, sums, memory.0[i]);
                    }
                });
            }
        }
    }

    /// Stores slab after slab: from registers to shared memory, from there by TMA.
    fn store_slabs(
        &self,
        g: &Group<'k>,
        work: &WorkTile<'k>,
        first: Reg<'k, i32>,
        sums: &[Reg<'k, f32>],
        map: Reg<'k, u64>,
        memory: Reg<'k, u32>,
    ) {
        let k = self.k;
        let slabs: Vec<_> = (0..).zip(sums.chunks((SLAB / 2) as usize)).collect();
        let store = SlabStore {
            map,
            out: self.c.element,
            direction: Direction::Rows,
            memory,
            room: slabs.len() as u32,
            slab_bytes: SLAB_BYTES,
            box_bytes: SLAB_BYTES,
            group: g.warps,
        };
        let position = work.keys.at(first);
        store.run(
            &slabs,
            |(_, sums)| sums.to_vec(),
            |(number, _)| [vec![k.var(number * SLAB), position, work.head, work.batch]],
        );
    }

    /// The threads store pair after pair.
    fn store_rows(
        &self,
        g: &Group<'k>,
        work: &WorkTile<'k>,
        positions: [Reg<'k, i32>; 2],
        inside: [Reg<'k, bool>; 2],
        sums: &[Reg<'k, f32>],
        [address, row, head]: [Reg<'k, u64>; 3],
    ) {
        let (k, Element::Half(half)) = (self.k, self.c.element) else { panic!("it was checked") };
        let start = work.head.wide() * head + (g.warps.lane.lane % 4 * 2).wide();
        for h in 0..2 {
            let at = start + work.keys.at(positions[h]).wide() * row;
            let at = address + at * 2u64;
            let pairs: Vec<_> = sums.chunks(4).map(|quad| &quad[2 * h..][..2]).collect();
            k.if_(inside[h], || {
                for (j, pair) in (0..).zip(pairs) {
                    k.st_global(at.at(16 * j), [k.cvt_rn_x2(half, pair[0], pair[1])]);
                }
            });
        }
    }
}
