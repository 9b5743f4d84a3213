//! The choices, and what follows from them.

use super::copies::PAIR;
use super::mail::Mail;
use crate::kernel::Element;
use crate::kernel::gemm::Epilogue;
use crate::kernel::multiprocessor::{WARP, shared_of_each};
use crate::kernel::name::{given, several};
use crate::kernel::w4::nibbles::{Decoder, Table};
use crate::kernel::w4::{BLOCK, BLOCK_BYTES, Codes, MOST_WEIGHTS, Problem, Scheme};
use crate::ptx::{Half, Target};

/// Bytes of a row of `x` in a slot: as many elements as a block of codes has rows.
pub(super) const LINE: u32 = 2 * BLOCK;
/// Tokens of an `mma`.
pub(super) const TOKENS: u32 = 8;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// Hopper's blocks of a column add their sums as a cluster; those of others leave them to
    /// [`Reduce`](crate::kernel::gemm::sm80::Reduce).
    pub target: Target,
    /// The type of `x`.
    pub half: Half,
    /// The weight's.
    pub scheme: Scheme,
    /// Rows of `x` there is room for: a power of two up to 16.
    pub tokens: u32,
    /// Whether there are more, in blocks of so many.
    pub several: bool,
    /// Columns of `W` of a block: those of a block of codes, or half of them.
    pub cols: u32,
    /// Warps of a block, which share its rows of `W`.
    pub warps: u32,
    /// Slots of each warp's ring, an even number.
    pub slots: u32,
    /// Whether the last rows of `W` may be fewer than a warp takes at once, or its last columns fewer than a block has. Else
    /// nobody asks: copies of a number of bytes that is not known before take some ten instructions more each.
    pub cut: bool,
    /// That of nf4.
    pub table: Table,
    /// Blocks that share the rows of a column of blocks.
    pub split: u32,
    /// Blocks of a multiprocessor.
    pub blocks_per_sm: u32,
    /// Elements of a store: 4 or 1, a divisor of the columns of `W`.
    pub unit: u32,
    /// How many weights the rows of `x` are multiplied with.
    pub weights: u32,
    /// Whether the result is the product of both weights' ones, the first activated: half of a block's warps have each.
    pub gated: bool,
    /// What is done to a sum before it is stored.
    pub epilogue: Epilogue,
}

/// The offsets of what a slot has: a block of codes and what belongs to its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Slot {
    pub x: u32,
    pub scales: u32,
    pub zeros: u32,
    pub bytes: u32,
}

impl Config {
    /// `w4stream nf4 g128 8+tokens 32cols cut narrow warps8x6 split2 2/sm unit4 3weights portable, f16 bf16→f32 +bf16 relu`:
    /// the scheme, tokens, columns unless 64, whether the last ones may be fewer, a narrow table, warps and slots of each, split,
    /// blocks of a multiprocessor, elements of a store, weights; types of scales, of `x` and of the result, bias, activation.
    pub fn name(&self) -> String {
        let Self { tokens, warps, slots, unit, .. } = self;
        let more = given(self.several, "+");
        let cols = given(self.cols < BLOCK, " 32cols");
        let cut = given(self.cut, " cut");
        let table = match (self.scheme.codes, self.table) {
            (Codes::Nf4, Table::Narrow) => " narrow",
            _ => "",
        };
        let split = several(self.split, |split| format!(" split{split}"));
        let blocks = several(self.blocks_per_sm, |blocks| format!(" {blocks}/sm"));
        let weights = match self.gated {
            true => " gated".into(),
            false => several(self.weights, |weights| format!(" {weights}weights")),
        };
        let (scheme, scale) = (self.scheme.name(), self.scheme.scale.name());
        let (half, epilogue) = (self.half.name(), self.epilogue.name());
        let target = match self.target {
            Target::Sm80 | Target::Sm89 => " portable",
            Target::Sm90a => "",
        };
        format!(
            "w4stream {scheme} {tokens}{more}tokens{cols}{cut}{table} warps{warps}x{slots}{split}{blocks} unit{unit}{weights}{target}, \
             {scale} {half}{epilogue}"
        )
    }

    /// Whether `x` has one row.
    pub(super) fn one_token(&self) -> bool {
        self.tokens == 1 && !self.several
    }

    /// Whether a problem's last blocks of so many columns, or its last rows, may be [cut off](Self::cut). Those of several
    /// weights are taken for it: beside their addresses, ptxas would have too many of copies ready, and spill.
    pub fn cuts(problem: &Problem, cols: u32) -> bool {
        let rows = problem.k.is_multiple_of((PAIR * BLOCK).into());
        problem.weights() > 1 || !rows || !problem.n.is_multiple_of(cols.into())
    }

    /// Threads of a block.
    pub fn threads(&self) -> u32 {
        WARP * self.warps
    }

    /// Warps that share the rows of a weight.
    pub(super) fn together(&self) -> u32 {
        self.warps / self.sums_of_column()
    }

    /// Sums for each element of the result.
    pub(super) fn sums_of_column(&self) -> u32 {
        if self.gated { 2 } else { 1 }
    }

