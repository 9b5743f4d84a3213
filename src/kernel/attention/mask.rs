//! Which pairs of a query and a key count: the range of blocks for a tile, and the predicate for each
//! score of a fragment, for tiles of queries and for tiles of keys.
//!
//! ```text
//!            keys 0 …                          o = keys - queries: the last query is opposite the last
//!          ┌──────────────────────┐            key (bottom-right alignment)
//! query i  │   begin┣━━━━━━┫end   │            begin = i + o - left
//!    i + 1 │    begin┣━━━━━━┫end  │            end   = i + o + right + 1
//!          └──────────────────────┘
//! ```
//!
//! Seen from the keys the band has the same form: key `j` counts for queries from `j + 1 - end` to before
//! `j + 1 - begin`, both of query 0. So [`Bounds::transposed`] serves a kernel whose fragments have keys
//! as rows, or whose tiles are of keys and whose blocks are of queries.

use std::ops::{Add, Sub};

use crate::ptx::{Reg, Scalar};

/// What hides keys, beside the end of their sequence.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Mask {
    /// Nothing.
    None,
    /// Keys too far to the right of the query's place: causal.
    Right,
    /// Keys too far to the left, too.
    Window,
}

/// A position in a sequence: a register in a kernel, an integer in tests.
pub trait Position:
    Copy + Add<Output = Self> + Add<i32, Output = Self> + Sub<Output = Self> + Sub<i32, Output = Self>
{
    /// Another one.
    fn constant(self, value: i32) -> Self;
    /// The lesser one.
    fn least(self, other: Self) -> Self;
    /// `(self + round) / size`, as if it were 0 where it is negative: nothing is before block 0.
    fn block(self, round: u32, size: u32) -> Self;
    /// 0 unless `position` is before `count`.
    fn if_before(self, position: Self, count: Self) -> Self;
}

impl Position for Reg<'_, i32> {
    fn constant(self, value: i32) -> Self {
        self.kernel().var(value)
    }

    fn least(self, other: Self) -> Self {
        self.min(other)
    }

    fn block(self, round: u32, size: u32) -> Self {
        ((self.or_zero() + round) / size).cast()
    }

    fn if_before(self, position: Self, count: Self) -> Self {
        self.kernel().select(position.lt(count), self, 0)
    }
}

/// Which columns count for a row, of one sequence: for row `i` those from `i + begin` on, before
/// `i + end`, and before `cols`. Rows are queries and columns keys, or the other way round.
#[derive(Clone, Copy, Debug)]
pub struct Bounds<T> {
    /// Columns of the sequence.
    pub cols: T,
    /// The first column after those of row 0, if that depends on the row.
    pub end: Option<T>,
    /// The first column of row 0, if that depends on the row.
    pub begin: Option<T>,
    /// Rows of the sequence, if none counts for those past the last. Without it they are as others: their
    /// results are nobody's.
    pub rows: Option<T>,
}

/// Blocks of columns that matter to a tile of rows: those from `begin` to before `end`. The mask cuts none
/// from `whole_begin` to before `whole_end`.
#[derive(Clone, Copy, Debug)]
pub struct BlockRange<T> {
    /// The first block.
    pub begin: T,
    /// The one after the last.
    pub end: T,
    /// The first whole one, if whether one is depends on the rows.
    pub whole_begin: Option<T>,
    /// The one after the last whole one.
    pub whole_end: T,
    /// Whether the rows' ends cut blocks, and not only the sequence's.
    pub cut: bool,
}

impl<T: Position> Bounds<T> {
    /// The same pairs with keys as rows and queries as columns, or back: `rows` are those that there are.
    pub fn transposed(&self, rows: T) -> Self {
        let opposite = |edge: T| edge.constant(1) - edge;
        Self {
            cols: rows,
            end: self.begin.map(opposite),
            begin: self.end.map(opposite),
            rows: Some(self.cols),
        }
    }

    /// The first column after those of a row.
    fn end_of(&self, row: T) -> T {
        self.end.map_or(self.cols, |end| (row + end).least(self.cols))
    }

    /// The same, or 0 for a row past the last, if that matters.
    fn end_of_any(&self, row: T) -> T {
        let end = self.end_of(row);
        self.rows.map_or(end, |rows| end.if_before(row, rows))
    }

    /// The first column of a row, which may be before the first that there is.
    fn begin_of(&self, row: T) -> Option<T> {
        self.begin.map(|begin| row + begin)
    }

