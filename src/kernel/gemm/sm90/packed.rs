//! A left operand of four or eight bits, `Wᵀ`: the producer copies codes as they lie in memory, and warpgroups turn them into
//! fragments, scaled, in registers. While wgmma multiplies those of a stage, the next ones are decoded.
//!
//! ```text
//!  a stage of the left operand
//!  ┌────────────┬────────────┬─────────────────────────────┬───────────────────┐
//!  │ 2 KiB of   │ 2 KiB of   │ scales of all rows, for     │ zero points       │
//!  │ warpgroup 0│ warpgroup 1│ each group that it has      │ likewise          │
//!  └────────────┴────────────┴─────────────────────────────┴───────────────────┘
//! ```
//!
//! A scale for a whole column multiplies sums in the end. Codes of eight bits are those of [`lines`](super::lines).

use super::config::Config;
use super::lines::{Codes, LINES};
use super::{Gemm, descriptor};
use crate::kernel::Element;
use crate::kernel::gemm::share::Share;
use crate::kernel::hopper::barriers::Mbarrier;
use crate::kernel::hopper::product::{LeftStep, products};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{SLAB, WARPGROUP};
use crate::kernel::raster::Tile;
use crate::kernel::w4::bytes::Bytes;
use crate::kernel::w4::nibbles::{Decoder, Offset};
use crate::kernel::w4::weight::{Rows, Weight};
use crate::kernel::w4::{BLOCK, BLOCK_BYTES, Scheme};
use crate::ptx::{Address, Delivery, Factor, Half, Kernel, Reg, Value};

/// Rows of `W` of a product.
const STEP: u32 = 16;

/// The offsets of what a stage of the operand has after its codes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackedStage {
    /// Groups of a column in a stage: one that is larger comes with each of its stages.
    pub groups: u32,
    pub scales: u32,
    pub zeros: u32,
    pub bytes: u32,
}

impl PackedStage {
    /// Of a tile of `rows` rows.
    pub fn new(scheme: &Scheme, rows: u32) -> Self {
        if scheme.codes.are_bytes() {
            let bytes = rows / SLAB * LINES;
            return Self { groups: 0, scales: bytes, zeros: bytes, bytes };
        }
        let groups = scheme.group.map_or(0, |group| BLOCK.div_ceil(group));
        let scales = rows / BLOCK * BLOCK_BYTES;
        let zeros = scales + groups * rows * scheme.scale.size();
        let end = zeros + if scheme.zeros { groups * rows } else { 0 };
        Self { groups, scales, zeros, bytes: end.next_multiple_of(128) }
    }
}

/// The operand in memory: one of the weights.
#[derive(Clone, Copy)]
pub(super) struct Packed<'k> {
    pub scheme: Scheme,
    stage: PackedStage,
    pub weight: Weight<'k>,
    /// Rows of `W`.
    pub k: Reg<'k, u32>,
    pub decoder: Decoder<'k>,
}

/// The left operand of a step.
type Fragment<'k> = [Reg<'k, u32>; 4];

fn set_fragment<'k>(to: &Fragment<'k>, from: Fragment<'k>) {
    to.iter().zip(from).for_each(|(to, from)| to.set(from));
}

/// What a producer copies of a tile.
pub(super) struct PackedTile<'k> {
    of: Packed<'k>,
    /// The next block of codes of each warpgroup, or the descriptor of codes in lines; and whether there is one.
    blocks: Vec<(Reg<'k, u64>, Reg<'k, bool>)>,
    /// The tile's first column of `W`.
    column: Reg<'k, u32>,
    /// Bytes of a row of scales and of one of zero points.
    lines: Vec<(Rows<'k>, u32, Reg<'k, u32>)>,
    /// Bytes that arrive for a stage.
    pub bytes: Reg<'k, u32>,
    to: Reg<'k, u32>,
}