    /// Columns of an `mma`'s sums, times this.
    pub(super) fn token_tiles(&self) -> u32 {
        self.tokens.div_ceil(TOKENS)
    }

    /// Rows of scales that come with a block of codes; with groups of two blocks, with each second one. Bytes have one
    /// for all of a block, which comes another way.
    pub(super) fn scale_rows(&self) -> u32 {
        match self.scheme.group {
            Some(rows) if !self.scheme.codes.are_bytes() => BLOCK.div_ceil(rows),
            _ => 0,
        }
    }

    /// Bytes of a block's columns of a block of codes of four bits.
    pub(super) fn code_bytes(&self) -> u32 {
        BLOCK_BYTES / (BLOCK / self.cols)
    }

    pub(super) fn slot(&self) -> Slot {
        let x = if self.scheme.codes.are_bytes() { BLOCK * BLOCK } else { self.code_bytes() };
        let scales = x + self.tokens * LINE;
        let zeros = scales + self.scale_rows() * self.cols * self.scheme.scale.size();
        let zero_bytes = if self.scheme.zeros { self.scale_rows() * self.cols } else { 0 };
        Slot { x, scales, zeros, bytes: (zeros + zero_bytes).next_multiple_of(LINE) }
    }

    /// Bytes of the warps' rings.
    pub(super) fn ring_bytes(&self) -> u32 {
        self.warps * self.slots * self.slot().bytes
    }

    /// Floats from a token's sums to the next one's, such that what a warp stores lies in different banks.
    pub(super) fn sums_pitch(&self) -> u32 {
        self.cols + 4
    }

    /// Bytes of the sums of one warp.
    pub(super) fn sums_bytes(&self) -> u32 {
        self.tokens * self.sums_pitch() * Element::F32.size()
    }

    /// Bytes of shared memory: the rings, over which the sums lie in the end, what a cluster's blocks send each other, and
    /// the decoder's.
    pub fn shared_bytes(&self) -> u32 {
        self.mailbox() + self.mailbox_bytes() + Decoder::shared_bytes(self.scheme.codes, self.table)
    }

    /// Where the mailbox is.
    pub(super) fn mailbox(&self) -> u32 {
        self.ring_bytes().max(self.warps * self.sums_bytes()).next_multiple_of(LINE)
    }

    fn mailbox_bytes(&self) -> u32 {
        let mail = Mail::new(self);
        if self.clustered() { mail.bytes().next_multiple_of(LINE) } else { 0 }
    }

    /// The most slots that fit a device whose blocks can have `limit` bytes of shared memory.
    pub fn max_slots(&self, limit: u32) -> u32 {
        let others = self.mailbox_bytes() + Decoder::shared_bytes(self.scheme.codes, self.table);
        let share = shared_of_each(limit, self.blocks_per_sm).saturating_sub(others);
        share / (self.warps * self.slot().bytes) / 2 * 2
    }

    /// Units of a tile of the result.
    pub(super) fn units(&self) -> u32 {
        self.tokens * self.cols / self.unit
    }

    /// Whether a cluster adds the sums of a split.
    pub(super) fn clustered(&self) -> bool {
        self.split > 1 && self.target == Target::Sm90a
    }

    /// Whether the kernel can be built and run where a block can have `limit` bytes of shared memory,
    /// or the number that is in the way.
    pub fn check(&self, limit: u32) -> Result<(), String> {
        self.scheme.check()?;
        let (shared, limit) = (self.shared_bytes(), shared_of_each(limit, self.blocks_per_sm));
        let rules = [
            (
                self.tokens.is_power_of_two() && self.tokens <= 16,
                format!("{} tokens (a power of two up to 16)", self.tokens),
            ),
            // Codes of eight bits lie column after column, and a scale may be of a block's columns.
            (
                self.cols == BLOCK || self.cols == BLOCK / 2 && !self.scheme.codes.are_bytes(),
                format!("{} columns (64, or 32 of codes of four bits)", self.cols),
            ),
            (matches!(self.warps, 4 | 8 | 16), format!("{} warps (4, 8 or 16)", self.warps)),
            (
                self.slots >= 2 && self.slots.is_multiple_of(2),
                format!("{} slots (an even number)", self.slots),
            ),
            (
                match self.target {
                    Target::Sm90a => matches!(self.split, 1 | 2 | 4 | 8),
                    Target::Sm80 | Target::Sm89 => (1..=64).contains(&self.split),
                },
                format!("a split of {}", self.split),
            ),
            (matches!(self.unit, 1 | 4), format!("a unit of {} (4 or 1)", self.unit)),
            // The kernel that adds the parts of a split has one result, and a bias is of one weight.
            (
                self.weights == 1
                    || (self.weights as usize <= MOST_WEIGHTS
                        && self.epilogue.bias.is_none()
                        && (self.split == 1 || self.clustered())),
                format!("{} weights", self.weights),
            ),
            (!self.gated || self.weights == 2, format!("a gate of {} weights", self.weights)),
            (shared <= limit, format!("{shared} bytes of shared memory (at most {limit})")),
        ];
        match rules.into_iter().find(|(holds, _)| !holds) {
            Some((_, what)) => Err(what),
            None => Ok(()),
        }
    }
}
