//! The producers: threads that keep the ring of stages full, one, or one of each warp of their warpgroup in turn.

use super::boxes::Boxes;
use super::config::Orient;
use super::packed::PackedTile;
use super::{Gemm, Left};
use crate::kernel::gemm::Major;
use crate::kernel::gemm::share::Share;
use crate::kernel::hopper::barriers::Mbarrier;
use crate::kernel::hopper::load::{StageBoxes, TmaBox};
use crate::ptx::{Delivery, Reg, Value};

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

/// An operand's part of a tile.
struct OperandTile<'k> {
    of: Operand<'k>,
    /// The tile's first row or column.
    outer: Reg<'k, u32>,
    /// Whether each box shows anything of the matrix. A box outside would become zeros, slowly: what
    /// is left out only reaches sums that are not stored.
    inside: Vec<Reg<'k, bool>>,
    /// Bytes that arrive in this block for a stage.
    bytes: Reg<'k, u32>,
    /// Where the first stage begins.
    to: Reg<'k, u32>,
}

/// The left operand's part. There is one of it.
#[allow(clippy::large_enum_variant)]
enum LeftTile<'k> {
    Matrix(OperandTile<'k>),
    Packed(PackedTile<'k>),
}

impl<'k> LeftTile<'k> {
    /// Bytes that arrive for a stage.
    fn bytes(&self) -> Reg<'k, u32> {
        match self {
            Self::Matrix(tile) => tile.bytes,
            Self::Packed(tile) => tile.bytes,
        }
    }
}

impl<'k> OperandTile<'k> {
    /// Loads one stage, `at` elements along the depth.
    fn load(
        &self,
        stage: Reg<'k, u32>,
        at: Reg<'k, u32>,
        batch: Option<[Reg<'k, u32>; 2]>,
        full: Mbarrier<'k>,
    ) {
        let Operand { map, major, boxes, how, .. } = self.of;
        let stage_boxes = StageBoxes {
            map,
            to: self.to,
            stage_bytes: boxes.bytes,
            box_bytes: boxes.each(),
            delivery: how,
        };
        let all = (0..).zip(&self.inside).map(|(i, &inside)| {
            let outer = if i == 0 { self.outer } else { self.outer + i * boxes.lines };
            let mut at = match major {
                Major::K => vec![at, outer],
                Major::Outer => vec![outer, at],
            };
            at.extend(batch.into_iter().flatten());
            TmaBox { at, inside: Some(inside) }
        });
        stage_boxes.load(stage, full, all);
    }
}

impl<'k> Gemm<'k, '_> {
    /// Fills the stages of all tiles of this block that are those of one of the producers.
    pub(super) fn produce(&self, producer: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let place = self.smem.ring.producer(k, self.base);
        let producers = c.producers();
        // Stages of the tiles before.
        let before = (producers > 1).then(|| {
            place.skip(producer);
            k.var(0u32)
        });
        let [rows, cols] = c.orient.order(self.size);
        let matrix = |map| Operand {
            map,
            major: c.lhs,
            boxes: c.lhs_boxes(),
            extent: rows,
            offset: self.smem.lhs,
            // A small left operand of a swapped product is read by all, the weights once.
            how: match c.orient {
                Orient::Swapped if !c.pingpong => Delivery::Once,
                _ => Delivery::Plain,
            },
        };
        let rhs = Operand {
            map: self.rhs,
            major: c.rhs,
            boxes: c.rhs_boxes(),
            extent: cols,
            offset: self.smem.rhs,
            how: Delivery::Plain,
        };
        self.tiles(None, |tile| {
            let (of, tile) = self.of_weight(tile);
            let batch = self.inner_batch.map(|inner| [tile.batch % inner, tile.batch / inner]);
            let lhs = match of.lhs {
                Left::Matrix(map) => {
                    LeftTile::Matrix(self.operand_tile(matrix(map), tile.row * c.rows))
                }
                Left::Packed(packed) => LeftTile::Packed(of.packed_tile(packed, tile)),
            };
            let rhs = self.operand_tile(rhs, tile.col * c.cols);
            let Share { first, count } = self.share();
            let own = before.map(|before| (producer - before) % producers);
            let first = own.map_or(first, |own| first + own);
            if let LeftTile::Packed(lhs) = &lhs {
                lhs.begin(first);
            }
            let at = k.var(first * c.depth());
            let bytes = lhs.bytes() + rhs.bytes;
            k.for_(own.map_or(0.into(), Value::from), count, producers, |_| {
                let full = place.fill(bytes);
                match &lhs {
                    LeftTile::Matrix(lhs) => lhs.load(place.stage, at, batch, full),
                    LeftTile::Packed(lhs) => {
                        lhs.load(place.stage, at / c.depth(), producers, full);
                    }
                }
                rhs.load(place.stage, at, batch, full);
                match producers {
                    1 => place.advance(),
                    _ => place.skip(k.var(producers)),
                }
                at.increase(producers * c.depth());
            });
            if let Some(before) = before {
                before.increase(count);
            }
        });
    }

    /// An operand's part of a tile, which begins at `outer`.
    fn operand_tile(&self, of: Operand<'k>, outer: Reg<'k, u32>) -> OperandTile<'k> {
        let (rest, boxes) = (of.extent.max(outer) - outer, of.boxes);
        let shown = rest.div_ceil(boxes.lines).min(boxes.count());
        OperandTile {
            of,
            outer,
            inside: (0..boxes.count()).map(|i| rest.gt(i * boxes.lines)).collect(),
            bytes: shown * boxes.each(),
            to: self.base + of.offset,
        }
    }
}
