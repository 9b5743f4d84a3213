//! From products to probabilities and to the gradients of scores.

use super::Gradients;
use super::pass::{Lane, M16Tile, Thread, plus};
use crate::kernel::Element;
use crate::kernel::ampere::product::{self, Fragment, Lines, M16};
use crate::kernel::ampere::swizzle::CHUNK;
use crate::kernel::ampere::tf32x3;
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::backward::Side;
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::attention::scores::{FragmentScores, Query};
use crate::kernel::multiprocessor::WARP;
use crate::ptx::Reg;

/// What is known of a query: what is subtracted from its scores, the logarithm of the sum of their exponentials,
/// both to base 2, and the delta.
const MAX: u32 = 0;
const LOG: u32 = 1;
const DELTA: u32 = 2;

/// What the scores of a thread's two rows of an m16 tile depend on.
pub(super) struct FragmentRows<'k> {
    scores: FragmentScores<'k>,
    positions: [Reg<'k, i32>; 2],
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
    fn rows(&self, work: &WorkTile<'k>, head: Reg<'k, u32>) -> Vec<FragmentRows<'k>> {
        let c = self.c;
        let row = Lane::new(self.k).row(c);
        let offset = work.keys.count - work.queries.count;
        let rows = |m16: u32| {
            let positions = [0, 8].map(|h| work.first + (row + (M16 * m16 + h)).cast());
            let scores = match c.pass.side() {
                Side::Queries => {
                    let queries = positions.map(|row| Query { batch: work.sequence, head, row });
                    self.score_params.of_queries(queries, work.queries.count, offset)
                }
                Side::Keys => {
                    let place = (work.sequence, head);
                    self.score_params.of_keys(positions, place, work.keys.count, offset)
                }
            };
            FragmentRows { scores, positions }
        };
        (0..c.m16_tiles).map(rows).collect()
    }

    /// A number of the query of each score: of an m16 tile, by its own number.
    fn number(&self, which: u32, stage: Reg<'k, u32>) -> impl Fn(usize, usize) -> Reg<'k, f32> {
        let (k, c) = (self.k, self.c);
        let first = self.smem.numbers + which * c.queries() * 4;
        // Of rows a thread has two in each m16 tile, of columns two in each 8.
        let (rows, columns) = match c.pass.side() {
            Side::Queries => {
                let start = self.base + Lane::new(k).row(c) * 4;
                let row = |row: u32| {
                    let [number] = k.ld_shared::<f32, 1>(start.at((first + row * 4).into()));
                    number
                };
                let rows = (0..c.m16_tiles).map(|m16| [0, 8].map(|h| row(M16 * m16 + h)));
                (rows.collect::<Vec<_>>(), vec![])
            }
            Side::Keys => {
                let lane = Lane::new(k);
                let start = self.base + stage + lane.lane % 4 * 8;
                let start = plus(start, lane.second(c, c.warp_cols() * 4));
                let pair = |quad: u32| k.ld_shared::<f32, 2>(start.at((first + quad * 32).into()));
                (vec![], (0..c.warp_cols() / 8).map(pair).collect::<Vec<_>>())
            }
        };
        move |m16, score| match columns.get(score / 4) {
            Some(pair) => pair[score % 2],
            None => rows[m16][score / 2 % 2],
        }
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
        let region = self.smem.left[which];
        let left = Lines { tile: c.left_tiles()[which], start: t.left, region };
        let left_at = left.fragments();
        let (start, region) = (t.right + stage, self.smem.right[which]);
        let tile = c.right_tiles()[which];
        let right = Lines { tile: tile.part(c.warp_cols(), tile.dim), start, region };
        match c.element {
            Element::Half(half) => {
                let fragment = |step, block| k.ldmatrix(left_at.at(left.block(block, step)), false);
                let fragments = |step| (0..c.m16_tiles).map(|b| fragment(step, b)).collect();
                product::multiply_lines(half, sums, fragments, right);
            }
            Element::F32 => tf32x3::multiply_lines(sums, (left, left_at), right, c.wide()),
        }
    }

    /// The probabilities of a block and, if the pass has any, the gradients of its scores: both of each m16 tile.
    /// The block is of a tile and a head of the queries.
    pub(super) fn block(
        &self,
        t: &Thread<'k>,
        (work, head): (&WorkTile<'k>, Reg<'k, u32>),
        block: Block<'k>,
        by: By,
    ) -> [Vec<Vec<Reg<'k, f32>>>; 2] {
        let (k, c) = (self.k, self.c);
        let Block { number, stage, masked } = block;
        let lane = Lane::new(k);
        let along = plus(lane.lane % 4 * 2, lane.second(c, c.warp_cols()));
        let first = number * c.cols as i32 + along.cast::<i32>();
        let limit = masked.then_some(work.bounds.cols);
        let load =
            |rows: &FragmentRows<'k>| rows.scores.load(c.warp_cols() as usize / 2, first, limit);
        let rows = self.rows(work, head);
        let biases: Vec<_> = rows.iter().map(load).collect();
        self.multiply(t, 0, &each(t, |m16| &m16.scores), stage);
        let [max, log] = [MAX, LOG].map(|which| self.number(which, stage));
        let (mut slopes, mut p) = (vec![], vec![]);
        for (i, ((m16, rows), bias)) in t.m16_tiles.iter().zip(&rows).zip(&biases).enumerate() {
            let (scores, modified) = (&m16.scores, &rows.scores);
            match c.pass.has_score_grads() && by == By::Products {
                true => slopes.push(modified.apply_with_slopes(scores, bias, first)),
                false => modified.apply(scores, bias, first),
            }
            if masked {
                work.bounds.hide(scores, rows.positions, first);
            }
            let probability = |(at, &score): (usize, &Reg<'k, f32>)| {
                let max = max(i, at);
                let above = match self.score_params.scale_left() {
                    Some(scale) => score.fma(scale, -max),
                    None => score - max,
                };
                (above - log(i, at)).exp2_ftz()
            };
            p.push(scores.iter().enumerate().map(probability).collect::<Vec<_>>());
        }
        if !c.pass.has_score_grads() {
            return [p, vec![]];
        }
        // Nobody else needs the probabilities then, and slopes no registers while the next product is made.
        let early = !c.pass.sums()[1];
        if early {
            slopes.iter().zip(&p).for_each(|(slopes, p)| slopes.back(p));
        }
        self.multiply(t, 1, &each(t, |m16| &m16.grads), stage);
        let delta = self.number(DELTA, stage);
        let mut all = vec![];
        for (i, ((m16, rows), p)) in t.m16_tiles.iter().zip(&rows).zip(&p).enumerate() {
            let gradient = |(at, (&grad, &p)): (usize, (&Reg<'k, f32>, &Reg<'k, f32>))| {
                p * (grad - delta(i, at))
            };
            let grads: Vec<_> = m16.grads.iter().zip(p).enumerate().map(gradient).collect();
            if masked {
                // What is hidden may be infinite or NaN.
                work.bounds.replace(&grads, rows.positions, first, 0.0);
            }
            all.push(grads);
        }
        if !early {
            slopes.iter().zip(&all).for_each(|(slopes, grads)| slopes.back(grads));
        }
        [p, all]
    }

    /// Adds products of a block's probabilities with the columns as wide as a value, and of the gradients of its
    /// scores with those as wide as a key, as far as the pass sums them.
    pub(super) fn add(&self, t: &Thread<'k>, [p, grads]: [Vec<Vec<Reg<'k, f32>>>; 2]) {
        let c = self.c;
        let fragments = |sums: &Vec<Reg<'k, f32>>| match c.element {
            Element::Half(half) => product::left(half, sums),
            Element::F32 => tf32x3::left(sums),
        };
        let summed = c.pass.sums();
        let left = [(1, p), (0, grads)].into_iter().filter(|&(which, _)| summed[which]);
        let left: Vec<(usize, Vec<_>)> =
            left.map(|(which, sums)| (which, sums.iter().map(fragments).collect())).collect();
        if let Some((_, score_grads)) = left.last().filter(|_| c.pass.shares_queries()) {
            self.write_score_grads(score_grads);
        }
        match c.paired {
            false => {
                for (which, left) in &left {
                    self.add_lines(t, *which, left, self.added(t, *which));
                }
            }
            true => self.add_paired(t, &left),
        }
    }

    /// The columns of a block, as lines that are added.
    fn added(&self, t: &Thread<'k>, which: usize) -> Lines<'k> {
        let (tile, start) = (self.c.right_tiles()[which], t.added + t.stage);
        Lines { tile, start, region: self.smem.right[which] }
    }

    /// The same where two warps have half of the columns each: products with its own ones, while the other's
    /// fragments come.
    fn add_paired(&self, t: &Thread<'k>, left: &[(usize, Vec<Vec<Fragment<'k>>>)]) {
        let (k, c) = (self.k, self.c);
        let lane = Lane::new(k);
        let bytes = c.warp_cols() * SwizzledTile::BYTES;
        let own = lane.warp % 2 * bytes;
        let place = |warp: Reg<'k, u32>| self.base + warp * c.given_bytes() + lane.lane * CHUNK;
        let at = |which: usize, i: usize| (self.smem.given[which] + i as u32 * CHUNK * WARP).into();
        let to = place(lane.warp);
        // Those of dS may be written anyway.
        let written = |which: usize| which == 0 && c.pass.shares_queries();
        for (which, left) in left.iter().filter(|&&(which, _)| !written(which)) {
            for (i, &fragment) in left.iter().flatten().enumerate() {
                k.st_shared(to.at(at(*which, i)), fragment);
            }
        }
        let half = |which: usize, before: Reg<'k, u32>| {
            let lines = self.added(t, which);
            let tile = lines.tile.part(c.warp_cols(), c.sum_columns()[which]);
            Lines { tile, start: lines.start + before, ..lines }
        };
        for (which, left) in left {
            self.add_lines(t, *which, left, half(*which, own));
        }
        // The other's are there.
        k.bar_sync(lane.warp / 2 + 1, 2 * WARP);
        let from = place(lane.warp ^ 1);
        for (which, left) in left {
            let each = left[0].len();
            let fragment = |i: usize| k.ld_shared(from.at(at(*which, i)));
            let given = |m16: usize| (0..each).map(|i| fragment(m16 * each + i)).collect();
            let others: Vec<Vec<_>> = match written(*which) {
                true => self.others_score_grads(),
                false => (0..left.len()).map(given).collect(),
            };
            self.add_lines(t, *which, &others, half(*which, own ^ bytes));
        }
    }

    fn add_lines(
        &self,
        t: &Thread<'k>,
        which: usize,
        left: &[Vec<Fragment<'k>>],
        lines: Lines<'k>,
    ) {
        let sums = each(t, |m16| &m16.sums[which]);
        match self.c.element {
            Element::Half(half) => product::add_lines(half, &sums, left, lines),
            Element::F32 => {
                // A predicate that always holds.
                tf32x3::add_lines(&sums, left, lines, || self.tiles.size[0].ge(0));
            }
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
