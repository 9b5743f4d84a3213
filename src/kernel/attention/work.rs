//! Work tiles: which tiles of queries a block of threads computes, the keys that each sees, and its rows.

use super::launch::TileShape;
use super::lengths::{Sequences, Span};
use super::mask::{BlockRange, Bounds};
use super::scheduler::{TileCoord, TileScheduler, TileWalk};
use super::scores::Query;
use super::softmax::Finished;
use super::{Lengths, Mask, Name, Variant};
use crate::ptx::{Kernel, Reg};

/// The tiles of a launch.
pub struct Tiles<'k> {
    tile_shape: TileShape,
    /// Queries and keys of the tensors.
    size: [Reg<'k, i32>; 2],
    /// Heads of the queries, and of those how many share keys.
    heads: [Reg<'k, u32>; 2],
    right: Option<Reg<'k, i32>>,
    left: Option<Reg<'k, i32>>,
    sequences: Sequences<'k>,
    parts: Option<Reg<'k, u32>>,
    scheduler: TileScheduler<'k>,
}

/// A tile of queries, and the keys that it sees, or a part of them.
#[derive(Clone, Copy)]
pub struct WorkTile<'k> {
    pub tile: Tile<'k>,
    /// The head of keys and values.
    pub kv_head: Reg<'k, u32>,
    pub bounds: Bounds<Reg<'k, i32>>,
    pub blocks: BlockRange<Reg<'k, i32>>,
}

/// Where a tile of queries lies, and its results.
#[derive(Clone, Copy)]
pub struct Tile<'k> {
    /// The index along the tensors' batch.
    pub batch: Reg<'k, u32>,
    pub sequence: Reg<'k, u32>,
    /// The number of its pack of heads, and the first one.
    pub pack: Reg<'k, u32>,
    pub head: Reg<'k, u32>,
    /// Which part of its keys, if they are split.
    pub part: Option<Reg<'k, u32>>,
    /// The first query.
    pub first: Reg<'k, i32>,
    pub queries: Span<'k>,
    pub keys: Span<'k>,
}

/// The next tile of a block.
pub struct Ahead<'k, 't> {
    tiles: &'t Tiles<'k>,
    walk: TileWalk<'k>,
    tile: Tile<'k>,
    /// Not 0 if there is one that sees keys.
    has_keys: Reg<'k, u32>,
}

impl<'k> Ahead<'k, '_> {
    /// Looks for the next tile.
    pub fn look(&self) {
        let k = self.walk.kernel();
        self.has_keys.set(0);
        k.if_(!self.walk.over(), || {
            self.tiles.find(self.walk.coord(), |tile| {
                self.tile.set(&tile);
                let some = self.tiles.work(tile).blocks.some();
                self.has_keys.set(k.select(some, k.var(1), 0));
            });
        });
    }

    /// Whether there is a next tile that sees keys.
    pub fn has_keys(&self) -> Reg<'k, bool> {
        self.has_keys.ne(0)
    }
}

impl<'k> Tile<'k> {
    /// Sets these registers to those of another tile.
    pub fn set(&self, other: &Self) {
        let words = |tile: &Self| [tile.batch, tile.sequence, tile.pack, tile.head];
        let counts = |tile: &Self| [tile.first, tile.queries.count, tile.keys.count];
        words(self).into_iter().zip(words(other)).for_each(|(to, from)| to.set(from));
        counts(self).into_iter().zip(counts(other)).for_each(|(to, from)| to.set(from));
    }
}

/// A row of a thread.
#[derive(Clone, Copy)]
pub struct Row<'k> {
    pub query: Query<'k>,
    /// Whether it is stored.
    pub inside: Reg<'k, bool>,
    /// Whether it is a query, where rows that are none are stored, too.
    pub some: Option<Reg<'k, bool>>,
}

