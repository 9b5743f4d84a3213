//! The layout of attention's operands in shared memory: who writes which 16 bytes, who reads them. The formulas
//! work on registers in a kernel and on integers in the tests below.

use super::swizzle::{CHUNK, MatrixOrder, Word, swizzled};

/// Lines of `dim` elements, as panels of 128 bytes of them side by side. The chunks of a panel's line
/// are permuted by XOR such that eight lines of a chunk, as `ldmatrix` reads them, and eight chunks of a
/// line, as copies write them, lie in different banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SwizzledTile {
    pub count: u32,
    /// Lines from panel to panel: more than there are in a part of a tile.
    pub apart: u32,
    /// Elements of a line, which is filled up with zeros to a whole step.
    pub dim: u32,
    /// Bytes of an element.
    pub size: u32,
}

impl SwizzledTile {
    /// Bytes of a panel's line.
    pub const BYTES: u32 = 128;
    /// Chunks of a panel's line, and steps.
    const CHUNKS: u32 = Self::BYTES / CHUNK;
    pub const STEPS: u32 = Self::CHUNKS / 2;
    /// Where tiles begin: at multiples of so many bytes.
    pub const ALIGN: u32 = Self::BYTES * 8;

    /// All of them.
    pub fn new(count: u32, dim: u32, size: u32) -> Self {
        Self { count, apart: count, dim, size }
    }

    /// Some lines and columns of them, from wherever a whole panel begins.
    pub fn part(self, count: u32, dim: u32) -> Self {
        Self { count, dim, ..self }
    }

    /// Elements of a chunk.
    pub fn chunk(self) -> u32 {
        CHUNK / self.size
    }

    /// Elements of a panel's line.
    pub fn width(self) -> u32 {
        Self::BYTES / self.size
    }

    /// Steps of two chunks: what a product takes of a line.
    pub fn steps(self) -> u32 {
        self.dim.div_ceil(2 * self.chunk())
    }

    pub fn panels(self) -> u32 {
        self.dim.div_ceil(self.width())
    }

    pub fn panel_bytes(self) -> u32 {
        self.apart * Self::BYTES
    }

    pub fn bytes(self) -> u32 {
        self.panels() * self.panel_bytes()
    }

    /// Chunks of a line of panel `panel`, with those that are zeros.
    pub fn chunks(self, panel: u32) -> u32 {
        (self.steps() * 2 - panel * Self::CHUNKS).min(Self::CHUNKS)
    }

    /// The offset of a chunk of a line of the first panel.
    pub fn place<T: Word>(line: T, chunk: T) -> T {
        swizzled(line, chunk, Self::BYTES, |line| line)
    }

    /// The line and chunk of a thread's first copy. The others are
    /// [`lines_together`](Self::lines_together) lines further, and panels further.
    pub fn first_copy<T: Word>(thread: T) -> (T, T) {
        (thread / Self::CHUNKS, thread % Self::CHUNKS)
    }

    /// Lines that `threads` threads copy together.
    pub fn lines_together(threads: u32) -> u32 {
        threads / Self::CHUNKS
    }

    /// The offset that a lane gives `ldmatrix.x4` for the first 16 lines and two chunks.
    pub fn fragment<T: Word>(order: MatrixOrder, lane: T) -> T {
        let (line, chunk) = order.place(lane);
        Self::place(line, chunk)
    }

    /// The offset of a lane's chunk of an even line of the first eight: chunk `lane / 4` of line
    /// `2 · (lane % 4)`. That of the next line is this one with [`CHUNK`] flipped, a line further.
    pub fn quads<T: Word>(lane: T) -> T {
        Self::place(lane % 4 * 2, lane / 4)
    }