    /// For the rows from `first` to before `last`, of which there is one or more, in blocks of `size`
    /// columns.
    pub fn blocks(&self, first: T, last: T, size: u32) -> BlockRange<T> {
        let zero = || first.constant(0);
        BlockRange {
            begin: self.begin_of(first).map_or_else(zero, |begin| begin.block(0, size)),
            end: self.end_of(last - 1).block(size - 1, size),
            whole_begin: self.begin.map(|begin| (last - 1 + begin).block(size - 1, size)),
            whole_end: self.end_of(first).block(0, size),
            cut: self.end.is_some(),
        }
    }
}

impl<'k> Bounds<Reg<'k, i32>> {
    /// Hides scores in place: those of two rows, whose first column is `first`. Score `4j + 2h + c` is of
    /// row `h`, column `8j + c`.
    pub fn hide(&self, scores: &[Reg<'k, f32>], rows: [Reg<'k, i32>; 2], first: Reg<'k, i32>) {
        self.replace(scores, rows, first, f32::NEG_INFINITY);
    }

    /// The same with another number in place of −∞.
    pub fn replace(
        &self,
        scores: &[Reg<'k, f32>],
        rows: [Reg<'k, i32>; 2],
        first: Reg<'k, i32>,
        hidden: f32,
    ) {
        let ends = rows.map(|row| self.end_of_any(row) - first);
        let begins = rows.map(|row| self.begin_of(row).map(|begin| begin - first));
        for (i, score) in scores.iter().enumerate() {
            let (row, col) = (i / 2 % 2, column(i));
            let mut seen = ends[row].gt(col);
            if let Some(begin) = begins[row] {
                seen = seen & begin.le(col);
            }
            keep(*score, seen, hidden);
        }
    }

    /// Whether some of the `size` columns from `first` on are past the last.
    pub fn beyond(&self, first: Reg<'k, i32>, size: u32) -> Reg<'k, bool> {
        (self.cols - first).lt(size as i32)
    }
}

impl<'k> BlockRange<Reg<'k, i32>> {
    /// Whether there are any.
    pub fn some(&self) -> Reg<'k, bool> {
        self.end.gt(self.begin)
    }

    /// Runs `body` for the blocks from `block` down to the first. It makes `block` one less, and is told
    /// whether the mask may cut the block.
    pub fn walk(&self, block: Reg<'k, i32>, body: impl Fn(bool)) {
        Self::walk_of(|| *self, block, body);
    }

    /// The same, of a range that is asked for when it is needed, so that it is not kept meanwhile.
    pub fn walk_of(range: impl Fn() -> Self, block: Reg<'k, i32>, body: impl Fn(bool)) {
        let down_to = |to: fn(&Self) -> Reg<'k, i32>, masked: bool| {
            let range = range();
            let to = to(&range).max(range.begin);
            block.kernel().loop_(|exit| {
                exit.when(block.lt(to));
                body(masked);
            });
        };
        let first = range();
        if first.cut {
            down_to(|range| range.whole_end, true);
        }
        down_to(|range| range.whole_begin.unwrap_or(range.begin), false);
        if first.whole_begin.is_some() {
            down_to(|range| range.begin, true);
        }
    }
}

/// The column of a score of a fragment, from the thread's first one.
pub(super) fn column(i: usize) -> i32 {
    (i / 4 * 8 + i % 2) as i32
}

/// Overwrites the register where the predicate does not hold.
fn keep<T: Scalar>(register: Reg<T>, holds: Reg<bool>, otherwise: T) {
    register.set(holds.kernel().select(holds, register, otherwise));
}

/// The arithmetic that kernels emit, on integers, against every pair.
#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;

    impl Position for i32 {
        fn constant(self, value: i32) -> Self {
            value
        }

        fn least(self, other: Self) -> Self {
            Ord::min(self, other)
        }

        fn block(self, round: u32, size: u32) -> Self {
            ((self.max(0) as u32 + round) / size) as i32
        }

        fn if_before(self, position: Self, count: Self) -> Self {
            if position < count { self } else { 0 }
        }
    }

    /// A sequence's queries and keys, and the window.
    #[derive(Clone, Copy, Debug)]
    struct Sequence {
        queries: i32,
        keys: i32,
        left: Option<i32>,
        right: Option<i32>,
    }

    impl Sequence {
        /// Short ones, no queries or no keys among them, no window and every window that differs.
        fn all() -> impl Iterator<Item = Self> {
            let widths = [None, Some(0), Some(1), Some(2), Some(5), Some(20)];
            let lengths = (0..9).flat_map(|queries| (0..9).map(move |keys| (queries, keys)));
            lengths.flat_map(move |(queries, keys)| {
                let windows = widths.into_iter().flat_map(move |l| widths.map(|r| (l, r)));
                windows
                    .filter(|(left, right)| left.is_none() || right.is_some())
                    .map(move |(left, right)| Self { queries, keys, left, right })
            })
        }

