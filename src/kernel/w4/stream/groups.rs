//! The scales and zero points of groups of rows: of a lane's columns, two of each 16.

use super::config::Config;
use super::copies::Operands;
use super::{STEP, Sums, by_tile};
use crate::kernel::Element;
use crate::kernel::ampere::swizzle::CHUNK;
use crate::kernel::w4::nibbles::Zero;
use crate::ptx::{Half, Kernel, Reg};

/// Those of a group, for each 16 columns of `W`.
#[derive(Clone)]
pub struct Group<'k> {
    scales: Scales<'k>,
    pub zeros: Option<Vec<[Zero<'k>; 2]>>,
}

#[derive(Clone)]
enum Scales<'k> {
    /// The same for all columns.
    All(Reg<'k, f32>),
    Floats(Vec<[Reg<'k, f32>; 2]>),
    /// Both in a register.
    Halves(Half, Vec<Reg<'k, u32>>),
}

impl<'k> Group<'k> {
    /// The only one of columns: of those past the last one anyone's.
    pub fn of_columns(
        c: &Config,
        operands: Operands<'k>,
        lane: Reg<'k, u32>,
        column: Reg<'k, u32>,
    ) -> Self {
        let first = column * c.cols + lane / 4;
        let weight = operands.weight;
        let of = |col| (first + col).min(weight.n - 1);
        let scales = Scales::Floats(by_tile(c.cols, |col| weight.column_scale(of(col))));
        let zeros = weight.zeros.map(|zeros| by_tile(c.cols, |col| zeros.column_zero(of(col))));
        Self { scales, zeros }
    }

    /// Of one scale.
    pub fn of_all(scale: Reg<'k, f32>) -> Self {
        Self { scales: Scales::All(scale), zeros: None }
    }

    /// Those of the slot at `stage`, of which there are `count`.
    pub fn load(
        k: &'k Kernel,
        c: &Config,
        stage: Reg<'k, u32>,
        lane: Reg<'k, u32>,
        count: u32,
    ) -> Vec<Self> {
        let (slot, tiles) = (c.slot(), c.cols / STEP);
        let all = count * tiles;
        let scales: Vec<_> = match c.scheme.scale {
            Element::F32 => {
                let size = Element::F32.size();
                let of_group = |group: u32| {
                    let at = stage + lane / 4 * size;
                    let first = slot.scales + group * c.cols * size;
                    let of =
                        |col: u32| k.ld_shared::<f32, 1>(at.at((first + col * size).into()))[0];
                    Scales::Floats(by_tile(c.cols, of))
                };
                (0..count).map(of_group).collect()
            }
            // Chunks of the first eight of 16 columns and of the others in turn.
            Element::Half(half) => columns(stage, slot.scales, lane, 2 * all)
                .chunks(tiles as usize)
                .map(|pairs| Scales::Halves(half, pairs.to_vec()))
                .collect(),
        };
        // Chunks of 16 columns, each of the first eight followed by the one eight further.
        let zeros = match c.scheme.zeros {
            true => columns(stage, slot.zeros, lane, all),
            false => vec![],
        };
        let of_tile = |tile: u32| {
            let bytes = zeros[tile as usize / 2];
            [0, 1].map(|right| Zero { bytes, byte: tile % 2 * 2 + right })
        };
        let of_group = |(group, scales): (u32, _)| {
            let tiles = group * tiles..(group + 1) * tiles;
            Self { scales, zeros: c.scheme.zeros.then(|| tiles.map(of_tile).collect()) }
        };
        (0..).zip(scales).map(of_group).collect()
    }

    /// Adds the sums of the group, times its scales, to totals.
    pub fn add_scaled(&self, totals: &Sums<'k>, sums: &Sums<'k>) {
        for (tile, (totals, sums)) in totals.iter().zip(sums).enumerate() {
            let scales = self.of_tile(tile);
            let all = totals.iter().flatten().zip(sums.iter().flatten()).enumerate();
            all.for_each(|(i, (total, sum))| total.set(sum.fma(scales[i / 2 % 2], *total)));
        }
    }

    /// Multiplies sums with the scales.
    pub fn scale(&self, sums: &Sums<'k>) {
        for (tile, sums) in sums.iter().enumerate() {
            let scales = self.of_tile(tile);
            sums.iter().flatten().enumerate().for_each(|(i, sum)| sum.scale(scales[i / 2 % 2]));
        }
    }

    /// The scales of both of the lane's columns of 16.
    fn of_tile(&self, tile: usize) -> [Reg<'k, f32>; 2] {
        match &self.scales {
            Scales::All(scale) => [*scale; 2],
            Scales::Floats(scales) => scales[tile],
            Scales::Halves(half, pairs) => {
                let pair = pairs[tile];
                pair.kernel().unpack(*half, pair)
            }
        }
    }
}

/// Of each of `count` chunks from `first` on, an even number of them, the 16 bits that belong to the lane's columns, of two
/// chunks in a register: transposed, a matrix whose rows are both in turn has them there.
fn columns<'k>(
    stage: Reg<'k, u32>,
    first: u32,
    lane: Reg<'k, u32>,
    count: u32,
) -> Vec<Reg<'k, u32>> {
    let k = lane.kernel();
    let pairs = count / 2;
    // Of fewer than four matrices, some are loaded again.
    let chunk = lane / 8 % pairs.clamp(1, 4) * 2 + lane % 2;
    let at = stage + chunk * CHUNK;
    let four = |pair: u32| k.ldmatrix(at.at((first + pair * 2 * CHUNK).into()), true);
    let loaded = (0..pairs).step_by(4).flat_map(four);
    loaded.take(pairs as usize).collect()
}
