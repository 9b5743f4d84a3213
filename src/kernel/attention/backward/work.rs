//! Work tiles: which tiles of queries or keys a block of threads has, and the blocks of the other side that
//! matter to each.

use super::super::Name;
use super::super::lengths::{Sequences, Span};
use super::super::mask::{BlockRange, Bounds};
use super::super::scheduler::{TileCoord, TileScheduler};
use super::super::{Lengths, Mask};
use super::{Side, TileShape};
use crate::ptx::{Kernel, Reg};

/// The tiles of a launch.
pub struct Tiles<'k> {
    tile_shape: TileShape,
    /// Queries and keys of the tensors.
    pub size: [Reg<'k, i32>; 2],
    /// Heads of the queries, and of those how many share keys.
    pub heads: [Reg<'k, u32>; 2],
    right: Option<Reg<'k, i32>>,
    left: Option<Reg<'k, i32>>,
    sequences: Sequences<'k>,
    scheduler: TileScheduler<'k>,
}

/// A tile of rows, and the blocks of columns that matter to it.
#[derive(Clone, Copy)]
pub struct WorkTile<'k> {
    /// The index along the tensors' batch.
    pub batch: Reg<'k, u32>,
    pub sequence: Reg<'k, u32>,
    /// The head: of queries, or of keys.
    pub head: Reg<'k, u32>,
    /// The first row.
    pub first: Reg<'k, i32>,
    /// The sequence's queries and keys.
    pub queries: Span<'k>,
    pub keys: Span<'k>,
    /// Rows are those of the tile's side.
    pub bounds: Bounds<Reg<'k, i32>>,
    pub blocks: BlockRange<Reg<'k, i32>>,
    /// Blocks are counted from the other end: one more than the sum of a block's number and its count. Or 0.
    pub mirror: Option<Reg<'k, i32>>,
}

/// The most words of [`Tiles::keep`], of tiles that do not wait for one another.
pub const KEPT_WORDS: u32 = 12;
/// The same of all tiles.
pub const ALL_WORDS: u32 = KEPT_WORDS + 4;

impl<'k> WorkTile<'k> {
    /// The block of a count that is in `blocks`.
    pub fn block(&self, count: Reg<'k, i32>) -> Reg<'k, i32> {
        let mirrored =
            |mirror: Reg<'k, i32>| count.kernel().select(mirror.eq(0), count, mirror - 1 - count);
        self.mirror.map_or(count, mirrored)
    }

    /// The same tile, whose blocks are counted from the other end if the predicate holds.
    fn mirrored(self, holds: Reg<'k, bool>) -> Self {
        let (k, BlockRange { begin, end, whole_begin, whole_end, cut }) =
            (holds.kernel(), self.blocks);
        let both = begin + end;
        let first_whole = whole_begin.unwrap_or(begin);
        let blocks = BlockRange {
            begin,
            end,
            whole_begin: Some(k.select(holds, both - whole_end, first_whole)),
            whole_end: k.select(holds, both - first_whole, whole_end),
            cut,
        };
        Self { blocks, mirror: Some(k.select(holds, both, 0)), ..self }
    }

    /// The queries or keys of its sequence.
    pub fn span(&self, side: Side) -> Span<'k> {
        match side {
            Side::Queries => self.queries,
            Side::Keys => self.keys,
        }
    }
}

impl<'k> Tiles<'k> {
    /// Declares the parameters of sizes, masks and lengths, and of the scheduler.
    pub fn params(k: &'k Kernel, tile_shape: TileShape) -> Self {
        let size = [k.param(Name::Queries), k.param(Name::Keys)];
        let heads = [k.param(Name::Heads), k.param(Name::Group)];
        let right = (tile_shape.mask != Mask::None).then(|| k.param(Name::Right));
        let left = (tile_shape.mask == Mask::Window).then(|| k.param(Name::Left));
        let sequences = Sequences::params(k, tile_shape.lengths, size);
        let scheduler = TileScheduler::params(k);
        Self { tile_shape, size, heads, right, left, sequences, scheduler }
    }

