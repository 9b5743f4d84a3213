//! From accumulators to dQ: scaled, staged, stored.

use super::Backward;
use super::attend::Group;
use super::config::QUERIES;
use crate::kernel::attention::Lengths;
use crate::kernel::attention::backward::Side;
use crate::kernel::attention::backward::sm90::store::{GradRows, GradTile};
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::hopper::{LINE, SLAB, SLAB_BYTES};
use crate::ptx::Reg;

impl<'k> Backward<'k, '_> {
    /// Stores this warpgroup's rows of dQ, over its queries.
    pub(super) fn store(&self, g: &Group<'k>, work: &WorkTile<'k>, positions: [Reg<'k, i32>; 2]) {
        let (k, c, smem) = (self.k, self.c, &self.smem);
        let stored = positions.map(|at| self.tiles.stored(Side::Queries, at, work.queries.count));
        let scaled = |(i, &sum): (usize, &Reg<'k, f32>)| {
            let scaled = sum * self.grad_scale;
            stored[i / 2 % 2].1.map_or(scaled, |some| k.select(some, scaled, 0.0))
        };
        let dq: Vec<_> = g.dq.iter().enumerate().map(scaled).collect();
        let first = work.first + (g.warps.number * SLAB).cast();
        let own = g.warps.number * SLAB_BYTES + g.query_place.stage * c.query_bytes();
        let tile = GradTile {
            element: c.element,
            group: g.warps,
            map: self.out_map,
            memory: self.base + smem.queries + own,
            pitch: QUERIES * LINE,
            position: work.queries.at(first),
            head: work.head,
            batch: work.batch,
        };
        let slabs = || {
            tile.store(&dq);
            // The next queries come here.
            k.when(g.warps.leader, || k.tma_wait_read(0));
        };
        match self.out_memory {
            None => slabs(),
            Some(memory) => {
                // TMA would write over the next sequence.
                debug_assert_eq!(c.lengths, Lengths::Packed);
                let whole = (first + SLAB as i32).le(work.queries.count);
                let rows = GradRows {
                    element: c.element,
                    lane: g.warps.lane,
                    head: work.head,
                    positions: positions.map(|at| work.queries.at(at)),
                    inside: stored.map(|(inside, _)| inside),
                };
                k.if_else(whole, slabs, || rows.store(&dq, memory));
            }
        }
    }
}