        /// As `Tiles` makes them.
        fn bounds(&self) -> Bounds<i32> {
            let offset = self.keys - self.queries;
            Bounds {
                cols: self.keys,
                end: self.right.map(|right| offset + right + 1),
                begin: self.left.map(|left| offset - left),
                rows: None,
            }
        }

        /// The documented rule.
        fn sees(&self, query: i32, key: i32) -> bool {
            let place = query + self.keys - self.queries;
            let there = (0..self.queries).contains(&query) && (0..self.keys).contains(&key);
            let left = self.left.is_none_or(|left| key >= place - left);
            let right = self.right.is_none_or(|right| key <= place + right);
            there && left && right
        }
    }

    /// Blocks of `size` columns against a tile of rows.
    fn blocks_are_those_that_count(
        what: &str,
        bounds: Bounds<i32>,
        rows: Range<i32>,
        size: i32,
        counts: impl Fn(i32, i32) -> bool,
    ) {
        let range = bounds.blocks(rows.start, rows.end, size as u32);
        let what = format!("{what}, rows {rows:?}, blocks of {size}: {range:?}");
        let pairs = |block: i32| {
            let cols = block * size..(block + 1) * size;
            rows.clone().flat_map(move |row| cols.clone().map(move |col| (row, col)))
        };
        for block in 0..(bounds.cols + size - 1) / size + 2 {
            let counted = pairs(block).filter(|&(row, col)| counts(row, col)).count();
            let inside = (range.begin..range.end).contains(&block);
            assert_eq!(inside, counted > 0, "block {block} of {what}");
            let whole_begin = range.whole_begin.unwrap_or(range.begin);
            let whole = inside && (whole_begin..range.whole_end).contains(&block);
            assert_eq!(whole, counted == pairs(block).count(), "block {block} of {what}");
        }
    }

    #[test]
    fn keys_of_a_tile_of_queries() {
        for sequence in Sequence::all() {
            let what = format!("{sequence:?}");
            for (first, height, size) in cuts(sequence.queries) {
                let rows = first..(first + height).least(sequence.queries);
                let sees = |query, key| sequence.sees(query, key);
                blocks_are_those_that_count(&what, sequence.bounds(), rows, size, sees);
            }
        }
    }

    #[test]
    fn queries_of_a_tile_of_keys() {
        for sequence in Sequence::all() {
            let (what, bounds) = (format!("{sequence:?}"), sequence.bounds());
            for (first, height, size) in cuts(sequence.keys) {
                let rows = first..(first + height).least(sequence.keys);
                let seen = |key, query| sequence.sees(query, key);
                let bounds = bounds.transposed(sequence.queries);
                blocks_are_those_that_count(&what, bounds, rows, size, seen);
            }
        }
    }

    /// Tiles of `count` rows, and sizes of blocks: the first row, the height, the size.
    fn cuts(count: i32) -> impl Iterator<Item = (i32, i32, i32)> {
        let tiles = [1, 2, 3, 4].into_iter().flat_map(move |height| {
            (0..count).step_by(height as usize).map(move |first| (first, height))
        });
        tiles.flat_map(|(first, height)| [1, 2, 3, 4].map(|size| (first, height, size)))
    }

    /// What [`Bounds::hide`] asks of a row and a column.
    fn counts(bounds: &Bounds<i32>, row: i32, col: i32) -> bool {
        col < bounds.end_of_any(row) && bounds.begin_of(row).is_none_or(|begin| begin <= col)
    }

    #[test]
    fn scores_that_are_not_hidden() {
        for sequence in Sequence::all() {
            let Sequence { queries, keys, .. } = sequence;
            let bounds = Bounds { rows: Some(queries), ..sequence.bounds() };
            let (transposed, back) =
                (bounds.transposed(queries), bounds.transposed(queries).transposed(keys));
            // Past the last ones too, where a tile or a block ends after its sequence.
            for (query, key) in (0..queries + 3).flat_map(|q| (0..keys + 3).map(move |k| (q, k))) {
                let sees = sequence.sees(query, key);
                assert_eq!(counts(&bounds, query, key), sees, "{sequence:?} {query} {key}");
                assert_eq!(counts(&transposed, key, query), sees, "{sequence:?} {query} {key}");
                assert_eq!(counts(&back, query, key), sees, "{sequence:?} {query} {key}");
            }
        }
    }
}
