//! A left operand of eight bits, `Wᵀ`, whose codes lie along K: TMA copies lines of 64 bytes, one for each column of `W`,
//! and a lane takes two codes at a time, in the order in which the right operand has its rows.
//!
//! ```text
//!  a line, of column g of W      chunk 0           chunk 1          ...
//!  codes                         0 1 2 .. 7 8 .. 15   16 ..
//!  lanes of column g             0 0 1 .. 3 0 .. 3    0 0 1         two codes of each eight: wgmma's a0 (a2 of the next eight)
//! ```
//!
//! Chunks are swizzled over lines of 64 bytes, so that those of eight columns lie in all banks. Scales of blocks of 128 codes
//! by 128 columns multiply codes; others multiply sums in the end.

use super::Gemm;
use super::packed::{Fragments, Packed};
use crate::kernel::gemm::BLOCK as SCALED;
use crate::kernel::hopper::SLAB;
use crate::kernel::w4::BLOCK;
use crate::kernel::w4::weight::Load;
use crate::ptx::Reg;

/// Bytes of a line.
pub(super) const LINE: u32 = BLOCK;
/// Those of the lines of a warpgroup's columns.
pub(super) const LINES: u32 = SLAB * LINE;
/// Bytes of a chunk.
const CHUNK: u32 = 16;

/// Two codes for each register of each step.
pub(super) type Codes<'k> = Vec<[Reg<'k, u32>; 4]>;

/// The scales of blocks of a tile's columns.
pub(super) struct TileBlocks<'k> {
    /// Which blocks the columns have.
    column: Reg<'k, u32>,
    /// The stage that is next, and the last one that has a scale.
    stage: Reg<'k, u32>,
    last: Reg<'k, u32>,
    /// That stage's scale: it was loaded a stage before.
    scale: Reg<'k, f32>,
}

impl<'k> Gemm<'k, '_> {
    /// The scales of blocks from stage `first` on, for columns of `W` from `column` on, if codes have any.
    pub(super) fn tile_blocks(
        &self,
        of: &Packed<'k>,
        column: Reg<'k, u32>,
        first: Reg<'k, u32>,
    ) -> Option<TileBlocks<'k>> {
        let rows = of.scheme.group.filter(|_| of.scheme.codes.are_bytes())?;
        debug_assert_eq!(rows, SCALED);
        let k = self.k;
        let last_block = (self.size[1] - 1) / SCALED;
        let blocks = TileBlocks {
            column: (column / SCALED).min(last_block),
            stage: k.var(first),
            last: (of.depth - 1) / BLOCK,
            scale: k.reg(),
        };
        blocks.load(of);
        Some(blocks)
    }

    /// What a lane, whose first row of the warpgroup's is `row`, has of a stage of lines at `stage`.
    pub(super) fn load_lines(&self, stage: Reg<'k, u32>, row: Reg<'k, u32>) -> Codes<'k> {
        let k = self.k;
        // Eight lines are four times two that lie side by side in all banks.
        let place = row * LINE + row / 2 % 4 * CHUNK + k.lane() % 4 * 2;
        let step = |step: u32| {
            let at = stage + (place ^ (step * CHUNK));
            // a0 to a3: columns and eight below, then the next eight codes of both.
            [[0, 0], [8, 0], [0, 8], [8, 8]]
                .map(|[below, further]| k.ld_shared_u16(at.at((below * LINE + further).into())))
        };
        (0..self.c.depth() / CHUNK).map(step).collect()
    }

    /// The fragments.
    pub(super) fn decode_lines(
        &self,
        of: &Packed<'k>,
        codes: &Codes<'k>,
        blocks: Option<&TileBlocks<'k>>,
    ) -> Fragments<'k> {
        let bytes = of.decoder.bytes().expect("codes are bytes");
        let decode = |codes| match blocks {
            Some(blocks) => bytes.scaled(codes, blocks.scale),
            None => bytes.pair(codes, false),
        };
        let fragments = codes.iter().map(|codes| codes.map(decode)).collect();
        if let Some(blocks) = blocks {
            blocks.stage.increase(self.c.teams);
            blocks.load(of);
        }
        fragments
    }
}

impl<'k> TileBlocks<'k> {
    fn load(&self, of: &Packed<'k>) {
        let group = self.stage.min(self.last) / (SCALED / BLOCK);
        let at = of.weight.scales.at(group, self.column);
        self.scale.set(of.weight.scale(at, Load::Anywhere));
    }
}
