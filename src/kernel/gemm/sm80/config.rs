//! The choices, and what follows from them.

use super::layout::{Layout, Side};
use crate::kernel::Element;
use crate::kernel::gemm::{Epilogue, Major, Scale, lies_along_k, multiplied};
use crate::kernel::multiprocessor::{WARP, shared_of_each};
use crate::kernel::name::{given, several};
use crate::ptx::Factor;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The types of `A` and `B`.
    pub elements: [Factor; 2],
    /// How `A` lies.
    pub lhs: Major,
    /// How `B` lies.
    pub rhs: Major,
    /// Rows of a tile.
    pub rows: u32,
    /// Columns of a tile.
    pub cols: u32,
    /// Depth of a stage: 64 or 128 bytes.
    pub depth: u32,
    /// Warps below and beside each other in a tile. The rows and columns of each are powers of two
    /// from 16 on.
    pub warps: [u32; 2],
    /// Stages of the ring.
    pub stages: u32,
    /// Blocks that share the depth of a tile. Above 1 the kernel stores partial sums, and
    /// [`reduce`](Self::reduce) adds them.
    pub split: u32,
    /// Blocks of a multiprocessor.
    pub blocks_per_sm: u32,
    /// Whether there are batch strides.
    pub batched: bool,
    /// Elements of a store: 4 or 1, a divisor of the columns of `C`.
    pub unit: u32,
    /// What is done to a sum before it is stored.
    pub epilogue: Epilogue,
}

impl Config {
    /// `sm80 128x256 k64x4 warps2x4 split3 2/sm unit4, nt bf16→f32 +bf16 relu batched`: as for
    /// [`sm90::Config::name`](crate::kernel::gemm::sm90::Config::name), with the warps of a tile and the
    /// elements of a store.
    pub fn name(&self) -> String {
        let Self { rows, cols, depth, stages, warps: [below, beside], unit, .. } = self;
        let split = several(self.split, |split| format!(" split{split}"));
        let blocks = several(self.blocks_per_sm, |blocks| format!(" {blocks}/sm"));
        let layouts = Major::names([self.lhs, self.rhs]);
        let (element, epilogue) = (self.elements[0].name(), self.epilogue.name());
        let batched = given(self.batched, " batched");
        format!(
            "sm80 {rows}x{cols} k{depth}x{stages} warps{below}x{beside}{split}{blocks} unit{unit}, \
             {layouts} {element}{epilogue}{batched}"
        )
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        WARP * self.warps[0] * self.warps[1]
    }

    /// Rows of a warp's part of a tile.
    pub fn warp_rows(&self) -> u32 {
        self.rows / self.warps[0]
    }

    /// Columns of a warp's part of a tile.
    pub fn warp_cols(&self) -> u32 {
        self.cols / self.warps[1]
    }

    /// Elements along K of one product of the tensor cores.
    pub(super) fn k_step(&self) -> u32 {
        self.elements[0].step()
    }

    /// Products along K of a stage.
    pub(super) fn steps(&self) -> u32 {
        self.depth / self.k_step()
    }

    /// As what the operands are multiplied.
    pub(super) fn factor(&self) -> Factor {
        multiplied(self.elements).expect("it was checked")
    }

    pub(super) fn lhs_layout(&self) -> Layout {
        let [element, _] = self.elements;
        Layout { side: Side::Lhs, element, major: self.lhs, extent: self.rows, depth: self.depth }
    }

    pub(super) fn rhs_layout(&self) -> Layout {
        let [_, element] = self.elements;
        Layout { side: Side::Rhs, element, major: self.rhs, extent: self.cols, depth: self.depth }
    }

    /// Bytes of a stage.
    pub fn stage_bytes(&self) -> u32 {
        self.lhs_layout().bytes() + self.rhs_layout().bytes()
    }

    /// Elements between the rows of a warp's strip of sums: such that the writes of fragments do not
    /// meet in a bank.
    pub(super) fn strip_pitch(&self) -> u32 {
        self.warp_cols() + 8
    }

    /// Bytes of a warp's strip of sums, 16 rows, on their way to memory.
    pub(super) fn strip_bytes(&self) -> u32 {
        16 * self.strip_pitch() * Element::F32.size()
    }

    /// Bytes of shared memory. The strips lie over the stages, which are done with by then.
    pub fn shared_bytes(&self) -> u32 {
        let strips = self.warps[0] * self.warps[1] * self.strip_bytes();
        (self.stages * self.stage_bytes()).max(strips)
    }

    /// The most stages that fit a device whose blocks can have `limit` bytes of shared memory.
    pub fn max_stages(&self, limit: u32) -> u32 {
        shared_of_each(limit, self.blocks_per_sm) / self.stage_bytes()
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        let (shared, limit) = (self.shared_bytes(), shared_of_each(limit, self.blocks_per_sm));
        let threads = self.threads();
        let part = |all: u32, warps: u32| {
            all.is_multiple_of(warps) && (all / warps).is_power_of_two() && all / warps >= 16
        };
        let rules = [
            (multiplied(self.elements).is_some(), "operands that are not of one type".into()),
            lies_along_k(self.elements, [self.lhs, self.rhs]),
            self.epilogue.rule(multiplied(self.elements)),
            (self.epilogue.scale != Scale::Blocks, "scales of blocks".into()),
            (
                matches!(self.depth * self.elements[0].size(), 64 | 128),
                format!("a depth of {} (64 or 128 bytes)", self.depth),
            ),
            (
                part(self.rows, self.warps[0]) && part(self.cols, self.warps[1]),
                format!(
                    "{}×{} in {}×{} warps (powers of two from 16 on for each)",
                    self.rows, self.cols, self.warps[0], self.warps[1]
                ),
            ),
            (
                self.warp_rows() * self.warp_cols() <= 64 * 64,
                format!("{}×{} sums of a warp", self.warp_rows(), self.warp_cols()),
            ),
            (
                self.lhs_layout().divides(threads) && self.rhs_layout().divides(threads),
                format!("{threads} threads for the copies of a stage"),
            ),
            (self.stages >= 2, format!("{} stages (at least 2)", self.stages)),
            (matches!(self.split, 1..=64), format!("a split of {} (1 to 64)", self.split)),
            (matches!(self.unit, 1 | 4), format!("a unit of {} (4 or 1)", self.unit)),
            (shared <= limit, format!("{shared} bytes of shared memory (at most {limit})")),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }
}
