//! From products to probabilities and to the gradients of scores.

use super::Gradients;
use super::pass::{Lane, M16Tile, Thread};
use crate::kernel::Element;
use crate::kernel::ampere::product::{self, Fragment, Lines, M16};
use crate::kernel::ampere::swizzle::Fragments;
use crate::kernel::ampere::tf32x3;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::backward::Side;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::attention::scores::{FragmentScores, Query};
use crate::ptx::Reg;

/// What is known of a query: what is subtracted from its scores, the logarithm of the sum of their exponentials,
/// both to base 2, and the delta.
#[derive(Clone, Copy)]
pub(super) struct Numbers<'k> {
    max: Reg<'k, f32>,
    log: Reg<'k, f32>,
    delta: Option<Reg<'k, f32>>,
}

/// What the scores of a thread's two rows of an m16 tile depend on.
pub(super) struct FragmentRows<'k> {
    scores: FragmentScores<'k>,
    positions: [Reg<'k, i32>; 2],
    /// Of queries.
    numbers: Option<[Numbers<'k>; 2]>,
}

/// A block of columns.
#[derive(Clone, Copy)]
pub(super) struct Block<'k> {
    /// Its number.
    pub number: Reg<'k, i32>,
    /// Bytes from the first stage to its own.
    pub stage: Reg<'k, u32>,
    /// Whether some of its pairs may be hidden.
    pub masked: bool,
}

