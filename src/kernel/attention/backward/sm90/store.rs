//! From accumulators to gradients in global memory: 64 rows of a warpgroup.

use crate::kernel::Element;
use crate::kernel::hopper::store::{Direction, SlabStore};
use crate::kernel::hopper::{Lane, SLAB, SLAB_BYTES, Warpgroup};
use crate::ptx::Reg;

/// Rows that TMA stores.
pub(super) struct GradTile<'k> {
    pub element: Element,
    pub group: Warpgroup<'k>,
    /// The gradient's descriptor.
    pub map: Reg<'k, u64>,
    /// Where slabs are staged, and the bytes from one to the next.
    pub memory: Reg<'k, u32>,
    pub pitch: u32,
    /// The first row in the tensor.
    pub position: Reg<'k, u32>,
    pub head: Reg<'k, u32>,
    pub batch: Reg<'k, u32>,
}

impl<'k> GradTile<'k> {
    /// From registers to shared memory, from there by TMA, which may still read it afterwards.
    pub fn store(&self, sums: &[Reg<'k, f32>]) {
        let slabs: Vec<_> = (0..).zip(sums.chunks((SLAB / 2) as usize)).collect();
        let store = SlabStore {
            map: self.map,
            out: self.element,
            adds: false,
            direction: Direction::Rows,
            memory: self.memory,
            room: slabs.len() as u32,
            slab_bytes: self.pitch,
            box_bytes: SLAB_BYTES,
            group: self.group,
        };
        let k = self.map.kernel();
        store.run(
            &slabs,
            |(_, sums)| sums.to_vec(),
            |(number, _)| [vec![k.var(number * SLAB), self.position, self.head, self.batch]],
        );
    }
}

/// Rows that threads store, each two.
pub(super) struct GradRows<'k> {
    pub element: Element,
    pub lane: Lane<'k>,
    pub head: Reg<'k, u32>,
    /// The rows in the tensor, and whether they are its.
    pub positions: [Reg<'k, u32>; 2],
    pub inside: [Reg<'k, bool>; 2],
}

impl<'k> GradRows<'k> {
    /// Pair after pair, to an address with strides of rows and heads in elements.
    pub fn store(&self, sums: &[Reg<'k, f32>], [address, row, head]: [Reg<'k, u64>; 3]) {
        let (k, Element::Half(half)) = (address.kernel(), self.element) else {
            panic!("sums are of 16-bit operands")
        };
        let start = self.head.wide() * head + (self.lane.lane % 4 * 2).wide();
        for h in 0..2 {
            let at = address + (start + self.positions[h].wide() * row) * 2u64;
            let pairs: Vec<_> = sums.chunks(4).map(|quad| &quad[2 * h..][..2]).collect();
            k.if_(self.inside[h], || {
                for (j, pair) in (0..).zip(pairs) {
                    k.st_global(at.at(16 * j), [k.cvt_rn_x2(half, pair[0], pair[1])]);
                }
            });
        }
    }
}
