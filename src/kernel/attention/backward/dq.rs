//! The gradient of the queries, of its sums: scaled, rounded, and in the order of rows.

use super::super::{Lengths, Mask, Name};
use super::sums::{DqSums, OCTET, PLANE};
use super::work::{Tiles, WorkTile};
use super::{Side, TileShape};
use crate::kernel::Element;
use crate::kernel::hopper::{Lane, SLAB, WARPGROUP};
use crate::kernel::name::given;
use crate::ptx::{Kernel, Reg, Source, Target};

/// Warpgroups whose registers are in a block of sums.
const GROUPS: u32 = 2;

/// All choices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Config {
    /// The result's type: f16 or bf16.
    pub element: Element,
    /// Elements of a query: a multiple of 8.
    pub head_dim: u32,
    /// Columns of a warpgroup's sums: a multiple of 16.
    pub columns: u32,
    /// Queries of a block: 64, or 128 where each warpgroup has half of them and not of the columns.
    pub queries: u32,
    /// How long sequences are.
    pub lengths: Lengths,
    /// They are sums of the portable kernels, on any GPU.
    pub portable: bool,
}

impl Config {
    /// `flash dq 64x128 by 64, bf16 packed portable`: queries and columns of a block, columns of a warpgroup; type
    /// and lengths, whose sums.
    pub fn name(&self) -> String {
        let Self { element, head_dim, columns, queries, lengths, portable } = self;
        let portable = given(*portable, " portable");
        let lengths = match lengths {
            Lengths::Full => "",
            Lengths::Padded => " padded",
            Lengths::Packed => " packed",
        };
        format!("flash dq {queries}x{head_dim} by {columns}, {}{lengths}{portable}", element.name())
    }

    /// Bytes of a block of sums. Where warpgroups divide columns, the second one's end with the head's.
    pub fn bytes(&self) -> u32 {
        let columns = match self.by_rows() {
            true => GROUPS * self.columns,
            false => self.head_dim.next_multiple_of(16),
        };
        SLAB * columns * 4
    }

    /// Whether each warpgroup has half of the queries, and not of the columns.
    fn by_rows(&self) -> bool {
        self.queries > SLAB
    }

    /// The tiles of a launch.
    pub fn tile_shape(&self) -> TileShape {
        TileShape {
            side: Side::Queries,
            rows: self.queries,
            cols: SLAB,
            mask: Mask::None,
            lengths: self.lengths,
            blocks_per_sm: 1,
            persistent: false,
            ordered: false,
            bytes_of_column: 0,
            section_bytes: 0,
        }
    }
}

/// The kernel. Its parameters are those of [`Name`]; strides of the result are multiples of 16 bytes.
pub fn emit(config: &Config) -> Source {
    let target = if config.portable { Target::Sm80 } else { Target::Sm90a };
    let k = &Kernel::new("attention_dq", target, GROUPS * WARPGROUP);
    let out = k.pointer(Name::DqAt);
    let strides = [Name::DqRow, Name::DqHead, Name::DqBatch].map(|name| k.param::<u64>(name));
    let scale = k.param::<f32>(Name::GradScale);
    let tiles = Tiles::params(k, config.tile_shape());
    let of_block = [config.queries, config.bytes()];
    let sums = DqSums::params(k, config.lengths, of_block, tiles.size[0], tiles.sequences());
    if !config.portable {
        k.griddepcontrol_wait();
        k.griddepcontrol_launch_dependents();
    }
    tiles.with_own(|work| round(k, config, &tiles, sums, &work, (out, strides), scale));
    k.finish()
}

/// Stores a block.
fn round<'k>(
    k: &'k Kernel,
    c: &Config,
    tiles: &Tiles<'k>,
    sums: DqSums<'k>,
    work: &WorkTile<'k>,
    (out, [row, head, batch]): (Reg<'k, u64>, [Reg<'k, u64>; 3]),
    scale: Reg<'k, f32>,
) {
    let Element::Half(half) = c.element else { panic!("sums are of 16-bit operands") };
    let thread = k.thread();
    let (group, Lane { lane, warp }) = (thread / WARPGROUP, Lane::new(thread));
    let of_head = work.batch * tiles.heads[0] + work.head;
    let first = sums.first(of_head, work.sequence, work.queries);
    let from = sums.block(first + work.first.cast::<u32>() / c.queries);
    let bytes = if c.portable { 4 } else { 16 };
    let from = from + group.mul_wide(SLAB * c.columns * 4) + (thread % WARPGROUP).mul_wide(bytes);
    let by_rows = c.by_rows();
    let first = warp * 16 + lane / 4;
    let first = work.first + (if by_rows { group * SLAB + first } else { first }).cast();
    // Of 16 columns, in two parts of 8, a lane stores four of one row that lie side by side.
    let odd = (lane % 2).ne(0);
    let column = lane % 4 * 2 + lane % 2 * 6;
    let column = if by_rows { column } else { column + group * c.columns };
    // The second warpgroup's columns may end before a block's, or it has none.
    let all = by_rows || GROUPS * c.columns <= c.head_dim.next_multiple_of(16);
    let loaded: Vec<_> = (0..c.columns / 8)
        .map(|i| {
            let octet = from.at((i * OCTET).into());
            let load = || match c.portable {
                true => [0, 1, 2, 3].map(|number| {
                    let [sum] = k.ld_global::<f32, 1>(octet.at((number * PLANE).into()));
                    sum
                }),
                false => k.ld_global::<f32, 4>(octet),
            };
            match all {
                true => load(),
                false => k.when((group * c.columns + 8 * i).lt(c.head_dim), load),
            }
        })
        .collect();
    for h in 0..2 {
        let position = if h == 0 { first } else { first + 8 };
        let (inside, some) = tiles.stored(Side::Queries, position, work.queries.count);
        let to = work.batch.wide() * batch + work.head.wide() * head + column.wide();
        let to = out + (to + work.queries.at(position).wide() * row) * u64::from(c.element.size());
        let scaled = |sum: Reg<'k, f32>| {
            let scaled = sum * scale;
            some.map_or(scaled, |some| k.select(some, scaled, 0.0))
        };
        for (i, pair) in (0..).zip(loaded.chunks(2)) {
            let [a, b] = [0, 1].map(|part| {
                let quad = pair[part];
                k.cvt_rn_x2(half, scaled(quad[2 * h]), scaled(quad[2 * h + 1]))
            });
            let four = four(k, odd, a, b);
            let store = || k.st_global(to.at(i * 32), four);
            let width = if by_rows { c.columns } else { GROUPS * c.columns };
            let inside = match width <= c.head_dim {
                true => inside,
                false => inside & (column + 16 * i as u32).lt(c.head_dim),
            };
            k.when(inside, store);
        }
    }
}

/// Of two pairs of each lane, of 8 columns each, two that lie side by side: even lanes have the first 8
/// columns'.
fn four<'k>(
    k: &'k Kernel,
    odd: Reg<'k, bool>,
    a: Reg<'k, u32>,
    b: Reg<'k, u32>,
) -> [Reg<'k, u32>; 2] {
    let kept = k.select(odd, b, a);
    let got = k.shfl_bfly(k.select(odd, a, b), 1);
    [k.select(odd, got, kept), k.select(odd, kept, got)]
}
