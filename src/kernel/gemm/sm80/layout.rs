//! The layout of an operand's part of a stage in shared memory: who writes which 16 bytes, who reads
//! them. The formulas work on registers in a kernel and on integers in the tests below.

use crate::kernel::ampere::swizzle::{CHUNK, MatrixOrder, Word, swizzled};
use crate::kernel::gemm::Major;
use crate::ptx::Factor;

/// Bytes that shared memory gives in a cycle.
const BANKS: u32 = 128;

/// Which operand.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Lhs,
    Rhs,
}

/// `extent × depth` elements of an operand, as panels of lines of at most 128 bytes. A line runs along
/// the dimension that is contiguous in global memory. Its chunks are permuted by XOR such that eight
/// lines of a chunk, as `ldmatrix` reads them, and eight chunks of a line, as copies write them, lie in
/// different banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    pub side: Side,
    pub element: Factor,
    pub major: Major,
    /// Rows of the left operand, columns of the right one.
    pub extent: u32,
    pub depth: u32,
}

/// One of a thread's copies of a stage: where it is relative to the thread's first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CopyOffset {
    /// Lines further.
    pub line: u32,
    /// Panels further.
    pub panel: u32,
}

impl Layout {
    fn contiguous(self) -> u32 {
        if self.major == Major::K { self.depth } else { self.extent }
    }

    /// Lines of a panel.
    pub fn lines(self) -> u32 {
        if self.major == Major::K { self.extent } else { self.depth }
    }

    /// Bytes of a line.
    pub fn line_bytes(self) -> u32 {
        BANKS.min(self.element.size() * self.contiguous())
    }

    /// Elements of a line.
    pub fn line_elements(self) -> u32 {
        self.line_bytes() / self.element.size()
    }

    /// Panels side by side.
    pub fn panels(self) -> u32 {
        self.element.size() * self.contiguous() / self.line_bytes()
    }

    pub fn panel_bytes(self) -> u32 {
        self.lines() * self.line_bytes()
    }

    /// Bytes of the whole.
    pub fn bytes(self) -> u32 {
        self.element.size() * self.extent * self.depth
    }

    fn line_chunks(self) -> u32 {
        self.line_bytes() / CHUNK
    }

    /// The offset of a chunk of a line of the first panel.
    pub fn place<T: Word>(self, line: T, chunk: T) -> T {
        let lines_of_banks = BANKS / self.line_bytes();
        swizzled(line, chunk, self.line_bytes(), |line| line / lines_of_banks)
    }

    /// The line and chunk of a thread's first copy.
    pub fn first_copy<T: Word>(self, thread: T) -> (T, T) {
        (thread / self.line_chunks(), thread % self.line_chunks())
    }

    /// A thread's copies. Their distance is a multiple of eight lines, so that the XOR is the same.
    pub fn copies(self, threads: u32) -> Vec<CopyOffset> {
        let each = self.lines() * self.line_chunks();
        (0..self.bytes() / CHUNK)
            .step_by(threads as usize)
            .map(|i| CopyOffset { line: i % each / self.line_chunks(), panel: i / each })
            .collect()
    }

    /// The offset of a copy from the thread's first.
    pub fn copy_offset(self, copy: CopyOffset) -> u32 {
        copy.panel * self.panel_bytes() + copy.line * self.line_bytes()
    }

    /// Threads that have copies, if not all have.
    pub fn copying(self, threads: u32) -> Option<u32> {
        let chunks = self.bytes() / CHUNK;
        (chunks < threads).then_some(chunks)
    }

    /// Whether `threads` threads divide the copies evenly.
    pub fn divides(self, threads: u32) -> bool {
        let each = self.lines() * self.line_chunks();
        each.is_multiple_of(threads) || (self.panels() == 1 && each < threads)
    }

    /// Whether `ldmatrix` transposes: lines run along the other dimension than K.
    pub fn transposed(self) -> bool {
        self.major == Major::Outer
    }

    /// The offset that a lane gives `ldmatrix.x4` for the first 16×16 block of the rows or columns
    /// from `first` on (a multiple of the warp's extent, which is a power of two).
    ///
    /// The matrices of a left block are, as `mma` wants them, (outer 0, k 0), (8, 0), (0, 8), (8, 8),
    /// those of a right one (0, 0), (0, 8), (8, 0), (8, 8).
    pub fn fragment<T: Word>(self, first: T, lane: T) -> T {
        let order = match (self.side == Side::Lhs) == (self.major == Major::K) {
            true => MatrixOrder::Lines,
            false => MatrixOrder::Chunks,
        };
        let (line, chunk) = order.place(lane);
        match self.major {
            Major::K => self.place(line + first, chunk),
            Major::Outer => {
                let width = self.line_elements();
                first / width * self.panel_bytes()
                    + self.place(line, first % width / self.element.per_chunk() + chunk)
            }
        }
    }

