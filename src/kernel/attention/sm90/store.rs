//! From sums to the result: normalised, staged, stored.

use super::attend::Group;
use super::{Attention, Memory, Work};
use crate::kernel::hopper::{SLAB, SLAB_BYTES, WARPGROUP};
use crate::kernel::{Element, slab};
use crate::ptx::Reg;

impl<'k> Attention<'k, '_> {
    /// A tile's result, of this warpgroup.
    pub(super) fn store(&self, g: &Group<'k>, work: &Work<'k>) {
        let (k, c) = (self.k, self.c);
        let rows = g.softmax.finish();
        let first = work.first + (g.number * SLAB).cast();
        let mine = first + (g.seat.warp * 16 + g.seat.lane / 4).cast();
        let sums: Vec<_> =
            g.sums.iter().enumerate().map(|(i, &sum)| sum * rows.inverse[i / 2 % 2]).collect();
        if let Some(map) = self.out_map {
            self.store_slabs(g, work, map, first, &sums);
        }
        if let Some(memory) = self.out_memory {
            self.store_rows(g, work, memory, mine, &sums);
        }
        if let Some(lse) = self.lse {
            let writes = (g.seat.lane % 4).eq(0);
            let head =
                (work.batch * self.heads[0] + work.head).mul_wide(self.size[0].cast::<u32>());
            for (h, &value) in (0..).zip(&rows.lse) {
                let row = mine + 8 * h;
                let at = (lse + head * 4u64).element(row.cast(), 4);
                k.when(writes & row.lt(work.queries), || k.st_global(at, [value]));
            }
        }
        debug_assert!(c.value_dim.is_multiple_of(8));
    }

    /// Slab after slab: registers to shared memory, from there by the copy engine.
    fn store_slabs(
        &self,
        g: &Group<'k>,
        work: &Work<'k>,
        map: Reg<'k, u64>,
        first: Reg<'k, i32>,
        sums: &[Reg<'k, f32>],
    ) {
        let (k, c) = (self.k, self.c);
        let staged = self.staged(g);
        let (count, there) = match c.slabs {
            0 => (c.result_slabs(), c.head_slabs()),
            slabs => (c.result_slabs(), slabs),
        };
        // All at once if they fit, else half of the memory is written while the other is read.
        let (step, pending) = match count <= there || there == 1 {
            true => (count.min(there), 0),
            false => (there / 2, 1),
        };
        let slabs: Vec<_> = sums.chunks((c.slab_cols() / 2) as usize).collect();
        for (batch, slabs) in (0..).zip(slabs.chunks(step as usize)) {
            let to =
                |i: usize| staged + (batch * step + i as u32) % (step * (1 + pending)) * SLAB_BYTES;
            // What was there has left its memory.
            let pending = if batch == 0 { 0 } else { pending };
            k.when(g.leader, || k.tma_wait_read(pending));
            k.barrier_at(g.number + 1, WARPGROUP);
            for (i, sums) in slabs.iter().enumerate() {
                slab::write(k, c.out, sums, to(i), g.seat);
            }
            k.fence_proxy_async();
            k.barrier_at(g.number + 1, WARPGROUP);
            for i in 0..slabs.len() {
                let col = k.var((batch * step + i as u32) * c.slab_cols());
                let at = [col, first.cast(), work.head, work.batch];
                let from = to(i);
                k.when(g.leader, || k.tma_store(map, &at, from));
            }
            k.when(g.leader, || k.tma_commit());
        }
        if c.slabs == 0 {
            // The next queries come here.
            k.when(g.leader, || k.tma_wait_read(0));
        }
    }

    /// Pair after pair, by the threads.
    fn store_rows(
        &self,
        g: &Group<'k>,
        work: &Work<'k>,
        memory: Memory<'k>,
        mine: Reg<'k, i32>,
        sums: &[Reg<'k, f32>],
    ) {
        let (k, c) = (self.k, self.c);
        let size = c.out.size();
        let start = work.batch.wide() * memory.batch + work.head.wide() * memory.head;
        let col = g.seat.lane % 4 * 2;
        for h in 0..2 {
            let row = mine + 8 * h;
            let at = start + row.cast::<u32>().wide() * memory.row + col.wide();
            let at = memory.address + at * u64::from(size);
            let sums: Vec<_> = sums.chunks(4).map(|quad| &quad[2 * h as usize..][..2]).collect();
            k.if_(row.lt(work.queries), || {
                for (j, pair) in sums.iter().enumerate() {
                    let to = at.at(8 * j as i64 * i64::from(size));
                    match c.out {
                        Element::F32 => k.st_global(to, [pair[0], pair[1]]),
                        Element::Half(half) => {
                            k.st_global(to, [k.pack(half, pair[0], pair[1])]);
                        }
                    }
                }
            });
        }
    }
}
