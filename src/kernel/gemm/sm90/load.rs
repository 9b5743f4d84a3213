//! The producer: one thread that keeps the ring of stages full.

use super::Gemm;
use super::config::{Boxes, DEPTH, LINE, Orient};
use crate::kernel::gemm::Major;
use crate::kernel::gemm::share::Share;
use crate::ptx::{Delivery, Reg};

/// An operand's part of a tile.
struct Side<'k> {
    map: Reg<'k, u64>,
    major: Major,
    boxes: Boxes,
    /// The tile's first row or column, of this block's boxes.
    outer: Reg<'k, u32>,
    /// What is added to the depth, for this block's boxes.
    deeper: Option<Reg<'k, u32>>,
    /// Whether each box shows anything of the matrix. A box outside would become zeros, slowly: what
    /// is left out only reaches sums that are not stored.
    inside: Vec<Reg<'k, bool>>,
    /// Bytes that arrive in this block for a stage.
    bytes: Reg<'k, u32>,
    /// Where the first stage of this block's boxes begins.
    to: Reg<'k, u32>,
    how: Delivery<'k>,
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
        let k = at.kernel();
        let to = stage * self.boxes.bytes + self.to;
        let depth = self.deeper.map_or(at, |more| at + more);
        for (i, &inside) in (0..self.boxes.count()).zip(&self.inside) {
            let outer = if i == 0 { self.outer } else { self.outer + i * self.boxes.step };
            let mut at = match self.major {
                Major::K => vec![depth, outer],
                Major::Outer => vec![outer, depth],
            };
            at.extend(batch.into_iter().flatten());
            let to = to.at((i * self.boxes.step_bytes()).into());
            k.when(inside, || k.tma_load(to, self.map, &at, full, self.how));
        }
    }
}

impl<'k> Gemm<'k, '_> {
    /// Fills stages for all tiles of this block.
    pub(super) fn produce(&self) {
        let (k, c) = (self.k, self.c);
        let place = self.plan.ring.producer(k, self.base);
        let pair = c.pair.then(|| (k.cluster_rank(), Delivery::Multicast(k.var(0b11u16))));
        let [lhs_limit, rhs_limit] = c.orient.order(self.size);
        self.tiles(|tile| {
            let batch = self.inner_batch.map(|inner| [tile.batch % inner, tile.batch / inner]);
            // A small left operand of a swapped product is read by all, the weights once.
            let weights = match c.orient {
                Orient::Swapped => Delivery::Once,
                Orient::Plain => Delivery::Plain,
            };
            let lhs = self.side(self.lhs, c.lhs, c.lhs_boxes(), (tile.row * c.rows, lhs_limit));
            let lhs = Side { to: self.base + self.plan.lhs, how: weights, ..lhs };
            let rhs = self.side(self.rhs, c.rhs, c.rhs_boxes(), (tile.col * c.cols, rhs_limit));
            let to = self.base + self.plan.rhs;
            let rhs = match pair {
                None => Side { to, ..rhs },
                Some((rank, both)) => self.half(Side { to, how: both, ..rhs }, rank, rhs_limit),
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

    /// An operand's part of a tile that begins at `outer`, of a matrix that ends at `limit`.
    fn side(
        &self,
        map: Reg<'k, u64>,
        major: Major,
        boxes: Boxes,
        (outer, limit): (Reg<'k, u32>, Reg<'k, u32>),
    ) -> Side<'k> {
        let left = limit.max(outer) - outer;
        let steps = left.div_ceil(boxes.step).min(boxes.steps());
        Side {
            map,
            major,
            boxes,
            outer,
            deeper: None,
            inside: (0..boxes.count()).map(|i| left.gt(i * boxes.step)).collect(),
            bytes: steps * boxes.step_bytes(),
            to: self.base,
            how: Delivery::Plain,
        }
    }

    /// The boxes of block `rank` of a pair: half of the lines, which go to both.
    fn half(&self, whole: Side<'k>, rank: Reg<'k, u32>, limit: Reg<'k, u32>) -> Side<'k> {
        let boxes = whole.boxes;
        match whole.major {
            Major::K => {
                let outer = whole.outer + rank * (boxes.count() * boxes.step);
                let left = limit.max(outer) - outer;
                Side {
                    outer,
                    inside: (0..boxes.count()).map(|i| left.gt(i * boxes.step)).collect(),
                    to: whole.to + rank * (boxes.count() * boxes.each()),
                    ..whole
                }
            }
            Major::Outer => {
                let deeper = rank * boxes.lines;
                Side { deeper: Some(deeper), to: whole.to + deeper * LINE, ..whole }
            }
        }
    }
}