impl<'k> Packed<'k> {
    /// All threads of the block come here: those of a table fill it, at `table`.
    pub fn new(c: &Config, weight: Weight<'k>, depth: Reg<'k, u32>, table: Reg<'k, u32>) -> Self {
        let scheme = c.weight.expect("it is one");
        Self {
            scheme,
            stage: PackedStage::new(&scheme, c.rows),
            weight,
            k: depth,
            decoder: Decoder::new(table.kernel(), half(c), scheme.codes, table, c.threads()),
        }
    }
}

impl Packed<'_> {
    /// Bytes of a warpgroup's codes in a stage.
    fn codes_bytes(&self) -> u32 {
        if self.scheme.codes.are_bytes() { LINES } else { BLOCK_BYTES }
    }
}

fn half(c: &Config) -> Half {
    match c.factor() {
        Factor::Half(half) => half,
        _ => unreachable!("it was checked"),
    }
}

impl<'k> Gemm<'k, '_> {
    /// What the producer copies of a tile.
    pub(super) fn packed_tile(&self, of: Packed<'k>, tile: Tile<'k>) -> PackedTile<'k> {
        let (k, c) = (self.k, self.c);
        let [cols, _] = c.orient.order(self.size);
        let column = tile.row * c.rows;
        let blocks = (0..c.consumers()).map(|i| {
            let column = column + i * SLAB;
            if of.scheme.codes.are_bytes() {
                return (of.weight.codes, column.lt(cols));
            }
            let block = (column / BLOCK).mul_wide(self.depth);
            (k.var(of.weight.codes + block * u64::from(BLOCK_BYTES)), column.lt(cols))
        });
        let blocks: Vec<_> = blocks.collect();
        // As far as there are columns, in units of 16 bytes: rows of groups have whole ones.
        let left = (cols.max(column) - column).min(c.rows);
        let lines = match of.stage.groups {
            0 => vec![],
            _ => {
                let scales = Some((of.weight.scales, of.stage.scales));
                let zeros = of.weight.zeros.map(|zeros| (zeros, of.stage.zeros));
                let bytes = |(lines, to): (Rows<'k>, u32)| {
                    (lines, to, (left * lines.size).div_ceil(16) * 16)
                };
                [scales, zeros].into_iter().flatten().map(bytes).collect()
            }
        };
        let one = k.var(1u32);
        let count = blocks.iter().map(|&(_, inside)| k.select(inside, one, 0));
        let count = count.reduce(|a, b| a + b).expect("there is a warpgroup");
        let bytes = lines
            .iter()
            .fold(count * of.codes_bytes(), |sum, &(.., bytes)| sum + bytes * of.stage.groups);
        PackedTile { of, blocks, column, lines, bytes, to: self.base + self.smem.lhs }
    }

    /// The loop over the depth: see [`multiply`](Self::multiply).
    pub(super) fn multiply_packed(
        &self,
        of: &Packed<'k>,
        sums: &[Reg<'k, f32>],
        place: Cursor<'k>,
        tile: Tile<'k>,
        (thread, group): (Reg<'k, u32>, Reg<'k, u32>),
    ) {
        let (k, c) = (self.k, self.c);
        let thread = thread % WARPGROUP;
        let rhs = descriptor(self.base + self.smem.rhs, c.rhs, c.cols, c.depth());
        let Share { first, count } = self.share();
        // Each warp for itself: it has read its codes.
        let first_lane = (thread % 32).eq(0);
        let row = group * SLAB + thread / 32 * 16 + thread % 32 / 4;
        let [cols, _] = c.orient.order(self.size);
        let columns = [0, 8].map(|more| (tile.row * c.rows + row + more).min(cols - 1));
        let whole = of.scheme.group.is_none();
        let zero = |column| whole.then(|| of.weight.column_zero(column))?;
        let always = columns.map(|column| match zero(column) {
            Some(zero) => of.decoder.zero(zero),
            None => of.decoder.symmetric(),
        });
        let scales = whole.then(|| columns.map(|column| of.weight.column_scale(column)));
        let blocks = self.tile_blocks(of, tile.row * c.rows + group * SLAB, first);
        let load = || {
            let stage = self.base + place.stage * of.stage.bytes + self.smem.lhs;
            match of.scheme.codes.are_bytes() {
                true => Loaded::Lines(self.load_lines(stage + group * LINES, row - group * SLAB)),
                false => Loaded::Words(self.load_words(of, stage, [thread, group, row])),
            }
        };
        let decoding = |loaded: Loaded<'k>| match loaded {
            Loaded::Lines(codes) => self.decode_lines(of, codes, blocks.as_ref()),
            Loaded::Words(words) => self.decode_words(of, words, always),
        };
        // Two sets, of stages in turn.
        let set = || (0..c.depth() / STEP).map(|_| k.regs::<u32, 4>()).collect::<Vec<_>>();
        let (even, odd) = (set(), set());
        let decode_to = |to: &[Fragment<'k>], loaded| {
            let decoding = decoding(loaded);
            let all: Vec<_> = (0..to.len()).map(|step| decoding.fragment(step)).collect();
            // Those of blocks are for one stage.
            blocks.iter().for_each(|blocks| blocks.advance(of));
            to.iter().zip(all).for_each(|(to, from)| set_fragment(to, from));
        };
        // The barrier of the stage whose products were begun last.
        let before = Mbarrier::unset(k);
        // Begins a stage's products; gives its barrier.
        let begin = |from: &[Fragment<'k>], later: Reg<'k, bool>| {
            let done = place.done();
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            products(c.factor(), &[sums], c.depth(), later, |step| {
                ([LeftStep::Registers(from[step as usize])], b.operand(step))
            });
            place.advance();
            done
        };
        // The products of the stage before are done: that is free.
        let free = |done, later: Reg<'k, bool>| {
            k.when(first_lane & later, || before.arrive());
            before.set(done);
        };
        // Decodes the next stage meanwhile. What it has comes from shared memory during the wait.
        let after = |from: &[Fragment<'k>], to: &[Fragment<'k>], later| {
            let done = begin(from, later);
            place.wait();
            let loaded = load();
            k.wgmma_wait(1);
            free(done, later);
            decode_to(to, loaded);
        };
        // A warp waits at each product until the one before has its operand, and decodes a step of the next stage there.
        let between = |from: &[Fragment<'k>], to: &[Fragment<'k>], later: Reg<'k, bool>| {
            let done = place.done();
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            place.advance();
            place.wait();
            let decoding = decoding(load());
            for (step, (&from, to)) in from.iter().zip(to).enumerate() {
                let accumulate = if step == 0 { later.into() } else { Value::from(true) };
                let operands = |_| ([LeftStep::Registers(from)], b.operand(step as u32));
                products(c.factor(), &[sums], STEP, accumulate, operands);
                // As many groups ago the registers were read that this step goes to.
                k.wgmma_wait(c.depth() / STEP);
                set_fragment(to, decoding.fragment(step));
            }
            blocks.iter().for_each(|blocks| blocks.advance(of));
            free(done, later);
        };
        let go_on = |from: &[Fragment<'k>], to: &[Fragment<'k>], later| match c.interleaved {
            false => after(from, to, later),
            true => between(from, to, later),
        };
        let end = |from: &[Fragment<'k>], later| {
            let done = begin(from, later);
            // A group for each step and one for the last stage: where a block goes on with a tile, ptxas loses count of them.
            k.wgmma_wait(if c.interleaved { 0 } else { 1 });
            free(done, later);
        };
        place.wait();
        decode_to(&even, load());
        let others = count - 1;
        let yes = count.ge(1);
        k.for_(0, others / 2, 1, |i| {
            go_on(&even, &odd, i.ne(0));
            go_on(&odd, &even, yes);
        });
        k.if_else(
            (others % 2).eq(0),
            || end(&even, others.ne(0)),
            || {
                go_on(&even, &odd, others.ne(1));
                end(&odd, yes);
            },
        );
        k.wgmma_wait(0);
        k.when(first_lane, || before.arrive());
        if let Some(scales) = scales {
            sums.iter().enumerate().for_each(|(i, sum)| sum.scale(scales[i / 2 % 2]));
        }
    }

    /// What a thread of a warpgroup, whose first row of the tile is `row`, has of a stage of words at `stage`.
    fn load_words(
        &self,
        of: &Packed<'k>,
        stage: Reg<'k, u32>,
        [thread, group, row]: [Reg<'k, u32>; 3],
    ) -> Words<'k> {
        let (k, c) = (self.k, self.c);
        let Packed { scheme, stage: layout, .. } = *of;
        let words = k.ld_shared::<u32, 4>(stage + group * BLOCK_BYTES + thread * 16);
        let size = scheme.scale.size();
        let of_row = |place: u32| {
            let at = (stage + row * size).at((layout.scales + place * size).into());
            let zero = |()| k.ld_shared_u8((stage + row).at((layout.zeros + place).into()));
            (LoadedScale::load(k, scheme.scale, at), scheme.zeros.then_some(()).map(zero))
        };
        let groups = (0..layout.groups).map(|i| [0, 8].map(|more| of_row(i * c.rows + more)));
        Words { words, groups: groups.collect() }
    }

    /// How they become fragments.
    fn decode_words(
        &self,
        of: &Packed<'k>,
        Words { words, groups }: Words<'k>,
        always: [Offset<'k>; 2],
    ) -> Decoding<'k> {
        let (k, decoder) = (self.k, of.decoder);
        if groups.is_empty() {
            return Decoding::Words { words, decoder, always };
        }
        let (none, half) = (k.var(0x8000_8000u32), half(self.c));
        let of_row = |(scale, zero): (LoadedScale<'k>, Option<_>)| {
            let zero = zero.map_or(always[0], |zero| decoder.zero(zero));
            (Factors::new(k, half, scale), zero)
        };
        let groups = groups.into_iter().map(|both| both.map(of_row)).collect();
        Decoding::Scaled { words, decoder, groups, half, none }
    }
}