    /// The offset of block `block` along the warp's extent and `step` along K, from that of
    /// [`fragment`](Self::fragment): what to XOR, in units of two chunks, then what to add.
    pub fn block(self, block: u32, step: u32) -> (u32, u32) {
        let (line, steps) = (self.line_bytes(), self.line_chunks() / 2);
        match self.major {
            Major::K => (step, block * 16 * line),
            Major::Outer => (block % steps, block / steps * self.panel_bytes() + step * 16 * line),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;
    use crate::ptx::Half;

    const BF16: Factor = Factor::Half(Half::Bf16);

    /// Layouts, warps side by side in them, threads of the block.
    fn cases() -> impl Iterator<Item = (Layout, u32, u32)> {
        let tiles = [(256, 4, 256), (256, 2, 256), (128, 2, 256), (128, 4, 256), (128, 2, 128)];
        let small = [(128, 4, 128), (64, 2, 128), (64, 1, 128), (32, 1, 128), (16, 1, 128)];
        tiles.into_iter().chain(small).flat_map(|(extent, warps, threads)| {
            [32, 64].into_iter().flat_map(move |depth| {
                [Side::Lhs, Side::Rhs].into_iter().flat_map(move |side| {
                    [Major::K, Major::Outer]
                        .map(|major| Layout { side, element: BF16, major, extent, depth })
                        .map(|layout| (layout, warps, threads))
                })
            })
        })
    }

    /// The (outer, k) of the 8 elements that each copy brings to an offset.
    fn written(layout: Layout, threads: u32) -> HashMap<u32, [(u32, u32); 8]> {
        let mut memory = HashMap::new();
        for thread in 0..layout.copying(threads).unwrap_or(threads) {
            let (line, chunk) = layout.first_copy(thread);
            for copy in layout.copies(threads) {
                let to = layout.place(line, chunk) + layout.copy_offset(copy);
                let line = line + copy.line;
                let along = copy.panel * layout.line_elements() + chunk * BF16.per_chunk();
                let elements = std::array::from_fn(|i| match layout.major {
                    Major::K => (line, along + i as u32),
                    Major::Outer => (along + i as u32, line),
                });
                assert!(memory.insert(to, elements).is_none(), "{layout:?}: {to} written twice");
            }
        }
        memory
    }

    #[test]
    fn copies_fill_the_stage_once() {
        for (layout, _, threads) in cases() {
            assert!(layout.divides(threads), "{layout:?}");
            let memory = written(layout, threads);
            let offsets = (0..layout.bytes()).step_by(CHUNK as usize);
            assert!(offsets.clone().all(|o| memory.contains_key(&o)), "{layout:?}");
            assert_eq!(memory.len(), offsets.len(), "{layout:?}");
        }
    }

    #[test]
    fn fragments_are_what_mma_expects() {
        for (layout, warps, threads) in cases() {
            let memory = written(layout, threads);
            let each = layout.extent / warps;
            for (warp, block, step) in (0..warps).flat_map(|w| {
                (0..each / 16).flat_map(move |b| (0..layout.depth / 16).map(move |s| (w, b, s)))
            }) {
                let (xor, add) = layout.block(block, step);
                let first = |lane: u32| layout.fragment(warp * each, lane);
                let address = |lane: u32| (first(lane) ^ (xor * 2 * CHUNK)) + add;
                for (lane, register, half) in
                    (0..32).flat_map(|l| (0..4).flat_map(move |r| (0..2).map(move |h| (l, r, h))))
                {
                    // ldmatrix: a lane has two elements of line l/4, or the transposed ones.
                    let (line, place) = match layout.transposed() {
                        false => (lane / 4, lane % 4 * 2 + half),
                        true => (lane % 4 * 2 + half, lane / 4),
                    };
                    let got = memory[&address(register * 8 + line)][place as usize];
                    // mma.m16n8k16: the place of a lane's elements in the 16×16 block.
                    let (outer8, k8) = match layout.side {
                        Side::Lhs => (register % 2, register / 2),
                        Side::Rhs => (register / 2, register % 2),
                    };
                    let outer = warp * each + block * 16 + outer8 * 8 + lane / 4;
                    let k = step * 16 + k8 * 8 + lane % 4 * 2 + half;
                    assert_eq!(got, (outer, k), "{layout:?} lane {lane} register {register}");
                }
            }
        }
    }

    #[test]
    fn no_two_of_eight_lanes_meet_in_a_bank() {
        let all_different = |offsets: [u32; 8]| {
            let mut seen = offsets.map(|o| o % BANKS / CHUNK);
            seen.sort();
            seen == [0, 1, 2, 3, 4, 5, 6, 7]
        };
        for (layout, warps, threads) in cases() {
            for start in (0..layout.copying(threads).unwrap_or(threads)).step_by(8) {
                let to = |i| {
                    let (line, chunk) = layout.first_copy(start + i as u32);
                    layout.place(line, chunk)
                };
                assert!(all_different(std::array::from_fn(to)), "{layout:?}: copies");
            }
            for (warp, start) in (0..warps).flat_map(|w| [0, 8, 16, 24].map(|s| (w, s))) {
                let first = warp * (layout.extent / warps);
                let from = |i| layout.fragment(first, start + i as u32);
                assert!(all_different(std::array::from_fn(from)), "{layout:?}: ldmatrix");
            }
        }
    }
}
