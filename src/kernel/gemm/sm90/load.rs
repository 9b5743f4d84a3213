//! The producer: one thread that keeps the ring of stages full.

use super::Gemm;
use super::config::{Boxes, DEPTH, LINE, Orient};
use crate::kernel::gemm::Major;
use crate::kernel::gemm::share::Share;
use crate::ptx::{Delivery, Reg};

/// An operand, and how it gets to this block.
#[derive(Clone, Copy)]
struct Operand<'k> {
    map: Reg<'k, u64>,
    major: Major,
    boxes: Boxes,
    /// Rows or columns of the matrix.
    extent: Reg<'k, u32>,
    /// Where the first stage begins, in shared memory.
    offset: u32,
    how: Delivery<'k>,
}

impl<'k> Operand<'k> {
    /// Rows or columns from `outer` on.
    fn rest(&self, outer: Reg<'k, u32>) -> Reg<'k, u32> {
        self.extent.max(outer) - outer
    }

    /// Whether each box shows anything of the `rest` of the matrix. A box outside would become zeros,
    /// slowly: what is left out only reaches sums that are not stored.
    fn inside(&self, rest: Reg<'k, u32>) -> Vec<Reg<'k, bool>> {
        (0..self.boxes.count()).map(|i| rest.gt(i * self.boxes.step)).collect()
    }
}

/// An operand's part of a tile.
struct Side<'k> {
    of: Operand<'k>,
    /// The tile's first row or column, of this block's boxes.
    outer: Reg<'k, u32>,
    /// What is added to the depth, for this block's boxes.
    deeper: Option<Reg<'k, u32>>,
    /// Which of this block's boxes are fetched.
    inside: Vec<Reg<'k, bool>>,
    /// Bytes that arrive in this block for a stage.
    bytes: Reg<'k, u32>,
    /// Where the first stage of this block's boxes begins.
    to: Reg<'k, u32>,
}

impl<'k> Side<'k> {
    /// One stage, `at` elements along the depth.
    fn load(
        &self,
        stage: Reg<'k, u32>,
        at: Reg<'k, u32>,
        batch: Option<[Reg<'k, u32>; 2]>,
        full: Reg<'k, u32>,
    ) {
        let Operand { map, major, boxes, how, .. } = self.of;
        let k = at.kernel();
        let to = stage * boxes.bytes + self.to;
        let depth = self.deeper.map_or(at, |more| at + more);
        for (i, &inside) in (0..).zip(&self.inside) {
            let outer = if i == 0 { self.outer } else { self.outer + i * boxes.step };
            let mut at = match major {
                Major::K => vec![depth, outer],
                Major::Outer => vec![outer, depth],
            };
            at.extend(batch.into_iter().flatten());
            let to = to.at((i * boxes.step_bytes()).into());
            k.when(inside, || k.tma_load(to, map, &at, full, how));
        }
    }

    /// The boxes of block `rank` of a pair: half of the lines, which go to both.
    fn half(self, rank: Reg<'k, u32>) -> Self {
        let Operand { major, boxes, .. } = self.of;
        match major {
            Major::K => {
                let outer = self.outer + rank * (boxes.count() * boxes.step);
                let inside = self.of.inside(self.of.rest(outer));
                let to = self.to + rank * (boxes.count() * boxes.each());
                Self { outer, inside, to, ..self }
            }
            Major::Outer => {
                let deeper = rank * boxes.lines;
                Self { deeper: Some(deeper), to: self.to + deeper * LINE, ..self }
            }
        }
    }
}

impl<'k> Gemm<'k, '_> {
    /// Fills stages for all tiles of this block.
    pub(super) fn produce(&self) {
        let (k, c) = (self.k, self.c);
        let place = self.plan.ring.producer(k, self.base);
        let rank = c.pair.then(|| k.cluster_rank());
        let [rows, cols] = c.orient.order(self.size);
        let lhs = Operand {
            map: self.lhs,
            major: c.lhs,
            boxes: c.lhs_boxes(),
            extent: rows,
            offset: self.plan.lhs,
            // A small left operand of a swapped product is read by all, the weights once.
            how: match c.orient {
                Orient::Swapped => Delivery::Once,
                Orient::Plain => Delivery::Plain,
            },
        };
        let rhs = Operand {
            map: self.rhs,
            major: c.rhs,
            boxes: c.rhs_boxes(),
            extent: cols,
            offset: self.plan.rhs,
            how: match c.pair {
                true => Delivery::Multicast(k.var(0b11u16)),
                false => Delivery::Plain,
            },
        };
        self.tiles(|tile| {
            let batch = self.inner_batch.map(|inner| [tile.batch % inner, tile.batch / inner]);
            let lhs = self.side(lhs, tile.row * c.rows);
            let rhs = self.side(rhs, tile.col * c.cols);
            let rhs = match rank {
                None => rhs,
                Some(rank) => rhs.half(rank),
            };
            let Share { first, count } = self.share();
            let at = k.var(first * DEPTH);
            let bytes = lhs.bytes + rhs.bytes;
            k.for_(0, count, 1, |_| {
                let full = place.fill(bytes);
                lhs.load(place.stage, at, batch, full);
                rhs.load(place.stage, at, batch, full);
                place.advance();
                at.increase(DEPTH);
            });
        });
    }

    /// An operand's part of a tile that begins at `outer`.
    fn side(&self, of: Operand<'k>, outer: Reg<'k, u32>) -> Side<'k> {
        let (rest, boxes) = (of.rest(outer), of.boxes);
        let steps = rest.div_ceil(boxes.step).min(boxes.steps());
        let inside = of.inside(rest);
        let bytes = steps * boxes.step_bytes();
        Side { of, outer, deeper: None, inside, bytes, to: self.base + of.offset }
    }
}
