//! Which keys a query sees: ranges of blocks of keys for a tile of queries, and the predicate for each
//! score of a fragment.

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

/// What the queries of a sequence see: query `i` keys from `i + begin` on, before `i + end`, and before
/// `keys`.
#[derive(Clone, Copy)]
pub struct Sight<'k> {
    pub keys: Reg<'k, i32>,
    pub end: Option<Reg<'k, i32>>,
    pub begin: Option<Reg<'k, i32>>,
}

/// Blocks of keys that matter to a tile: those from `begin` to before `end`. The mask cuts none from
/// `whole_begin` to before `whole_end`.
#[derive(Clone, Copy)]
pub struct Blocks<'k> {
    pub begin: Reg<'k, i32>,
    pub end: Reg<'k, i32>,
    pub whole_begin: Option<Reg<'k, i32>>,
    pub whole_end: Reg<'k, i32>,
}

impl<'k> Blocks<'k> {
    /// Whether there are any.
    pub fn some(&self) -> Reg<'k, bool> {
        self.end.gt(self.begin)
    }

    /// Runs `body` for the blocks from `block` down to the first. It makes `block` one less, and is told
    /// whether the mask may cut the block.
    pub fn walk(&self, mask: Mask, block: Reg<'k, i32>, body: impl Fn(bool)) {
        let down_to = |to: Reg<'k, i32>, masked: bool| {
            let to = to.max(self.begin);
            block.kernel().loop_(|exit| {
                exit.when(block.lt(to));
                body(masked);
            });
        };
        if mask != Mask::None {
            down_to(self.whole_end, true);
        }
        down_to(self.whole_begin.unwrap_or(self.begin), false);
        if self.whole_begin.is_some() {
            down_to(self.begin, true);
        }
    }
}

impl<'k> Sight<'k> {
    /// The first key behind those that query `row` sees.
    fn end_of(&self, row: Reg<'k, i32>) -> Reg<'k, i32> {
        self.end.map_or(self.keys, |end| (row + end).min(self.keys))
    }

    /// Of queries from `first` to before `last`, in blocks of `size` keys. Negative quotients do not
    /// matter: nothing is before block 0.
    pub fn blocks(&self, first: Reg<'k, i32>, last: Reg<'k, i32>, size: u32) -> Blocks<'k> {
        let quotient = |x: Reg<'k, i32>, round: u32| ((x.or_zero() + round) / size).cast::<i32>();
        let zero = || first.kernel().var(0);
        Blocks {
            begin: self.begin.map_or_else(zero, |begin| quotient(first + begin, 0)),
            end: quotient(self.end_of(last - 1), size - 1),
            whole_begin: self.begin.map(|begin| quotient(last - 1 + begin, size - 1)),
            whole_end: quotient(self.end_of(first), 0),
        }
    }

    /// Hides scores in place: those of two rows of queries, whose first column is key `first`. Score
    /// `4j + 2h + c` is of row `h`, column `8j + c`.
    pub fn hide(&self, scores: &[Reg<'k, f32>], rows: [Reg<'k, i32>; 2], first: Reg<'k, i32>) {
        let ends = rows.map(|row| self.end_of(row) - first);
        let begins = rows.map(|row| self.begin.map(|begin| row + begin - first));
        for (i, score) in scores.iter().enumerate() {
            let (row, col) = (i / 2 % 2, column(i));
            let mut seen = ends[row].gt(col);
            if let Some(begin) = begins[row] {
                seen = seen & begin.le(col);
            }
            keep(*score, seen, f32::NEG_INFINITY);
        }
    }

    /// Whether some of the `size` keys from `first` on are behind the last.
    pub fn beyond(&self, first: Reg<'k, i32>, size: u32) -> Reg<'k, bool> {
        (self.keys - first).lt(size as i32)
    }
}

/// The column of a score of a fragment, from the thread's first one.
pub fn column(i: usize) -> i32 {
    (i / 4 * 8 + i % 2) as i32
}

/// Overwrites the register where the predicate does not hold.
fn keep<T: Scalar>(register: Reg<T>, holds: Reg<bool>, otherwise: T) {
    register.set(register.or_else(holds, otherwise));
}