impl<'k> Row<'k> {
    /// A value of the row, or `padding` where the row only pads a tensor.
    pub fn unless_padding(&self, value: Reg<'k, f32>, padding: f32) -> Reg<'k, f32> {
        self.some.map_or(value, |some| some.kernel().select(some, value, padding))
    }
}

impl<'k> Tiles<'k> {
    /// Declares the parameters of masks, lengths and splits, if there are such, and of the scheduler.
    pub fn params(
        k: &'k Kernel,
        tile_shape: TileShape,
        size: [Reg<'k, i32>; 2],
        heads: [Reg<'k, u32>; 2],
    ) -> Self {
        let right = (tile_shape.variant.mask != Mask::None).then(|| k.param(Name::Right));
        let left = (tile_shape.variant.mask == Mask::Window).then(|| k.param(Name::Left));
        let sequences = Sequences::params(k, tile_shape.variant.lengths, size);
        let parts = tile_shape.variant.split.then(|| k.param(Name::Parts));
        let scheduler = TileScheduler::params(k);
        Self { tile_shape, size, heads, right, left, sequences, parts, scheduler }
    }

    /// Runs `body` for each tile of this block.
    pub fn for_each(&self, body: impl FnOnce(WorkTile<'k>)) {
        let walk = self.scheduler.walk();
        walk.kernel().loop_(|exit| {
            exit.when(walk.over());
            self.find(walk.coord(), |tile| body(self.work(tile)));
            walk.advance();
        });
    }

    /// The same, where looking for a tile takes a while: `body` looks for the next one, once, when it has
    /// something to wait for. Not for packed sequences, where there may be none, or parts.
    pub fn for_each_ahead(&self, body: impl Fn(WorkTile<'k>, &Ahead<'k, '_>)) {
        let walk = self.scheduler.walk();
        let k = walk.kernel();
        let ahead = Ahead { tiles: self, walk, tile: self.unset(), has_keys: k.var(0) };
        ahead.look();
        k.loop_(|exit| {
            exit.when(walk.over());
            walk.advance();
            let tile = self.unset();
            tile.set(&ahead.tile);
            body(self.work(tile), &ahead);
        });
    }

    /// Looks for a tile, and runs `body` if there is one.
    fn find(&self, TileCoord { head, column, .. }: TileCoord<'k>, body: impl FnOnce(Tile<'k>)) {
        let (k, c) = (head.kernel(), &self.tile_shape);
        let first_head =
            |pack: Reg<'k, u32>| if c.variant.pack == 1 { pack } else { pack * c.variant.pack };
        let first = |tile: Reg<'k, u32>| (tile * c.positions).cast::<i32>();
        if c.variant.lengths == Lengths::Packed {
            let found = self.sequences.find(0, column, c.positions);
            // The tiles with the most keys first.
            let tile = match c.variant.mask {
                Mask::Right => found.tiles - 1 - found.tile,
                Mask::None | Mask::Window => found.tile,
            };
            k.if_(found.exists, || {
                body(Tile {
                    batch: k.var(0),
                    sequence: found.sequence,
                    pack: head,
                    head: first_head(head),
                    part: None,
                    first: first(tile),
                    queries: found.span,
                    keys: self.sequences.span(1, found.sequence),
                });
            });
        } else {
            let (tile, part) = match self.parts {
                None => (column, None),
                Some(parts) => (column / parts, Some(column % parts)),
            };
            let packs =
                if c.variant.pack == 1 { self.heads[0] } else { self.heads[0] / c.variant.pack };
            let batch = head / packs;
            let pack = head - batch * packs;
            body(Tile {
                batch,
                sequence: batch,
                pack,
                head: first_head(pack),
                part,
                first: first(tile),
                queries: self.sequences.span(0, batch),
                keys: self.sequences.span(1, batch),
            });
        }
    }

    /// Registers for a tile that is set later, not of packed sequences.
    pub fn unset(&self) -> Tile<'k> {
        let k = self.size[0].kernel();
        let [batch, sequence, pack, head] = k.regs();
        let [queries, keys] = [0, 1].map(|_| Span { begin: None, count: k.reg() });
        Tile { batch, sequence, pack, head, part: None, first: k.reg(), queries, keys }
    }

    /// A tile with the keys that it sees.
    fn work(&self, tile: Tile<'k>) -> WorkTile<'k> {
        let c = &self.tile_shape;
        let Tile { head, part, first, queries, keys, .. } = tile;
        let offset = keys.count - queries.count;
        let bounds = Bounds {
            cols: keys.count,
            end: self.right.map(|right| offset + right + 1),
            begin: self.left.map(|left| offset - left),
            rows: None,
        };
        let last = (first + c.positions as i32).min(queries.count);
        let mut blocks = bounds.blocks(first, last, c.keys);
        if c.variant.lengths == Lengths::Padded {
            let some = first.lt(queries.count);
            blocks.end = some.kernel().select(some, blocks.end, 0);
        }
        if let (Some(part), Some(parts)) = (part, self.parts) {
            let each = (blocks.end - blocks.begin).or_zero() + (parts - 1);
            let each = each / parts;
            blocks.begin = blocks.begin + (part * each).cast();
            blocks.end = blocks.end.min(blocks.begin + each.cast());
        }
        WorkTile { tile, kv_head: head / self.heads[1], bounds, blocks }
    }

    /// Row `row` of those that begin with query `first` of a tile, and whether it is a query of the
    /// tensor. `used` of them are, if not all.
    pub fn row(
        &self,
        tile: &Tile<'k>,
        first: Reg<'k, i32>,
        row: Reg<'k, u32>,
        used: Option<u32>,
    ) -> Row<'k> {
        let limit = match self.tile_shape.variant.lengths {
            Lengths::Full | Lengths::Packed => tile.queries.count,
            Lengths::Padded => self.size[0],
        };
        let (position, head) = match self.tile_shape.variant.pack {
            1 => (row, tile.head),
            pack => (row / pack, tile.head + row % pack),
        };
        let position = first + position.cast();
        let mut inside = position.lt(limit);
        if let Some(used) = used {
            inside = inside & row.lt(used);
        }
        let query = Query { batch: tile.sequence, head, row: position };
        // What pads a tensor becomes 0.
        let padded = self.tile_shape.variant.lengths == Lengths::Padded;
        let some = padded.then(|| position.lt(tile.queries.count));
        Row { query, inside, some }
    }
}

/// The result, for threads: an address, and strides in elements.
#[derive(Clone, Copy)]
pub struct OutputView<'k> {
    pub address: Reg<'k, u64>,
    row: Reg<'k, u64>,
    head: Reg<'k, u64>,
    batch: Reg<'k, u64>,
    part: Option<Reg<'k, u64>>,
}

impl<'k> OutputView<'k> {
    /// Declares its parameters: one more for a split.
    pub fn params(k: &'k Kernel, split: bool) -> Self {
        Self {
            address: k.pointer(Name::OutAt),
            row: k.param(Name::OutRow),
            head: k.param(Name::OutHead),
            batch: k.param(Name::OutBatch),
            part: split.then(|| k.param(Name::OutPart)),
        }
    }

