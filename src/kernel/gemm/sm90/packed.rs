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
use crate::kernel::w4::nibbles::{Decoder, Offset, Table, Zero};
use crate::kernel::w4::weight::{Rows, Weight};
use crate::kernel::w4::{BLOCK, BLOCK_BYTES, Scheme};
use crate::ptx::{Address, Delivery, Factor, Half, Kernel, Reg};

/// The table of nf4: with a wide one there were fewer stages, and 2048 rows of 8192² took 496 µs instead of 341 (H200).
pub const TABLE: Table = Table::Narrow;

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
    pub depth: Reg<'k, u32>,
    pub decoder: Decoder<'k>,
}

/// The left operands of all steps of a stage.
pub(super) type Fragments<'k> = Vec<[Reg<'k, u32>; 4]>;

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
        let (k, scheme) = (table.kernel(), c.weight.expect("it is one"));
        Self {
            scheme,
            stage: PackedStage::new(&scheme, c.rows),
            weight,
            depth,
            decoder: Decoder::new(k, half(c), scheme.codes, (TABLE, table), c.threads()),
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
        let blocks = (0..c.team()).map(|i| {
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
        let (group, team) = match c.teams {
            1 => (group, None),
            _ => (group % c.team(), Some(group / c.team())),
        };
        let rhs = descriptor(self.base + self.smem.rhs, c.rhs, c.cols, c.depth());
        let Share { first, count } = self.share();
        // A team takes each so many stages of the one tile that there is, from its own first on.
        let (first, count) = match team {
            None => (first, count),
            Some(team) => {
                place.skip(team);
                (first + team, (count + (c.teams - 1) - team) / c.teams)
            }
        };
        // Each warp for itself: it has read its codes.
        let first_lane = (thread % 32).eq(0);
        let row = group * SLAB + thread / 32 * 16 + thread % 32 / 4;
        let [cols, _] = c.orient.order(self.size);
        let columns = [0, 8].map(|more| (tile.row * c.rows + row + more).min(cols - 1));
        let whole = of.scheme.group.is_none();
        let zeros = of.weight.zeros.filter(|_| whole);
        let always = columns.map(|column| match zeros {
            Some(zeros) => of.decoder.zero(zeros.column_zero(column)),
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
        let decode = |loaded: Loaded<'k>| match loaded {
            Loaded::Lines(codes) => self.decode_lines(of, &codes, blocks.as_ref()),
            Loaded::Words(words) => self.decode_words(of, &words, always),
        };
        let multiply = |fragments: &[[Reg<'k, u32>; 4]], accumulate: Reg<'k, bool>| {
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            products(c.factor(), &[sums], c.depth(), accumulate, |step| {
                ([LeftStep::Registers(fragments[step as usize])], b.operand(step))
            });
        };
        // Two sets, of stages in turn.
        let set = || (0..c.depth() / 16).map(|_| k.regs::<u32, 4>()).collect::<Vec<_>>();
        let (even, odd) = (set(), set());
        let decode_to = |to: &[[Reg<'k, u32>; 4]], loaded| {
            let both = to.iter().flatten().zip(decode(loaded).into_iter().flatten());
            both.for_each(|(to, from)| to.set(from));
        };
        // The barrier of the stage whose products were begun last.
        let before = Mbarrier::unset(k);
        // Begins a stage's products; gives its barrier.
        let begin = |from: &[[Reg<'k, u32>; 4]], later: Reg<'k, bool>| {
            let done = place.done();
            multiply(from, later);
            match c.teams {
                1 => place.advance(),
                teams => place.skip(k.var(teams)),
            }
            done
        };
        // Waits for the products of the stage before, whose fragments and stage are free then.
        let settle = |done, later: Reg<'k, bool>| {
            k.wgmma_wait(1);
            k.when(first_lane & later, || before.arrive());
            before.set(done);
        };
        // Decodes the next stage meanwhile. What it has comes from shared memory during the wait.
        let go_on = |from: &[[Reg<'k, u32>; 4]], to: &[[Reg<'k, u32>; 4]], later| {
            let done = begin(from, later);
            place.wait();
            let loaded = load();
            settle(done, later);
            decode_to(to, loaded);
        };
        let end = |from: &[[Reg<'k, u32>; 4]], later| settle(begin(from, later), later);
        let multiply_all = || {
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
        };
        match team {
            None => multiply_all(),
            // There may be fewer stages than teams.
            Some(_) => {
                k.if_else(count.eq(0), || sums.iter().for_each(|sum| sum.set(0.0)), multiply_all)
            }
        }
        if let Some(scales) = scales {
            // Before the scales, of which that many times may be infinite.
            if let Some(by) = of.decoder.of_sums() {
                sums.iter().for_each(|sum| sum.scale(by));
            }
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
        // Those of both of the lane's columns follow each other, at the `zero_place` of the first.
        let both = stage + (row + row % 8);
        let of_group = |group: u32| {
            let place = group * c.rows;
            let zeros = || k.ld_shared_u16(both.at((layout.zeros + place).into()));
            let bytes = scheme.zeros.then(zeros);
            [0, 1].map(|right| {
                let place = place + right * 8;
                let at = (stage + row * size).at((layout.scales + place * size).into());
                let zero = bytes.map(|bytes| Zero { bytes, byte: right });
                (LoadedScale::load(k, scheme.scale, at), zero)
            })
        };
        Words { words, groups: (0..layout.groups).map(of_group).collect() }
    }

    /// The fragments.
    fn decode_words(
        &self,
        of: &Packed<'k>,
        Words { words, groups }: &Words<'k>,
        always: [Offset<'k>; 2],
    ) -> Fragments<'k> {
        let (k, decoder) = (self.k, of.decoder);
        if groups.is_empty() {
            return words.map(|word| decoder.fragment(word, always)).into();
        }
        let (none, half) = (k.var(0x8000_8000u32), half(self.c));
        let of_row = |&(scale, zero): &(LoadedScale<'k>, Option<_>)| {
            let zero = zero.map_or(always[0], |zero| decoder.zero(zero));
            (Factors::new(k, half, scale), zero)
        };
        let groups: Vec<_> = groups.iter().map(|both| both.each_ref().map(of_row)).collect();
        let steps = words.len() / groups.len();
        let fragment = |(step, &word)| {
            let [(first, low), (second, high)] = groups[step / steps];
            let [a, b, c, d] = decoder.fragment(word, [low, high]);
            let scale = |x, by: Factors<'k>| by.scale(half, x, none);
            [scale(a, first), scale(b, second), scale(c, first), scale(d, second)]
        };
        words.iter().enumerate().map(fragment).collect()
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
    groups: Vec<[(LoadedScale<'k>, Option<Zero<'k>>); 2]>,
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
struct Factors<'k> {
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

    /// Copies a stage, number `at` of the depth, and goes on by `step` of them.
    pub fn load(&self, stage: Reg<'k, u32>, at: Reg<'k, u32>, step: u32, full: Mbarrier<'k>) {
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
            from.increase(u64::from(step * BLOCK_BYTES));
        }
        let Some(rows) = of.scheme.group else { return };
        // Past the last group `x` is zero, and any scale will do.
        let last = of.depth.div_ceil(rows) - 1;
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
