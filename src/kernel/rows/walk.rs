//! From row to row.

use super::{Slots, Team, Tile};
use crate::kernel::Element;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Kernel, Reg};

/// Rows of which a team has one at a time, by what is parallel to a warp: threads of a warp go together.
pub(in crate::kernel) struct Walk<'k> {
    pub k: &'k Kernel,
    pub tile: Tile,
    rows: Reg<'k, u32>,
    /// The first of the warp's rows.
    pub first: Reg<'k, u32>,
    /// A thread's row after that, in a warp that has several.
    offset: Option<Reg<'k, u32>>,
    pub team: Team<'k>,
    /// The thread's number in its team.
    lane: Reg<'k, u32>,
}

/// A row, and whether it exists, in a warp that has several.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Row<'k> {
    pub number: Reg<'k, u32>,
    pub exists: Option<Reg<'k, bool>>,
}

impl<'k> Walk<'k> {
    /// Of blocks of `threads` threads.
    pub fn new(k: &'k Kernel, tile: Tile, threads: u32, rows: Reg<'k, u32>) -> Self {
        let (thread, together) = (k.thread(), tile.team.max(WARP));
        let of_warp = together / tile.team;
        Self {
            k,
            tile,
            rows,
            first: k.block_x() * (threads / tile.team) + thread / together * of_warp,
            offset: (of_warp > 1).then(|| thread % WARP / tile.team),
            team: Team::new(thread, tile.team, threads),
            lane: thread % tile.team,
        }
    }

    /// The thread's row, where the warp's first one is `first`.
    pub fn row(&self, first: Reg<'k, u32>) -> Row<'k> {
        match self.offset {
            None => Row { number: first, exists: None },
            Some(offset) => {
                let number = first + offset;
                Row { number, exists: Some(number.lt(self.rows)) }
            }
        }
    }

    /// The thread's units of a part of its row.
    pub fn slots(&self, before: Option<Reg<'k, u32>>, units: Reg<'k, u32>) -> Slots<'k> {
        let first = before.map_or(self.lane, |before| before + self.lane);
        Slots::new(self.k, self.tile, first, units)
    }

    /// What a row has one f32 of.
    pub fn load(&self, from: Reg<'k, u64>, row: Row<'k>) -> Reg<'k, f32> {
        let number = row.exists.map_or(row.number, |_| row.number.min(self.rows - 1));
        let [x] = self.k.ld_global_nc::<f32, 1>(from.element(number, 4));
        x
    }

    /// Stores some f32 of a row.
    pub fn store<const N: usize>(&self, to: Reg<'k, u64>, row: Row<'k>, values: [Reg<'k, f32>; N]) {
        let first = self.lane.eq(0);
        let stores = row.exists.map_or(first, |exists| first & exists);
        let to = to.element(row.number, 4 * N as u32);
        self.k.when(stores, || self.k.st_global(to, values));
    }
}

/// The address of a row of elements of a size.
pub(in crate::kernel) fn begin<'k>(
    (address, stride): (Reg<'k, u64>, Reg<'k, u64>),
    row: Reg<'k, u32>,
    element: Element,
) -> Reg<'k, u64> {
    address + row.wide() * stride * u64::from(element.size())
}