/// Makes the fragments of a stage, step by step.
pub(super) enum Decoding<'k> {
    /// Of words that are scaled in the end, with zero points that are the same for all of a column.
    Words { words: [Reg<'k, u32>; 4], decoder: Decoder<'k>, always: [Offset<'k>; 2] },
    /// Of words in groups, each with the scales and offsets of both of a lane's columns; `none` is two times −0.
    Scaled {
        words: [Reg<'k, u32>; 4],
        decoder: Decoder<'k>,
        groups: Vec<[(Factors<'k>, Offset<'k>); 2]>,
        half: Half,
        none: Reg<'k, u32>,
    },
    /// Of lines, with the scale of a block if there is one.
    Lines { codes: Codes<'k>, bytes: Bytes<'k>, scale: Option<Reg<'k, f32>> },
}

impl<'k> Decoding<'k> {
    fn fragment(&self, step: usize) -> Fragment<'k> {
        match self {
            Self::Words { words, decoder, always } => decoder.fragment(words[step], *always),
            Self::Scaled { words, decoder, groups, half, none } => {
                let [(first, low), (second, high)] = groups[step * groups.len() / words.len()];
                let [a, b, c, d] = decoder.fragment(words[step], [low, high]);
                let scale = |x, by: Factors<'k>| by.scale(*half, x, *none);
                [scale(a, first), scale(b, second), scale(c, first), scale(d, second)]
            }
            Self::Lines { codes, bytes, scale } => codes[step].map(|codes| match scale {
                Some(scale) => bytes.scaled(codes, *scale),
                None => bytes.pair(codes, false),
            }),
        }
    }
}

/// What a lane loads of a stage.
enum Loaded<'k> {
    Words(Words<'k>),
    Lines(Codes<'k>),
}

/// Of four bits: a word for each step, and of each group the scale and zero point of both of the lane's columns.
struct Words<'k> {
    words: [Reg<'k, u32>; 4],
    groups: Vec<[(LoadedScale<'k>, Option<Reg<'k, u32>>); 2]>,
}

/// A scale as it lies in memory.
#[derive(Clone, Copy)]
enum LoadedScale<'k> {
    Half(Half, Reg<'k, u16>),
    Float(Reg<'k, f32>),
}

impl<'k> LoadedScale<'k> {
    /// From shared memory.
    fn load(k: &'k Kernel, element: Element, at: Address<'k, u32>) -> Self {
        match element {
            Element::Half(half) => Self::Half(half, k.ld_shared::<u16, 1>(at)[0]),
            Element::F32 => Self::Float(k.ld_shared::<f32, 1>(at)[0]),
        }
    }
}

/// What both halves of a register are multiplied with: a scale as it is, or as the sum of two halves, where one has
/// too few bits for it.
#[derive(Clone, Copy)]
pub(super) struct Factors<'k> {
    scale: Reg<'k, u32>,
    rest: Option<Reg<'k, u32>>,
}

impl<'k> Factors<'k> {
    fn new(k: &'k Kernel, half: Half, scale: LoadedScale<'k>) -> Self {
        let scale = match scale {
            LoadedScale::Half(of, scale) if of == half => {
                return Self { scale: k.pack(scale, scale), rest: None };
            }
            LoadedScale::Half(of, scale) => k.widen(of, scale),
            LoadedScale::Float(scale) => scale,
        };
        let rounded = k.cvt_rn(half, scale);
        let rest = scale - k.widen(half, rounded);
        Self { scale: k.pack(rounded, rounded), rest: Some(k.cvt_rn_x2(half, rest, rest)) }
    }

    /// The products, rounded once, but for what is far below the last bit. `none` is two times −0.
    fn scale(&self, half: Half, x: Reg<'k, u32>, none: Reg<'k, u32>) -> Reg<'k, u32> {
        let k = x.kernel();
        let rest = self.rest.map_or(none, |rest| k.fma_x2(half, x, rest, none));
        k.fma_x2(half, x, self.scale, rest)
    }
}

impl<'k> PackedTile<'k> {
    /// Goes to stage `first` of the depth.
    pub fn begin(&self, first: Reg<'k, u32>) {
        if self.of.scheme.codes.are_bytes() {
            return;
        }
        let before = first.wide() * u64::from(BLOCK_BYTES);
        self.blocks.iter().for_each(|(from, _)| from.increase(before));
    }

    /// Copies a stage, number `at` of the depth.
    pub fn load(&self, stage: Reg<'k, u32>, at: Reg<'k, u32>, full: Mbarrier<'k>) {
        let (k, of) = (stage.kernel(), self.of);
        let to = stage * of.stage.bytes + self.to;
        if of.scheme.codes.are_bytes() {
            let row = at * BLOCK;
            for (i, &(map, inside)) in (0..).zip(&self.blocks) {
                let place = [row, self.column + i * SLAB];
                let to = to.at((i * LINES).into());
                let load = || k.tma_load(to, map, &place, full.address(), Delivery::Once);
                k.when(inside, load);
            }
            return;
        }
        for (i, &(from, inside)) in (0..).zip(&self.blocks) {
            let to = to.at((i * BLOCK_BYTES).into());
            k.when(inside, || k.bulk_load(to, from, BLOCK_BYTES, full.address(), Delivery::Once));
            from.increase(u64::from(BLOCK_BYTES));
        }
        let Some(rows) = of.scheme.group else { return };
        // Past the last group `x` is zero, and any scale will do.
        let last = of.k.div_ceil(rows) - 1;
        for number in 0..of.stage.groups {
            let group = (at * BLOCK / rows + number).min(last);
            for &(lines, begin, bytes) in &self.lines {
                let from = lines.at(group, self.column);
                let rows = (of.stage.scales / BLOCK_BYTES) * BLOCK;
                let to = to.at((begin + number * rows * lines.size).into());
                k.bulk_load(to, from, bytes, full.address(), Delivery::Plain);
            }
        }
    }
}