    /// The elements before a tile.
    pub fn start(&self, tile: &Tile<'k>) -> Reg<'k, u64> {
        let mut start = tile.batch.wide() * self.batch;
        if let (Some(stride), Some(part)) = (self.part, tile.part) {
            start = start + part.wide() * stride;
        }
        start
    }

    /// The address of an element of `size` bytes in a row of a tile that begins at `start`.
    pub fn at(
        &self,
        start: Reg<'k, u64>,
        tile: &Tile<'k>,
        row: &Row<'k>,
        col: Reg<'k, u32>,
        size: u32,
    ) -> Reg<'k, u64> {
        let at = start + row.query.head.wide() * self.head + col.wide();
        let at = at + tile.queries.at(row.query.row).wide() * self.row;
        self.address + at * u64::from(size)
    }
}

/// The destinations of what each row has one of.
#[derive(Clone, Copy)]
pub struct RowsMemory<'k> {
    lse: Option<RowValues<'k>>,
    stats: Option<[RowValues<'k>; 2]>,
}

impl<'k> RowsMemory<'k> {
    /// Declares the parameters of what a variant stores.
    pub fn params(k: &'k Kernel, variant: &Variant) -> Self {
        let part = variant.split.then_some(Name::LsePart);
        let stats = [Name::RowMax, Name::RowLog];
        Self {
            lse: variant.lse.then(|| RowValues::params(k, Name::Lse, part)),
            stats: variant.stats.then(|| stats.map(|name| RowValues::params(k, name, None))),
        }
    }

    /// Stores what is known of two rows, which four neighbouring lanes share, by the first of them. What
    /// only pads a tensor has no keys.
    pub fn store(
        &self,
        tiles: &Tiles<'k>,
        tile: &Tile<'k>,
        rows: [Row<'k>; 2],
        finished: &Finished<'k>,
        lane: Reg<'k, u32>,
    ) {
        if let Some(lse) = self.lse {
            lse.store(tiles, tile, rows, (finished.lse, f32::NEG_INFINITY), lane);
        }
        if let (Some([max, log]), Some(stats)) = (self.stats, finished.stats) {
            max.store(tiles, tile, rows, (stats.max, 0.0), lane);
            log.store(tiles, tile, rows, (stats.log, f32::INFINITY), lane);
        }
    }
}

/// A number for each row: f32, `[batch, heads, queries]`.
#[derive(Clone, Copy)]
struct RowValues<'k> {
    address: Reg<'k, u64>,
    part: Option<Reg<'k, u64>>,
}

impl<'k> RowValues<'k> {
    /// Declares its parameters: one more for a split.
    fn params(k: &'k Kernel, at: Name, part: Option<Name>) -> Self {
        Self { address: k.pointer(at), part: part.map(|stride| k.param(stride)) }
    }

    /// Stores two rows' values, or for what only pads a tensor another one.
    fn store(
        &self,
        tiles: &Tiles<'k>,
        tile: &Tile<'k>,
        rows: [Row<'k>; 2],
        (values, padding): ([Reg<'k, f32>; 2], f32),
        lane: Reg<'k, u32>,
    ) {
        let k = lane.kernel();
        let writes = (lane % 4).eq(0);
        for (row, value) in rows.iter().zip(values) {
            let value = row.unless_padding(value, padding);
            let head = tile.batch * tiles.heads[0] + row.query.head;
            let mut index = head.mul_wide(tiles.size[0].cast::<u32>());
            index = index + tile.queries.at(row.query.row).wide();
            if let (Some(stride), Some(part)) = (self.part, tile.part) {
                index = index + part.wide() * stride;
            }
            let at = self.address + index * 4u64;
            k.when(writes & row.inside, || k.st_global(at, [value]));
        }
    }
}
