//! How the threads of a team hold a row.

use super::unit::{Loaded, Unit};
use crate::kernel::Element;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::{Address, Kernel, Reg};

/// The part of a row that a team holds: of each thread `chunks` units, a team apart from each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// Elements of a unit: one, or as many as 16 bytes hold.
    pub unit: u32,
    /// Threads: a power of two.
    pub team: u32,
    /// Units of a thread.
    pub chunks: u32,
    /// Whether rows, or their last parts, fill it: nobody looks where they end.
    pub full: bool,
}

/// What a thread can hold, and a team.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernel) struct Room {
    /// Threads of a block.
    pub threads: u32,
    /// Units of 16 bytes of a thread.
    pub chunks: u32,
    /// Elements of a thread, where each is loaded by itself.
    pub elements: u32,
}

impl Tile {
    /// Of rows of `cols` elements; and whether it holds all of a row. `whole`: units are of 16 bytes.
    pub(in crate::kernel) fn new(
        cols: u64,
        element: Element,
        whole: bool,
        room: Room,
    ) -> (Self, bool) {
        // So many loads of a thread are on their way together.
        const CHUNKS: u32 = 2;
        let unit = Unit::of(element, whole).count;
        let units = cols.div_ceil(unit.into());
        let most = if whole { room.chunks } else { room.elements };
        let tile = |team: u32, chunks: u32| {
            let held = u64::from(team) * u64::from(chunks);
            Self { unit, team, chunks, full: units.is_multiple_of(held) }
        };
        if units <= WARP.into() {
            return (tile((units as u32).next_power_of_two(), 1), true);
        }
        let teams = std::iter::successors(Some(WARP), |team| Some(team * 2));
        let fitting = teams.take_while(|&team| team <= room.threads).filter_map(|team| {
            let chunks = units.div_ceil(team.into());
            (chunks <= most.into()).then_some((team, chunks as u32))
        });
        // The fewest idle lanes.
        let least = fitting.min_by_key(|&(team, chunks)| (team * chunks, chunks.abs_diff(CHUNKS)));
        match least {
            Some((team, chunks)) => (tile(team, chunks), true),
            None => (tile(room.threads, most), false),
        }
    }

    /// Units that it holds.
    pub(in crate::kernel) fn units(&self) -> u32 {
        self.team * self.chunks
    }

    /// `team256 x2·8`
    pub(in crate::kernel) fn name(&self) -> String {
        let Self { unit, team, chunks, full } = self;
        let rest = if *full { "" } else { " rest" };
        format!("team{team} x{chunks}·{unit}{rest}")
    }
}

/// A thread's units of one row.
#[derive(Clone, Debug)]
pub(in crate::kernel) struct Slots<'k> {
    k: &'k Kernel,
    tile: Tile,
    /// The first one's number in the row.
    first: Reg<'k, u32>,
    /// Which of them there are; `None`: all.
    valid: Vec<Option<Reg<'k, bool>>>,
}

impl<'k> Slots<'k> {
    /// From unit `first` on, of rows of `units`.
    pub fn new(k: &'k Kernel, tile: Tile, first: Reg<'k, u32>, units: Reg<'k, u32>) -> Self {
        let valid = |i| (!tile.full).then(|| (first + i * tile.team).lt(units));
        Self { k, tile, first, valid: (0..tile.chunks).map(valid).collect() }
    }

    /// Of a row that may not exist.
    pub fn of(&self, exists: Option<Reg<'k, bool>>) -> Self {
        let Some(exists) = exists else { return self.clone() };
        let valid = self.valid.iter().map(|valid| Some(valid.map_or(exists, |v| v & exists)));
        Self { valid: valid.collect(), ..self.clone() }
    }

    fn places(
        &self,
        element: Element,
        row: Reg<'k, u64>,
    ) -> impl Iterator<Item = Address<'k, u64>> {
        let (team, bytes) = (self.tile.team, self.tile.unit * element.size());
        let from = row.element(self.first, bytes);
        (0..self.tile.chunks).map(move |i| from.at(i64::from(i * team * bytes)))
    }

    /// Where the units of a row are, and whether.
    pub fn sources(
        &self,
        element: Element,
        row: Reg<'k, u64>,
    ) -> impl Iterator<Item = (Address<'k, u64>, Option<Reg<'k, bool>>)> {
        self.places(element, row).zip(&self.valid).map(|(from, &valid)| (from, valid))
    }

    /// The units of a row that begins at an address, zeros past its end.
    pub fn load(&self, element: Element, row: Reg<'k, u64>) -> Vec<Loaded<'k>> {
        let unit = Unit { element, count: self.tile.unit };
        let load = |(from, &valid): (_, &Option<_>)| match valid {
            None => unit.load(self.k, from),
            Some(valid) => self.k.when(valid, || unit.load(self.k, from)).or_zero(valid),
        };
        self.places(element, row).zip(&self.valid).map(load).collect()
    }

    /// Stores units.
    pub fn store(&self, row: Reg<'k, u64>, element: Element, units: &[Loaded<'k>]) {
        for ((to, valid), unit) in self.places(element, row).zip(&self.valid).zip(units) {
            self.put(to, *valid, unit);
        }
    }

    /// Stores unit `i` of the thread's.
    pub fn store_unit(&self, i: usize, row: Reg<'k, u64>, element: Element, unit: &Loaded<'k>) {
        let to = self.places(element, row).nth(i).expect("it is one of them");
        self.put(to, self.valid[i], unit);
    }

    fn put(&self, to: Address<'k, u64>, valid: Option<Reg<'k, bool>>, unit: &Loaded<'k>) {
        match valid {
            None => unit.store(self.k, to),
            Some(valid) => self.k.when(valid, || unit.store(self.k, to)),
        }
    }

    /// A number where a unit is, and another where there is none, for each unit that may not be there.
    pub fn or(&self, x: Reg<'k, f32>, other: f32) -> Vec<Option<Reg<'k, f32>>> {
        let pick = |valid: &Option<_>| valid.map(|valid| self.k.select(valid, x, other));
        self.valid.iter().map(pick).collect()
    }

    /// A number where a unit is, and 0 where there is none, for each of them.
    pub fn or_zero(&self, x: Reg<'k, f32>) -> Vec<Reg<'k, f32>> {
        self.or(x, 0.0).into_iter().map(|picked| picked.unwrap_or(x)).collect()
    }
}
