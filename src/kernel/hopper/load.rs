//! What the producer asks TMA for: the boxes of a stage.

use super::barriers::Mbarrier;
use super::ring::Cursor;
use super::{LINE, SLAB};
use crate::ptx::{Delivery, Reg};

/// An operand's part of each stage: boxes of a tensor, one after the other in shared memory.
#[derive(Clone, Copy)]
pub struct StageBoxes<'k> {
    /// The tensor's descriptor.
    pub map: Reg<'k, u64>,
    /// Where the first stage begins.
    pub to: Reg<'k, u32>,
    /// Bytes from stage to stage.
    pub stage_bytes: u32,
    /// Bytes from box to box.
    pub box_bytes: u32,
    pub delivery: Delivery<'k>,
}

/// One box.
pub struct TmaBox<'k> {
    /// Its coordinates, innermost first.
    pub at: Vec<Reg<'k, u32>>,
    /// It is left out where this does not hold.
    pub inside: Option<Reg<'k, bool>>,
}

impl<'k> StageBoxes<'k> {
    /// Begins to load boxes into a stage; their bytes count at `full`.
    pub fn load(
        &self,
        stage: Reg<'k, u32>,
        full: Mbarrier<'k>,
        boxes: impl IntoIterator<Item = TmaBox<'k>>,
    ) {
        let k = stage.kernel();
        let stage = stage * self.stage_bytes + self.to;
        for (i, TmaBox { at, inside }) in (0..).zip(boxes) {
            let to = stage.at(i64::from(self.box_bytes) * i);
            let load = || k.tma_load(to, self.map, &at, full.address(), self.delivery);
            match inside {
                None => load(),
                Some(inside) => k.when(inside, load),
            }
        }
    }
}

/// A tile of rows of a tensor in each stage: a box for each 64 elements of the rows, which become a
/// column of swizzled lines.
pub struct TileBoxes<'k> {
    boxes: StageBoxes<'k>,
    /// The boxes' first elements.
    cols: Vec<Reg<'k, u32>>,
    /// What arrives for a stage.
    bytes: u32,
}

/// The lines of a column.
#[derive(Clone, Copy)]
pub struct BoxLines {
    /// Lines of a box.
    pub loaded: u32,
    /// Lines from one column to the next in shared memory.
    pub pitch: u32,
}

impl<'k> TileBoxes<'k> {
    /// `slabs` columns of the tensor that `map` describes; the first stage begins at `to`.
    pub fn new(map: Reg<'k, u64>, slabs: u32, lines: BoxLines, to: Reg<'k, u32>) -> Self {
        let box_bytes = lines.pitch * LINE;
        let stage_bytes = slabs * box_bytes;
        Self {
            boxes: StageBoxes { map, to, stage_bytes, box_bytes, delivery: Delivery::Plain },
            cols: (0..slabs).map(|slab| map.kernel().var(slab * SLAB)).collect(),
            bytes: slabs * lines.loaded * LINE,
        }
    }

    /// Fills the stage at `place` with the rows from `at` on: coordinates without that of the elements.
    pub fn fill(&self, place: Cursor<'k>, at: &[Reg<'k, u32>]) {
        self.fill_stage(place, at);
        place.advance();
    }

    /// The same, but stays at the stage: another ring has the same place.
    pub fn fill_stage(&self, place: Cursor<'k>, at: &[Reg<'k, u32>]) {
        let full = place.fill(place.stage.kernel().var(self.bytes));
        let boxes = self
            .cols
            .iter()
            .map(|&col| TmaBox { at: [col].iter().chain(at).copied().collect(), inside: None });
        self.boxes.load(place.stage, full, boxes);
    }
}
