//! A thread's copies of an operand into the stages.

use super::layout::Layout;
use crate::kernel::gemm::Major;
use crate::ptx::{Address, Factor, Kernel, Reg, Value};

/// An operand in global memory.
#[derive(Clone, Copy)]
pub struct Operand<'k> {
    pub layout: Layout,
    pub address: Reg<'k, u64>,
    /// Elements between lines.
    pub line: Reg<'k, u64>,
    /// Rows of `A` or columns of `B`, and the first of this tile.
    pub extent: Reg<'k, u32>,
    pub first: Reg<'k, u32>,
    /// K.
    pub depth: Reg<'k, u32>,
}

/// One thread's copies of each stage of an operand.
pub struct Copies<'k> {
    /// The lines that the thread copies; they move along the depth.
    pointers: Vec<Reg<'k, u64>>,
    /// Bytes from a tile of the depth to the next.
    stride: Value<'k, u64>,
    each: Vec<Each<'k>>,
    /// The address in stage 0 to which their offsets are added.
    to: Reg<'k, u32>,
}

/// A copy in any stage.
struct Each<'k> {
    from: Address<'k, u64>,
    /// Bytes from the thread's first address in a stage.
    to: u32,
    /// Whether it is for this thread and begins in the operand.
    valid: Option<Reg<'k, bool>>,
    /// How many bytes are in the operand where the tile of the depth is the last one.
    last_bytes: Reg<'k, u32>,
}

/// A copy of 16 bytes, if `valid`.
#[derive(Clone, Copy)]
pub struct Copy16<'k> {
    from: Address<'k, u64>,
    to: Address<'k, u32>,
    valid: Option<Reg<'k, bool>>,
}

impl<'k> Copy16<'k> {
    /// Emits it: `bytes` are read, and the rest is zeros.
    pub fn emit(&self, k: &'k Kernel, bytes: impl Into<Value<'k, u32>>) {
        let copy = || k.cp_async(self.to, self.from, bytes);
        match self.valid {
            Some(valid) => k.when(valid, copy),
            None => copy(),
        }
    }
}

/// `all - from`, at least 0.
fn left<'k>(all: Reg<'k, u32>, from: Reg<'k, u32>) -> Reg<'k, u32> {
    all - from.min(all)
}

/// Bytes of a copy of which `left` elements are left.
fn bytes<'k>(element: Factor, left: Reg<'k, u32>) -> Reg<'k, u32> {
    left.min(element.per_chunk()) * element.size()
}

impl<'k> Copies<'k> {
    /// The copies from element `at` of the depth on, with which the last tile of the block's share begins,
    /// to stage 0, where the operand begins `region` bytes after `base`.
    pub fn new(
        operand: &Operand<'k>,
        threads: u32,
        thread: Reg<'k, u32>,
        at: Reg<'k, u32>,
        base: Reg<'k, u32>,
        region: u32,
    ) -> Self {
        let layout = operand.layout;
        let element = layout.element;
        let (first_line, chunk) = layout.first_copy(thread);
        let along = chunk * element.per_chunk();
        let mine = layout.copying(threads).map(|count| thread.lt(count));
        let places = layout.copies(threads);

        let mut lines: Vec<_> = places.iter().map(|place| place.line).collect();
        lines.sort();
        lines.dedup();
        let line = |further| if further == 0 { first_line } else { first_line + further };
        let pointers: Vec<_> = lines
            .iter()
            .map(|&further| {
                let line = line(further);
                let (line, at) = match layout.major {
                    // Sums of rows that do not exist are not stored: any row will do.
                    Major::K => ((operand.first + line).min(operand.extent - 1), at + along),
                    Major::Outer => (at + line, operand.first + along),
                };
                let elements = line.wide() * operand.line + at.wide();
                operand.address + elements * u64::from(element.size())
            })
            .collect();

        let k_left = left(operand.depth, at + along);
        // Elements from a copy's start to the end of its line, for each panel.
        let panel_left: Vec<_> = (0..layout.panels())
            .map(|panel| {
                let before = panel * layout.line_elements();
                left(operand.extent, operand.first + along + before)
            })
            .collect();
        let panel_valid: Vec<_> = panel_left
            .iter()
            .map(|left| match (layout.major, mine) {
                (Major::K, mine) => mine,
                (Major::Outer, None) => Some(left.gt(0)),
                (Major::Outer, Some(mine)) => Some(left.gt(0) & mine),
            })
            .collect();
        let each = places.iter().map(|&place| {
            let panel = place.panel as usize;
            let pointer = lines.binary_search(&place.line).expect("it is from there");
            let last_bytes = match layout.major {
                Major::K => bytes(element, k_left),
                Major::Outer => {
                    let in_depth = (at + line(place.line)).lt(operand.depth);
                    in_depth.kernel().select(in_depth, bytes(element, panel_left[panel]), 0)
                }
            };
            Each {
                from: pointers[pointer].at((place.panel * layout.line_bytes()).into()),
                to: region + layout.copy_offset(place),
                valid: panel_valid[panel],
                last_bytes,
            }
        });
        let each = each.collect();
        let stride = match layout.major {
            Major::K => Value::Literal((layout.depth * element.size()).into()),
            Major::Outer => Value::Reg(operand.line * u64::from(layout.depth * element.size())),
        };
        Self { pointers, stride, each, to: base + layout.place(first_line, chunk) }
    }

    /// Copies the last tile of the depth to stage 0.
    pub fn copy_last(&self, k: &'k Kernel) {
        for each in &self.each {
            let copy =
                Copy16 { from: each.from, to: self.to.at(each.to.into()), valid: each.valid };
            copy.emit(k, each.last_bytes);
        }
    }

    /// The copies of a whole tile to the stage that begins `stage` bytes after the first.
    pub fn to_stage(&self, stage: Reg<'k, u32>) -> impl Iterator<Item = Copy16<'k>> {
        let to = self.to + stage;
        self.each.iter().map(move |each| Copy16 {
            from: each.from,
            to: to.at(each.to.into()),
            valid: each.valid,
        })
    }

    /// Goes this many tiles of the depth back.
    pub fn back(&self, tiles: Reg<'k, u32>) {
        let bytes = tiles.wide() * self.stride;
        for pointer in &self.pointers {
            pointer.set(*pointer - bytes);
        }
    }

    /// Goes to the next tile of the depth.
    pub fn advance(&self) {
        for pointer in &self.pointers {
            pointer.increase(self.stride);
        }
    }
}
