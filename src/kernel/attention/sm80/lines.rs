//! Where queries, keys and values lie in shared memory: who writes which 16 bytes, who reads them. The
//! formulas work on registers in a kernel and on integers in the tests below.

use crate::kernel::chunk::{CHUNK, CHUNK_ELEMENTS, Word};

/// Lines of `dim` elements, as panels of 64 of them side by side. The chunks of a panel's line are
/// permuted by XOR such that eight lines of a chunk, as `ldmatrix` reads them, and eight chunks of a
/// line, as copies write them, lie in different banks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lines {
    pub count: u32,
    /// Elements of a line; those behind them up to a multiple of 16 are zeros.
    pub dim: u32,
}

/// Which matrices a lane addresses for `ldmatrix.x4`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// (line 0, chunk 0), (8, 0), (0, 1), (8, 1): a left operand, or a right one that is transposed.
    Lines,
    /// (line 0, chunk 0), (0, 1), (8, 0), (8, 1): a right operand.
    Chunks,
}

impl Lines {
    /// Bytes of a panel's line.
    pub const BYTES: u32 = 128;
    /// Chunks of a panel's line.
    const CHUNKS: u32 = Self::BYTES / CHUNK;
    /// Elements of a panel's line.
    pub const WIDTH: u32 = Self::CHUNKS * CHUNK_ELEMENTS;

    /// Steps of 16 elements.
    pub fn steps(self) -> u32 {
        self.dim.div_ceil(16)
    }

    pub fn panels(self) -> u32 {
        self.dim.div_ceil(Self::WIDTH)
    }

    pub fn panel_bytes(self) -> u32 {
        self.count * Self::BYTES
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
        line * Self::BYTES + (chunk ^ (line % Self::CHUNKS)) * CHUNK
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

    /// The offset that a lane gives `ldmatrix.x4` for the first 16 lines and 16 elements.
    pub fn fragment<T: Word>(order: Order, lane: T) -> T {
        match order {
            Order::Lines => Self::place(lane % 16, lane / 16),
            Order::Chunks => Self::place(lane / 16 * 8 + lane % 8, lane / 8 % 2),
        }
    }

    /// The offset of 16 lines from line `16 · block` on and 16 elements from element `16 · step` on,
    /// from that of [`fragment`](Self::fragment): what to XOR, in units of two chunks, then what to add.
    pub fn block(self, block: u32, step: u32) -> (u32, u32) {
        let steps = Self::CHUNKS / 2;
        (step % steps, step / steps * self.panel_bytes() + block * 16 * Self::BYTES)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// The line and the first element of what each copy brings to an offset.
    fn written(lines: Lines, threads: u32) -> HashMap<u32, (u32, u32)> {
        let mut memory = HashMap::new();
        for thread in 0..threads {
            let (line, chunk) = Lines::first_copy(thread);
            for panel in 0..lines.panels() {
                for further in (0..lines.count).step_by(Lines::lines_together(threads) as usize) {
                    if chunk < lines.chunks(panel) {
                        let to = Lines::place(line, chunk)
                            + panel * lines.panel_bytes()
                            + further * Lines::BYTES;
                        let element = panel * Lines::WIDTH + chunk * CHUNK_ELEMENTS;
                        let before = memory.insert(to, (line + further, element));
                        assert!(before.is_none() && to + CHUNK <= lines.bytes());
                    }
                }
            }
        }
        memory
    }

    fn cases() -> impl Iterator<Item = (Lines, u32)> {
        let dims = [1, 8, 16, 40, 64, 72, 128, 136, 200, 256];
        dims.into_iter().flat_map(|dim| {
            [(16, 128), (32, 256), (64, 128), (128, 256)]
                .map(|(count, threads)| (Lines { count, dim }, threads))
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
                for order in [Order::Lines, Order::Chunks] {
                    for lane in 0..32u32 {
                        let (xor, add) = lines.block(block, step);
                        let at = (Lines::fragment(order, lane) ^ (xor * 2 * CHUNK)) + add;
                        let (matrix, line) = (lane / 8, lane % 8);
                        let (down, right) = match order {
                            Order::Lines => (matrix % 2, matrix / 2),
                            Order::Chunks => (matrix / 2, matrix % 2),
                        };
                        let there = (block * 16 + down * 8 + line, step * 16 + right * 8);
                        assert_eq!(memory[&at], there, "{lines:?} {order:?} {lane}");
                    }
                }
            }
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
            for order in [Order::Lines, Order::Chunks] {
                apart(lanes.clone().map(|lane| Lines::fragment(order, lane)).collect());
            }
            let copy = |thread| {
                let (line, chunk) = Lines::first_copy(thread);
                Lines::place(line, chunk)
            };
            apart(lanes.map(copy).collect());
        }
    }
}