    /// How many sequences are packed, if they are.
    pub fn sequences(&self) -> Option<Reg<'k, u32>> {
        self.sequences.count()
    }

    /// How many places the order has.
    pub fn count(&self) -> Reg<'k, u32> {
        self.scheduler.count()
    }

    /// The place of this block, of a grid with as many.
    pub fn own(&self) -> TileCoord<'k> {
        self.scheduler.in_order(self.count().kernel().block_x())
    }

    /// Runs `body` for this block's tile, if its place in the order is one.
    pub fn with_own(&self, body: impl FnOnce(WorkTile<'k>)) {
        self.find(self.own(), body);
    }

    /// The same for a place in the order, of blocks that take place after place as they are done.
    ///
    /// Under a causal mask tiles of keys differ in length, and those that run together should read the same queries
    /// at the same time, so that L2 has them: the first round of blocks starts with the last queries, which all of
    /// its tiles see. Then whoever is done first takes the longest tile that is left, so all end the second round
    /// together, and if they go from the first queries to the last, they are at the same ones:
    ///
    /// ```text
    ///          time ─────────▸
    /// block 0  7 6 5 4 3 2 1 0 7      numbers are blocks of queries; key tile 0 is seen by 8 of them,
    /// block 1  7 6 5 4 3 2 1 6 7      tile 7 by the last one
    /// block 2  7 6 5 4 3 2 5 6 7
    /// block 3  7 6 5 4 3 4 5 6 7
    /// ```
    pub fn with(&self, place: Reg<'k, u32>, body: impl FnOnce(WorkTile<'k>)) {
        self.find(self.scheduler.in_order(place), |work| match self.mirrors() {
            true => {
                let blocks = place.kernel().blocks_x();
                body(work.mirrored(self.scheduler.in_even_round(place, blocks)));
            }
            false => body(work),
        });
    }

    /// The rows from `first` on of a head, of sequences that are not packed.
    pub fn tile(
        &self,
        batch: Reg<'k, u32>,
        head: Reg<'k, u32>,
        first: Reg<'k, i32>,
    ) -> WorkTile<'k> {
        let spans = [0, 1].map(|side| self.sequences.span(side, batch));
        self.work(batch, batch, head, first, spans)
    }

    /// Puts a tile into shared memory, [`KEPT_WORDS`] words from `at` on, an address that is a multiple of 16: what
    /// is seldom read takes no registers there. All threads do; who [reads](Self::kept) it has met one of them.
    pub fn keep(&self, work: &WorkTile<'k>, at: Reg<'k, u32>) {
        let k = at.kernel();
        let words = self.words(work);
        k.when(k.thread().eq(0), || put(at, &words));
    }

    /// The same by one thread, [`ALL_WORDS`] words.
    pub fn write(&self, work: &WorkTile<'k>, at: Reg<'k, u32>) {
        put(at, &self.words(work));
    }

    /// Puts there that no tile is left.
    pub fn write_end(&self, at: Reg<'k, u32>) {
        put(at, &[at.kernel().var(END)]);
    }

    /// Whether no tile is left.
    pub fn ends(&self, at: Reg<'k, u32>) -> Reg<'k, bool> {
        let [batch] = at.kernel().ld_shared::<u32, 1>(at);
        batch.eq(END)
    }

    /// The tile that was put there.
    pub fn kept(&self, at: Reg<'k, u32>) -> WorkTile<'k> {
        let k = at.kernel();
        let (full, packed) = match self.tile_shape.lengths {
            Lengths::Full => (true, false),
            Lengths::Padded => (false, false),
            Lengths::Packed => (false, true),
        };
        let windowed = self.begins();
        let mirrors = self.mirrors();
        let count = 6
            + usize::from(windowed)
            + if full { 0 } else { 2 }
            + if packed { 3 } else { 0 }
            + usize::from(mirrors);
        let words =
            (0..count.div_ceil(4)).flat_map(|quad| k.ld_shared::<u32, 4>(at.at(16 * quad as i64)));
        let mut words = words.collect::<Vec<_>>().into_iter();
        let mut next = || words.next().expect("as many as were kept");
        let [batch, head, first, begin, end, whole_end] = std::array::from_fn(|_| next());
        let whole_begin = windowed.then(|| next().cast());
        let [queries, keys] = match full {
            true => self.size.map(|count| Span { begin: None, count }),
            false => [0, 1].map(|_| Span { begin: packed.then(&mut next), count: next().cast() }),
        };
        let sequence = if packed { next() } else { batch };
        let bounds = self.bounds([queries, keys]);
        let blocks = BlockRange {
            begin: begin.cast(),
            end: end.cast(),
            whole_begin,
            whole_end: whole_end.cast(),
            cut: true,
        };
        let mirror = mirrors.then(|| next().cast());
        let first = first.cast();
        WorkTile { batch, sequence, head, first, queries, keys, bounds, blocks, mirror }
    }

    /// What [`kept`](Self::kept) reads, in its order.
    fn words(&self, work: &WorkTile<'k>) -> Vec<Reg<'k, u32>> {
        let WorkTile { batch, sequence, head, first, queries, keys, blocks, .. } = *work;
        let mut words = vec![batch, head, first.cast()];
        words.extend([blocks.begin, blocks.end, blocks.whole_end].map(Reg::cast::<u32>));
        words.extend(blocks.whole_begin.map(Reg::cast::<u32>));
        if self.tile_shape.lengths != Lengths::Full {
            for span in [queries, keys] {
                words.extend(span.begin);
                words.push(span.count.cast());
            }
        }
        words.extend((self.tile_shape.lengths == Lengths::Packed).then_some(sequence));
        debug_assert!(words.len() <= KEPT_WORDS as usize);
        words.extend(work.mirror.map(Reg::cast::<u32>));
        words
    }

    /// Whether columns begin where the row says: keys under a window, queries under a causal mask, too.
    fn begins(&self) -> bool {
        match self.tile_shape.side {
            Side::Queries => self.left.is_some(),
            Side::Keys => self.right.is_some(),
        }
    }

    /// Whether blocks of a tile may be counted from the other end. Tiles that wait for one another would do so longer.
    fn mirrors(&self) -> bool {
        let TileShape { side, mask, persistent, ordered, .. } = self.tile_shape;
        persistent && !ordered && side == Side::Keys && mask == Mask::Right
    }

    /// The number of the tile's side, as [`Sequences`] counts.
    fn side(&self) -> usize {
        match self.tile_shape.side {
            Side::Queries => 0,
            Side::Keys => 1,
        }
    }

    /// The tile of a place in the order, if there is one: those with the most columns first.
    fn find(&self, TileCoord { head, column }: TileCoord<'k>, body: impl FnOnce(WorkTile<'k>)) {
        let (k, c) = (head.kernel(), &self.tile_shape);
        let first = |tile: Reg<'k, u32>| (tile * c.rows).cast::<i32>();
        // The last queries see the most keys, the first keys are seen by the most queries.
        let number = |column: Reg<'k, u32>, count: Reg<'k, u32>| match c.side {
            Side::Queries => count - 1 - column,
            Side::Keys => column,
        };
        match c.lengths {
            Lengths::Packed => {
                let found = self.sequences.find(self.side(), column, c.rows);
                let tile = number(found.tile, found.tiles);
                k.if_(found.exists, || {
                    let other = self.sequences.span(1 - self.side(), found.sequence);
                    let [queries, keys] = match c.side {
                        Side::Queries => [found.span, other],
                        Side::Keys => [other, found.span],
                    };
                    let spans = [queries, keys];
                    body(self.work(k.var(0), found.sequence, head, first(tile), spans));
                });
            }
            Lengths::Full | Lengths::Padded => {
                let tile = number(column, self.scheduler.columns());
                let heads = match c.side {
                    Side::Queries => self.heads[0],
                    Side::Keys => self.heads[0] / self.heads[1],
                };
                let batch = head / heads;
                body(self.tile(batch, head - batch * heads, first(tile)));
            }
        }
    }

    fn work(
        &self,
        batch: Reg<'k, u32>,
        sequence: Reg<'k, u32>,
        head: Reg<'k, u32>,
        first: Reg<'k, i32>,
        [queries, keys]: [Span<'k>; 2],
    ) -> WorkTile<'k> {
        let (k, c) = (first.kernel(), &self.tile_shape);
        let bounds = self.bounds([queries, keys]);
        let count = match c.side {
            Side::Queries => queries.count,
            Side::Keys => keys.count,
        };
        let end = first + c.rows as i32;
        let mut blocks = bounds.blocks(first, end.min(count), c.cols);
        // Rows past the last one are hidden in every block.
        blocks.cut = true;
        blocks.whole_end = k.select(end.le(count), blocks.whole_end, 0);
        if c.lengths == Lengths::Padded {
            blocks.end = k.select(first.lt(count), blocks.end, 0);
        }
        let mirror = None;
        WorkTile { batch, sequence, head, first, queries, keys, bounds, blocks, mirror }
    }

    /// Which columns count for a row.
    fn bounds(&self, [queries, keys]: [Span<'k>; 2]) -> Bounds<Reg<'k, i32>> {
        let offset = keys.count - queries.count;
        let of_queries = Bounds {
            cols: keys.count,
            end: self.right.map(|right| offset + right + 1),
            begin: self.left.map(|left| offset - left),
            rows: Some(queries.count),
        };
        match self.tile_shape.side {
            Side::Queries => of_queries,
            Side::Keys => of_queries.transposed(queries.count),
        }
    }

    /// Whether a row, or column, is one of the tensor's that its tile stores: `count` are its sequence's. In a
    /// padded batch it may be padding, and is if the second predicate does not hold.
    pub fn stored(
        &self,
        side: Side,
        position: Reg<'k, i32>,
        count: Reg<'k, i32>,
    ) -> (Reg<'k, bool>, Option<Reg<'k, bool>>) {
        match self.tile_shape.lengths {
            Lengths::Full | Lengths::Packed => (position.lt(count), None),
            Lengths::Padded => {
                let size = self.size[usize::from(side == Side::Keys)];
                (position.lt(size), Some(position.lt(count)))
            }
        }
    }
}

/// Instead of a batch: no tile.
const END: u32 = u32::MAX;

/// Stores words from an address on that is a multiple of 16, four at once.
fn put<'k>(at: Reg<'k, u32>, words: &[Reg<'k, u32>]) {
    for (quad, words) in (0..).zip(words.chunks(4)) {
        let four = std::array::from_fn::<_, 4, _>(|i| *words.get(i).unwrap_or(&words[0]));
        at.kernel().st_shared(at.at(16 * quad), four);
    }
}