impl<'k> Gradients<'k, '_> {
    /// A thread's rows of each m16 tile, against columns of a head of the queries.
    pub(super) fn rows(&self, work: &WorkTile<'k>, head: Reg<'k, u32>) -> Vec<FragmentRows<'k>> {
        let c = self.c;
        let row = Lane::new(self.k).row(c);
        let offset = work.keys.count - work.queries.count;
        let rows = |m16: u32| {
            let positions = [0, 8].map(|h| work.first + (row + (M16 * m16 + h)).cast());
            let (scores, numbers) = match c.pass.side() {
                Side::Queries => {
                    let query = |row| Query { batch: work.sequence, head, row };
                    let queries = positions.map(query);
                    let count = work.queries.count;
                    let scores = self.score_params.of_queries(queries, count, offset);
                    let numbers = positions.map(|row| self.numbers_of(work, head, row));
                    (scores, Some(numbers))
                }
                Side::Keys => {
                    let (place, count) = ((work.sequence, head), work.keys.count);
                    (self.score_params.of_keys(positions, place, count, offset), None)
                }
            };
            FragmentRows { scores, positions, numbers }
        };
        (0..c.m16_tiles).map(rows).collect()
    }

    /// The number of a query among those of all heads and sequences.
    pub(super) fn query_index(
        &self,
        work: &WorkTile<'k>,
        head: Reg<'k, u32>,
        position: Reg<'k, u32>,
    ) -> Reg<'k, u64> {
        let head = work.batch * self.tiles.heads[0] + head;
        head.mul_wide(self.tiles.size[0].cast::<u32>()) + position.wide()
    }

    /// Those of a query, of which there is one; past the last one that one's.
    fn numbers_of(
        &self,
        work: &WorkTile<'k>,
        head: Reg<'k, u32>,
        row: Reg<'k, i32>,
    ) -> Numbers<'k> {
        let row = work.queries.at(row.min(work.queries.count - 1));
        let index = self.query_index(work, head, row) * 4u64;
        let [max, log, delta] = [0, 1, 2].map(|i| {
            let [number] = self.k.ld_global_nc::<f32, 1>(self.numbers[i] + index);
            number
        });
        Numbers { max, log, delta: Some(delta) }
    }

    /// Those of a thread's columns, in pairs, from shared memory.
    fn columns(&self, stage: Reg<'k, u32>) -> Vec<[Numbers<'k>; 2]> {
        let (k, c) = (self.k, self.c);
        let start = self.base + stage + k.lane() % 4 * 8;
        let pair = |quad: u32| {
            let [max, log] = [0, 1].map(|i| self.load_pair(start, i, quad));
            let delta = (c.numbers() > 2).then(|| self.load_pair(start, 2, quad));
            let number =
                |i: usize| Numbers { max: max[i], log: log[i], delta: delta.map(|delta| delta[i]) };
            [number(0), number(1)]
        };
        (0..c.cols / 8).map(pair).collect()
    }

    /// Number `i` of two columns of 8 from `8 · quad` on.
    fn load_pair(&self, start: Reg<'k, u32>, i: u32, quad: u32) -> [Reg<'k, f32>; 2] {
        let at = self.smem.numbers + (i * self.c.cols + 8 * quad) * 4;
        self.k.ld_shared(start.at(at.into()))
    }

    /// Multiplies rows and columns that are as wide as a key (0) or as a value (1).
    pub(super) fn multiply(
        &self,
        t: &Thread<'k>,
        which: usize,
        sums: &[&[Reg<'k, f32>]],
        stage: Reg<'k, u32>,
    ) {
        let (k, c) = (self.k, self.c);
        let tile = c.left_tiles()[which];
        let steps = tile.steps().min(SwizzledTile::STEPS);
        let left = Fragments::new(t.left[which], steps);
        let right = Lines { tile: c.right_tiles()[which], start: t.right[which] + stage };
        match c.element {
            Element::Half(half) => {
                let fragment = |step, block| k.ldmatrix(left.at(tile.block(block, step)), false);
                let fragments = |step| (0..c.m16_tiles).map(|b| fragment(step, b)).collect();
                product::multiply_lines(half, sums, fragments, right);
            }
            Element::F32 => tf32x3::multiply_lines(sums, (tile, left), right, c.wide()),
        }
    }

    /// The probabilities of a block, and if the pass has any the gradients of its scores by themselves: both of
    /// each m16 tile. `values` is run between both.
    pub(super) fn block(
        &self,
        t: &Thread<'k>,
        work: &WorkTile<'k>,
        rows: &[FragmentRows<'k>],
        block: Block<'k>,
        between: impl FnOnce(&[Vec<Reg<'k, f32>>]),
        by: By,
    ) -> Vec<Vec<Reg<'k, f32>>> {
        let (k, c) = (self.k, self.c);
        let Block { number, stage, masked } = block;
        let first = number * c.cols as i32 + (k.lane() % 4 * 2).cast::<i32>();
        let limit = masked.then_some(work.bounds.cols);
        let load = |rows: &FragmentRows<'k>| rows.scores.load(c.cols as usize / 2, first, limit);
        let biases: Vec<_> = rows.iter().map(load).collect();
        self.multiply(t, 0, &each(t, |m16| &m16.scores), stage);
        let columns = match c.pass.side() {
            Side::Queries => None,
            Side::Keys => Some(self.columns(stage)),
        };
        let (mut slopes, mut p) = (vec![], vec![]);
        for ((m16, rows), bias) in t.m16_tiles.iter().zip(rows).zip(&biases) {
            let (scores, modified) = (&m16.scores, &rows.scores);
            match c.pass.has_score_grads() && by == By::Products {
                true => slopes.push(modified.apply_with_slopes(scores, bias, first)),
                false => modified.apply(scores, bias, first),
            }
            if masked {
                work.bounds.hide(scores, rows.positions, first);
            }
            let probability = |(i, &score): (usize, &Reg<'k, f32>)| {
                let Numbers { max, log, .. } = rows.numbers(&columns, i);
                let above = match self.score_params.scale_left() {
                    Some(scale) => score.fma(scale, -max),
                    None => score - max,
                };
                (above - log).exp2_ftz()
            };
            p.push(scores.iter().enumerate().map(probability).collect::<Vec<_>>());
        }
        between(&p);
        if !c.pass.has_score_grads() {
            return vec![];
        }
        self.multiply(t, 1, &each(t, |m16| &m16.grads), stage);
        let mut all = vec![];
        for ((m16, rows), p) in t.m16_tiles.iter().zip(rows).zip(&p) {
            let gradient = |(i, (&grad, &p)): (usize, (&Reg<'k, f32>, &Reg<'k, f32>))| {
                let delta = rows.numbers(&columns, i).delta.expect("of a pass with gradients");
                p * (grad - delta)
            };
            let grads: Vec<_> = m16.grads.iter().zip(p).enumerate().map(gradient).collect();
            if masked {
                // What is hidden may be infinite or NaN.
                work.bounds.replace(&grads, rows.positions, first, 0.0);
            }
            all.push(grads);
        }
        slopes.iter().zip(&all).for_each(|(slopes, grads)| slopes.back(grads));
        all
    }

    /// Sums as left operands.
    pub(super) fn left(&self, sums: &[Reg<'k, f32>]) -> Vec<Fragment<'k>> {
        match self.c.element {
            Element::Half(half) => product::left(half, sums),
            Element::F32 => tf32x3::left(sums),
        }
    }

    /// Adds products of probabilities or gradients and the columns as wide as a key (0) or as a value (1).
    pub(super) fn add(
        &self,
        t: &Thread<'k>,
        which: usize,
        left: &[Vec<Reg<'k, f32>>],
        stage: Reg<'k, u32>,
    ) {
        let c = self.c;
        let left: Vec<_> = left.iter().map(|sums| self.left(sums)).collect();
        let sums = each(t, |m16| &m16.sums[which]);
        let lines = Lines { tile: c.right_tiles()[which], start: t.added[which] + stage };
        match c.element {
            Element::Half(half) => product::add_lines(half, &sums, &left, lines),
            Element::F32 => {
                // A predicate that always holds.
                tf32x3::add_lines(&sums, &left, lines, || stage.lt(self.smem.bytes));
            }
        }
    }
}

impl<'k> FragmentRows<'k> {
    /// Those of the query of a score.
    fn numbers(&self, columns: &Option<Vec<[Numbers<'k>; 2]>>, i: usize) -> Numbers<'k> {
        match (self.numbers, columns) {
            (Some(rows), _) => rows[i / 2 % 2],
            (None, Some(columns)) => columns[i / 4][i % 2],
            (None, None) => unreachable!("rows or columns are queries"),
        }
    }
}

/// What gradients are by.
#[derive(Clone, Copy, PartialEq)]
pub(super) enum By {
    /// The scores, to which a bias is added.
    Scores,
    /// The products of queries and keys, but for the scale.
    Products,
}

/// Registers of each m16 tile.
fn each<'t, 'k>(
    t: &'t Thread<'k>,
    of: impl Fn(&'t M16Tile<'k>) -> &'t Vec<Reg<'k, f32>>,
) -> Vec<&'t [Reg<'k, f32>]> {
    t.m16_tiles.iter().map(|m16| &of(m16)[..]).collect()
}
