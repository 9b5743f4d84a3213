//! From products to P and dS: fragments whose rows are keys and whose columns are queries.

use super::Backward;
use crate::kernel::attention::backward::sm90::schedule::Tile;
use crate::kernel::attention::mask::BlockRange;
use crate::kernel::attention::scores::FragmentScores;
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{Lane, Warpgroup};
use crate::ptx::Reg;

/// What the blocks of a tile and a head have in common.
pub(super) struct Context<'k, 't> {
    pub tile: Tile<'k, 't>,
    pub scores: FragmentScores<'k>,
    /// The positions of the thread's keys in their sequence.
    pub positions: [Reg<'k, i32>; 2],
    /// The current block of queries.
    pub block: Reg<'k, i32>,
}

/// What the current block has.
#[derive(Clone, Copy)]
pub(super) struct Block<'k> {
    /// The place of its queries' floats.
    pub rows: Cursor<'k>,
    pub lane: Lane<'k>,
    /// Whether the mask, or the last query, may cut it.
    pub masked: bool,
}

impl<'k> Backward<'k, '_> {
    /// Runs `body` for each block of queries of a tile, of all heads that share its keys. The warpgroup's keys begin
    /// at `first`.
    pub(super) fn for_each_block(
        &self,
        tile: Tile<'k, '_>,
        (warps, first): (Warpgroup<'k>, &dyn Fn() -> Reg<'k, i32>),
        body: impl Fn(&Context<'k, '_>, bool),
    ) {
        let k = self.k;
        let of_head = |head: Reg<'k, u32>, count: Reg<'k, i32>, masked: bool| {
            let work = tile.read();
            let (keys, offset) = (work.keys.count, work.keys.count - work.queries.count);
            let key = first() + (warps.lane.warp * 16 + warps.lane.lane / 4).cast();
            let positions = [key, key + 8];
            let scores = self.score_params.of_keys(positions, (work.sequence, head), keys, offset);
            body(&Context { tile, scores, positions, block: work.block(count) }, masked);
        };
        let count = k.var(tile.read().blocks.end - 1);
        BlockRange::walk_of(
            || tile.read().blocks,
            count,
            |masked| {
                match self.c.grouped {
                    true => {
                        let group = self.tiles.heads[1];
                        let left = k.var(group);
                        k.loop_(|exit| {
                            of_head((tile.read().head + 1) * group - left, count, masked);
                            left.increase(u32::MAX);
                            exit.when(left.eq(0));
                        });
                    }
                    false => of_head(tile.read().head, count, masked),
                }
                count.increase(-1);
            },
        );
    }

    /// Whether P is packed before dS is made of it: a soft cap changes it in place.
    fn packs_early(&self) -> bool {
        self.c.score_mod.softcap
    }

    /// Turns scores into probabilities in place. Under a soft cap those are packed to `p`, and what is left in
    /// place is the probabilities times the slopes of the scores.
    pub(super) fn probabilities(
        &self,
        scores: &[Reg<'k, f32>],
        p: &[Reg<'k, u32>],
        context: &Context<'k, '_>,
        block: Block<'k>,
    ) {
        let (k, c) = (self.k, self.c);
        let first = context.block * c.queries as i32 + (block.lane.lane % 4 * 2).cast::<i32>();
        let rows = self.base + self.smem.rows + block.rows.stage * c.row_bytes();
        let rows = rows + block.lane.lane % 4 * 16;
        let work = context.tile.read();
        let limit = block.masked.then_some(work.queries.count);
        let scale = self.score_params.scale_left();
        let quad = |j: i32, quad: &[Reg<'k, f32>]| {
            let at = if j == 0 { first } else { first + 8 * j };
            let slopes = scale.is_none().then(|| {
                let bias = context.scores.load(4, at, limit);
                context.scores.apply_with_slopes(quad, &bias, at)
            });
            if block.masked {
                work.bounds.hide(quad, context.positions, at);
            }
            let [m0, l0, m1, l1] = k.ld_shared::<f32, 4>(rows.at((64 * j).into()));
            for (i, &score) in quad.iter().enumerate() {
                let (max, log) = if i % 2 == 0 { (m0, l0) } else { (m1, l1) };
                let less = match scale {
                    Some(scale) => score.fma(scale, max),
                    None => score + max,
                };
                score.set((less + log).exp2_ftz());
            }
            if let Some(slopes) = slopes {
                if self.packs_early() {
                    self.pack(&p[2 * j as usize..], quad);
                }
                slopes.back(quad);
            }
        };
        for (j, four) in (0..).zip(scores.chunks(4)) {
            match c.score_mod.bias {
                None => quad(j, four),
                // Biases on their way would take the registers of sums.
                Some(_) => k.apart(block.rows.stage.lt(c.stages), || quad(j, four)),
            }
        }
    }

    /// Packs probabilities that have not been, unless nobody wants them.
    pub(super) fn pack_probabilities(&self, p: &[Reg<'k, u32>], probabilities: &[Reg<'k, f32>]) {
        if !self.packs_early() {
            self.pack(p, probabilities);
        }
    }

    /// dS, packed, of probabilities and dP.
    pub(super) fn score_gradients(
        &self,
        ds: &[Reg<'k, u32>],
        [probabilities, grads]: [&[Reg<'k, f32>]; 2],
        block: Block<'k>,
        each: impl Fn(usize),
    ) {
        let (k, c) = (self.k, self.c);
        let deltas = self.base + self.smem.rows + block.rows.stage * c.row_bytes();
        let deltas = deltas + block.lane.lane % 4 * 8;
        for (j, (p, grads)) in probabilities.chunks(4).zip(grads.chunks(4)).enumerate() {
            let at = c.queries * 8 + 32 * j as u32;
            let delta = k.ld_shared::<f32, 2>(deltas.at(at.into()));
            let quad: Vec<_> = (0..4).map(|i| p[i] * (grads[i] - delta[i % 2])).collect();
            each(j);
            self.pack(&ds[2 * j..], &quad);
        }
    }

    /// Packs numbers of a fragment.
    fn pack(&self, to: &[Reg<'k, u32>], sums: &[Reg<'k, f32>]) {
        for (&to, pair) in to.iter().zip(sums.chunks(2)) {
            self.k.cvt_rn_x2_to(to, self.c.half(), pair[0], pair[1]);
        }
    }

    /// This warp has read the floats of a block's queries.
    pub(super) fn release_rows(&self, block: Block<'k>) {
        let done = block.rows.done();
        self.k.bar_warp_sync();
        self.k.when(block.lane.lane.eq(0), || done.arrive());
    }
}
