//! The numbers of a launch.

use super::combine::MAX_PARTS;
use super::{Lengths, Mask, Problem, TileOrder, Variant};
use crate::kernel::plan::count;

/// Sequences, and the widths of masks, are shorter: the sum of three is a number of 32 bits.
pub const MAX_LENGTH: u64 = 1 << 29;

/// The part of a configuration that says which tiles there are.
#[derive(Clone, Copy, Debug)]
pub struct TileShape {
    /// What is computed.
    pub variant: Variant,
    /// Queries of each head in a tile.
    pub positions: u32,
    /// Keys of a block.
    pub keys: u32,
    /// Blocks of threads that share a multiprocessor.
    pub blocks_per_sm: u32,
    /// Whether they are persistent, and take tile after tile. Else each takes one.
    pub persistent: bool,
    /// Bytes of keys and values that are meant to stay in L2 together.
    pub section_bytes: u64,
}

/// The numbers of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The order of tiles.
    pub order: TileOrder,
    /// Parts of the keys of a tile: 1 unless the configuration splits them.
    pub parts: u32,
    /// Query `i` sees keys from `i + o - left` on, where that is a parameter.
    pub left: i32,
    /// Query `i` sees keys up to `i + o + right`, where that is a parameter.
    pub right: i32,
    /// Blocks of the grid.
    pub blocks: u32,
}

impl Launch {
    /// The launch of a configuration on a problem.
    pub fn new(config: impl Into<TileShape>, problem: &Problem, multiprocessors: u32) -> Self {
        let tile_shape = config.into();
        let room = multiprocessors * tile_shape.blocks_per_sm;
        let packs = problem.heads / u64::from(tile_shape.variant.pack);
        let positions = u64::from(tile_shape.positions);
        let (heads, each) = match tile_shape.variant.lengths {
            Lengths::Full | Lengths::Padded => {
                (packs * problem.batch, problem.queries.div_ceil(positions))
            }
            // The last tile of each sequence may be cut off.
            Lengths::Packed => (packs, problem.queries.div_ceil(positions) + problem.batch),
        };
        let parts = match tile_shape.variant.split {
            false => 1,
            true => {
                let blocks = problem.seen_keys(positions).div_ceil(tile_shape.keys.into());
                let most = blocks.min(MAX_PARTS.into());
                let parts = u64::from(room) / heads.saturating_mul(each).max(1);
                // No part without blocks.
                blocks.div_ceil(blocks.div_ceil(parts.clamp(1, most)))
            }
        };
        let tiles = heads.saturating_mul(each * parts);
        let section = match tile_shape.variant.mask {
            Mask::Right => {
                let bytes =
                    (problem.head_dim + problem.value_dim) * u64::from(problem.element.size());
                let group =
                    (problem.heads / problem.kv_heads / u64::from(tile_shape.variant.pack)).max(1);
                let keys = problem.each().keys;
                let most = (tile_shape.section_bytes / (keys * bytes).max(1)).max(1) * group;
                // Tiles of packed heads are those of all sequences, which no order of columns sorts.
                let packed = tile_shape.variant.lengths == Lengths::Packed;
                match tile_shape.persistent && !packed {
                    true => two_rounds(each * parts, room.into(), group).min(most),
                    false => most,
                }
            }
            Mask::None | Mask::Window => 1,
        };
        let width = |keys: Option<u64>| keys.unwrap_or(MAX_LENGTH).min(MAX_LENGTH) as i32;
        Self {
            order: TileOrder {
                heads: count(heads),
                columns: count(each * parts),
                tiles: count(tiles),
                section: count(section.min(heads)),
            },
            parts: count(parts),
            left: width(problem.left),
            right: width(problem.right),
            blocks: if tile_shape.persistent { count(tiles).min(room) } else { count(tiles) },
        }
    }
}

/// Heads whose tiles are sorted together, as those of a head differ under a causal mask: a multiple of `group`, which share
/// their keys and values.
///
/// Two rounds of `columns` tiles of each: what the first one gives a block more than others the second one takes back, and what
/// it reads of keys and values is still in L2 for the second one. With four rounds, at S = 512, a third of it was not, while
/// results of others passed through.
fn two_rounds(columns: u64, blocks: u64, group: u64) -> u64 {
    let of_group = columns.saturating_mul(group).max(1);
    let nearest = ((2 * blocks + of_group / 2) / of_group).max(1);
    // No less than 1.9 rounds: those who turn around after one would have the longest tiles of each.
    let few = nearest.saturating_mul(of_group).saturating_mul(10) < 19 * blocks;
    (nearest + u64::from(few)) * group
}