    /// The offset of 16 lines from line `16 · block` on and of a step, from that of
    /// [`fragment`](Self::fragment): what to XOR, in units of two chunks, then what to add.
    pub fn block(self, block: u32, step: u32) -> (u32, u32) {
        (step % Self::STEPS, step / Self::STEPS * self.panel_bytes() + block * 16 * Self::BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// The line and the first element of what each copy brings to an offset.
    fn written(lines: SwizzledTile, threads: u32) -> HashMap<u32, (u32, u32)> {
        let mut memory = HashMap::new();
        for thread in 0..threads {
            let (line, chunk) = SwizzledTile::first_copy(thread);
            for panel in 0..lines.panels() {
                for further in
                    (0..lines.count).step_by(SwizzledTile::lines_together(threads) as usize)
                {
                    if chunk < lines.chunks(panel) {
                        let to = SwizzledTile::place(line, chunk)
                            + panel * lines.panel_bytes()
                            + further * SwizzledTile::BYTES;
                        let element = panel * lines.width() + chunk * lines.chunk();
                        let before = memory.insert(to, (line + further, element));
                        assert!(before.is_none() && to + CHUNK <= lines.bytes());
                    }
                }
            }
        }
        memory
    }

    fn cases() -> impl Iterator<Item = (SwizzledTile, u32)> {
        let dims = [1, 8, 16, 40, 64, 72, 128, 136, 200, 256];
        let sizes = |dim| [2, 4].map(|size| (dim, size));
        dims.into_iter().flat_map(sizes).flat_map(|(dim, size)| {
            [(16, 128), (32, 256), (64, 128), (128, 256)]
                .map(|(count, threads)| (SwizzledTile::new(count, dim, size), threads))
        })
    }

    #[test]
    fn fragments_are_what_was_copied() {
        for (lines, threads) in cases() {
            let memory = written(lines, threads);
            assert_eq!(memory.len() as u32, lines.count * lines.steps() * 2, "{lines:?}");
            for (block, step) in
                (0..lines.count / 16).flat_map(|b| (0..lines.steps()).map(move |s| (b, s)))
            {
                for order in [MatrixOrder::Lines, MatrixOrder::Chunks] {
                    for lane in 0..32u32 {
                        let (xor, add) = lines.block(block, step);
                        let at = (SwizzledTile::fragment(order, lane) ^ (xor * 2 * CHUNK)) + add;
                        let (matrix, line) = (lane / 8, lane % 8);
                        let (down, right) = match order {
                            MatrixOrder::Lines => (matrix % 2, matrix / 2),
                            MatrixOrder::Chunks => (matrix / 2, matrix % 2),
                        };
                        let element = (2 * step + right) * lines.chunk();
                        let there = (block * 16 + down * 8 + line, element);
                        assert_eq!(memory[&at], there, "{lines:?} {order:?} {lane}");
                    }
                }
            }
        }
    }

    #[test]
    fn quads_are_of_two_lines() {
        for lane in 0..32 {
            let even = SwizzledTile::quads(lane);
            assert_eq!(even, SwizzledTile::place(lane % 4 * 2, lane / 4));
            assert_eq!(
                (even ^ CHUNK) + SwizzledTile::BYTES,
                SwizzledTile::place(lane % 4 * 2 + 1, lane / 4)
            );
        }
    }

    #[test]
    fn neither_copies_nor_loads_meet_in_a_bank() {
        let apart = |offsets: Vec<u32>| {
            let mut banks: Vec<_> = offsets.iter().map(|at| at / CHUNK % 8).collect();
            banks.sort();
            banks.dedup();
            assert_eq!(banks.len(), 8, "{offsets:?}");
        };
        for eight in 0..4 {
            let lanes = 8 * eight..8 * eight + 8;
            for order in [MatrixOrder::Lines, MatrixOrder::Chunks] {
                apart(lanes.clone().map(|lane| SwizzledTile::fragment(order, lane)).collect());
            }
            apart(lanes.clone().map(SwizzledTile::quads).collect());
            let copy = |thread| {
                let (line, chunk) = SwizzledTile::first_copy(thread);
                SwizzledTile::place(line, chunk)
            };
            apart(lanes.map(copy).collect());
        }
    }
}
