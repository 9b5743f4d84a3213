//! A left operand of four bits, `Wᵀ`: the producer copies codes as they lie in memory, and warpgroups turn them into
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
//! A scale for a whole column multiplies sums in the end.

use super::config::Config;
use super::{Gemm, descriptor};
use crate::kernel::Element;
use crate::kernel::gemm::share::Share;
use crate::kernel::hopper::barriers::Mbarrier;
use crate::kernel::hopper::product::{LeftStep, products};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{SLAB, WARPGROUP};
use crate::kernel::raster::Tile;
use crate::kernel::w4::nibbles::{Decoder, Offset};
use crate::kernel::w4::weight::{Rows, Weight};
use crate::kernel::w4::{BLOCK, BLOCK_BYTES, Scheme};
use crate::ptx::{Address, Delivery, Factor, Half, Kernel, Reg};

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
    scheme: Scheme,
    stage: PackedStage,
    pub weight: Weight<'k>,
    /// Rows of `W`.
    k: Reg<'k, u32>,
    decoder: Decoder<'k>,
}

/// What a producer copies of a tile.
pub(super) struct PackedTile<'k> {
    of: Packed<'k>,
    /// The next block of codes of each warpgroup, and whether there is one.
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
            let block = (column / BLOCK).mul_wide(self.depth);
            (k.var(of.weight.codes + block * u64::from(BLOCK_BYTES)), column.lt(cols))
        });
        let blocks: Vec<_> = blocks.collect();
        // As far as there are columns, in units of 16 bytes: rows of groups have whole ones.
        let left = (cols.max(column) - column).min(c.rows);
        let lines = match of.scheme.group {
            None => vec![],
            Some(_) => {
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
            .fold(count * BLOCK_BYTES, |sum, &(.., bytes)| sum + bytes * of.stage.groups);
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
        let Share { count, .. } = self.share();
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
        let decode = || self.decode(of, place.stage, [thread, group, row], always);
        let multiply = |fragments: &[[Reg<'k, u32>; 4]], accumulate: Reg<'k, bool>| {
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            products(c.factor(), &[sums], c.depth(), accumulate, |step| {
                ([LeftStep::Registers(fragments[step as usize])], b.operand(step))
            });
        };
        // Two sets, of stages in turn.
        let set = || (0..c.depth() / 16).map(|_| k.regs::<u32, 4>()).collect::<Vec<_>>();
        let (even, odd) = (set(), set());
        let decode_to = |to: &[[Reg<'k, u32>; 4]]| {
            let both = to.iter().flatten().zip(decode().into_iter().flatten());
            both.for_each(|(to, from)| to.set(from));
        };
        // The barrier of the stage whose products were begun last.
        let before = Mbarrier::unset(k);
        // Begins a stage's products, and waits for those of the one before, whose fragments and stage are free then.
        let begin = |from: &[[Reg<'k, u32>; 4]], later: Reg<'k, bool>| {
            let done = place.done();
            multiply(from, later);
            place.advance();
            k.wgmma_wait(1);
            k.when(first_lane & later, || before.arrive());
            before.set(done);
        };
        // Decodes the next stage meanwhile.
        let go_on = |from: &[[Reg<'k, u32>; 4]], to: &[[Reg<'k, u32>; 4]], later| {
            begin(from, later);
            place.wait();
            decode_to(to);
        };
        place.wait();
        decode_to(&even);
        let others = count - 1;
        let yes = count.ge(1);
        k.for_(0, others / 2, 1, |i| {
            go_on(&even, &odd, i.ne(0));
            go_on(&odd, &even, yes);
        });
        k.if_else(
            (others % 2).eq(0),
            || begin(&even, others.ne(0)),
            || {
                go_on(&even, &odd, others.ne(1));
                begin(&odd, yes);
            },
        );
        k.wgmma_wait(0);
        k.when(first_lane, || before.arrive());
        if let Some(scales) = scales {
            sums.iter().enumerate().for_each(|(i, sum)| sum.scale(scales[i / 2 % 2]));
        }
    }

    /// The fragments of a stage, for a thread of a warpgroup whose first row of the tile is `row`.
    fn decode(
        &self,
        of: &Packed<'k>,
        stage: Reg<'k, u32>,
        [thread, group, row]: [Reg<'k, u32>; 3],
        always: [Offset<'k>; 2],
    ) -> Vec<[Reg<'k, u32>; 4]> {
        let (k, c) = (self.k, self.c);
        let Packed { scheme, stage: layout, decoder, .. } = *of;
        let stage = self.base + stage * layout.bytes + self.smem.lhs;
        let words = k.ld_shared::<u32, 4>(stage + group * BLOCK_BYTES + thread * 16);
        if scheme.group.is_none() {
            return words.map(|word| decoder.fragment(word, always)).into();
        }
        let (none, half) = (k.var(0x8000_8000u32), half(c));
        let size = scheme.scale.size();
        let scales = stage + row * size;
        let zeros = stage + row;
        let groups: Vec<_> = (0..layout.groups)
            .map(|number| {
                let of_row = |more: u32| {
                    let place = number * c.rows + more;
                    let at = scales.at((layout.scales + place * size).into());
                    let scale = Factors::load(k, half, scheme.scale, at);
                    let zero = scheme.zeros.then(|| {
                        let at = zeros.at((layout.zeros + place).into());
                        decoder.zero(k.ld_shared_u8(at))
                    });
                    (scale, zero.unwrap_or(always[0]))
                };
                [of_row(0), of_row(8)]
            })
            .collect();
        let steps = words.len() as u32 / layout.groups;
        let fragment = |(step, word)| {
            let [(first, low), (second, high)] = groups[(step / steps) as usize];
            let [a, b, c, d] = decoder.fragment(word, [low, high]);
            let scale = |x, by: Factors<'k>| by.scale(half, x, none);
            [scale(a, first), scale(b, second), scale(c, first), scale(d, second)]
        };
        (0..).zip(words).map(fragment).collect()
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
    /// From shared memory.
    fn load(k: &'k Kernel, half: Half, element: Element, at: Address<'k, u32>) -> Self {
        let scale = match element {
            Element::Half(of) => {
                let [scale] = k.ld_shared::<u16, 1>(at);
                if of == half {
                    return Self { scale: k.pack(scale, scale), rest: None };
                }
                k.widen(of, scale)
            }
            Element::F32 => k.ld_shared::<f32, 1>(at)[0],
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
        let before = first.wide() * u64::from(BLOCK_BYTES);
        self.blocks.iter().for_each(|(from, _)| from.increase(before));
    }

    /// Copies a stage, number `at` of the depth.
    pub fn load(&self, stage: Reg<'k, u32>, at: Reg<'k, u32>, full: Mbarrier<'k>) {
        let (k, of) = (stage.kernel(), self.of);
        let to = stage * of.stage.bytes + self.to;
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
