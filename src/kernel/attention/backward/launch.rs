//! The numbers of a launch.

use super::super::{Lengths, MAX_LENGTH, Mask, Problem, TileOrder};
use super::Side;
use crate::kernel::plan::count;

/// The part of a configuration that says which tiles there are.
#[derive(Clone, Copy, Debug)]
pub struct TileShape {
    /// What rows are.
    pub side: Side,
    /// Rows of a tile.
    pub rows: u32,
    /// Columns of a block.
    pub cols: u32,
    /// What hides keys.
    pub mask: Mask,
    /// How long sequences are.
    pub lengths: Lengths,
    /// Blocks of threads that share a multiprocessor.
    pub blocks_per_sm: u32,
    /// Whether they are persistent, and take tile after tile. Else each takes one.
    pub persistent: bool,
    /// Whether tiles wait for those of their head before them.
    pub ordered: bool,
    /// Bytes of what tiles of a head read and add to, and that is meant to stay in L2, for each column.
    pub bytes_of_column: u64,
    /// How much of L2 they have.
    pub section_bytes: u64,
}

/// The numbers of a launch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Launch {
    /// The order of tiles. Heads are those of the tiles' side.
    pub order: TileOrder,
    /// As of [`super::super::Launch`].
    pub left: i32,
    /// The same.
    pub right: i32,
    /// Blocks of the grid.
    pub blocks: u32,
}

impl Launch {
    /// The launch of a configuration on a problem.
    pub fn new(tile_shape: &TileShape, problem: &Problem, multiprocessors: u32) -> Self {
        let each = problem.each();
        let (heads, rows, cols) = match tile_shape.side {
            Side::Queries => (problem.heads, problem.queries, each.keys),
            Side::Keys => (problem.kv_heads, problem.keys, each.queries),
        };
        let tile = u64::from(tile_shape.rows);
        let (heads, columns) = match tile_shape.lengths {
            Lengths::Full | Lengths::Padded => (heads * problem.batch, rows.div_ceil(tile)),
            // The last tile of each sequence may be cut off.
            Lengths::Packed => (heads, rows.div_ceil(tile) + problem.batch),
        };
        let tiles = heads.saturating_mul(columns);
        let room = multiprocessors * tile_shape.blocks_per_sm;
        // Under a causal mask the tiles of a head differ, so the tiles of several heads are sorted: of as many
        // as L2 has room for, of a sequence that is packed, and of two rounds of blocks or about that, which the order
        // relies on.
        let section = match tile_shape.mask {
            Mask::Right => {
                let bytes = cols.max(1) * tile_shape.bytes_of_column.max(1);
                let fit = (tile_shape.section_bytes / bytes).max(1);
                let rounds = (u64::from(2 * room) * 19 / 20).div_ceil(columns.max(1));
                (1 << fit.ilog2()).max(rounds.next_power_of_two())
            }
            // Of tiles that are taken together each is another head's, as long as there are enough: those of one head
            // wait for one another.
            Mask::None | Mask::Window if tile_shape.ordered => {
                (u64::from(room) / columns.max(1)).max(1)
            }
            Mask::None | Mask::Window => 1,
        };
        let width = |keys: Option<u64>| keys.unwrap_or(MAX_LENGTH).min(MAX_LENGTH) as i32;
        Self {
            order: TileOrder {
                heads: count(heads),
                columns: count(columns),
                tiles: count(tiles),
                section: count(section.min(heads)),
            },
            left: width(problem.left),
            right: width(problem.right),
            blocks: if tile_shape.persistent { count(tiles).min(room) } else { count(tiles) },
        }
    }
}
