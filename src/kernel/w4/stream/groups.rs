//! The scales and zero points of groups of rows: of a lane's columns, two of each 16.

use super::config::Config;
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
    /// One for all columns.
    All(Reg<'k, f32>),
    Floats(Vec<[Reg<'k, f32>; 2]>),
    /// Both in a register.
    Halves(Half, Vec<Reg<'k, u32>>),
}

impl<'k> Group<'k> {
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
            let scales = match &self.scales {
                Scales::All(scale) => [*scale; 2],
                Scales::Floats(scales) => scales[tile],
                Scales::Halves(half, pairs) => {
                    let pair = pairs[tile];
                    pair.kernel().unpack(*half, pair)
                }
            };
            for (total, sum) in totals.iter().zip(sums) {
                for (i, (total, sum)) in total.iter().zip(sum).enumerate() {
                    total.set(sum.fma(scales[i / 2], *total));
                }
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
