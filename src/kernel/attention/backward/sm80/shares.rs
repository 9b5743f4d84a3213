//! Shares of dQ: what the keys of a tile add to the gradient of a block of queries.
//!
//! dS is in registers with keys as rows, and a share sums over the keys of all warps. So each warp writes its dS to
//! shared memory, a line of each key. From there a warp takes it transposed as the left operand of its columns of
//! dS·K; and the other of a pair takes it as it is, for dK. Shares are added up in memory, in whatever order.

use super::Gradients;
use super::pass::{Lane, plus};
use crate::kernel::Element;
use crate::kernel::ampere::product::{self, Fragment, Lines, M16};
use crate::kernel::ampere::swizzle::{CHUNK, MatrixOrder};
use crate::kernel::ampere::tile::SwizzledTile;
use crate::kernel::attention::backward::sums::{self, DqSums};
use crate::kernel::attention::backward::work::WorkTile;
use crate::kernel::multiprocessor::WARP;
use crate::ptx::Reg;

/// Bytes of 16 lines.
const LINES: u32 = M16 * SwizzledTile::BYTES;
/// Bytes of 16 elements along a line.
const STEP: u32 = 2 * CHUNK;
/// Fragments of keys that are loaded ahead: more take registers of sums.
const AHEAD: u32 = 4;

impl<'k> Gradients<'k, '_> {
    /// Writes a warp's dS, left operands of each m16 tile.
    pub(super) fn write_score_grads(&self, left: &[Vec<Fragment<'k>>]) {
        let (k, c) = (self.k, self.c);
        let lane = Lane::new(k);
        let chunk = lane.second(c, c.warp_cols() / 8).unwrap_or_else(|| k.var(0));
        let start = self.base + SwizzledTile::place(lane.row(c), chunk) + lane.lane % 4 * 4;
        for (i, step) in (0..).zip(0..c.warp_cols() / M16) {
            for right in 0..2 {
                let start = start ^ (i * STEP + right * CHUNK);
                for (m16, fragments) in (0..).zip(left) {
                    for down in 0..2 {
                        let pair = fragments[step as usize][(2 * right + down) as usize];
                        let lines = m16 * LINES + down * (LINES / 2);
                        k.st_shared(start.at((self.smem.score_grads + lines).into()), [pair]);
                    }
                }
            }
        }
    }

    /// The dS of the other of two paired warps, as that has written it.
    pub(super) fn others_score_grads(&self) -> Vec<Vec<Fragment<'k>>> {
        let (k, c) = (self.k, self.c);
        let Lane { lane, warp, .. } = Lane::new(k);
        let rows = warp / c.sharers() * (c.warp_rows() * SwizzledTile::BYTES);
        let columns = ((warp % 2) ^ 1) * (c.warp_cols() / M16 * STEP);
        let fragment = SwizzledTile::fragment(MatrixOrder::Lines, lane) ^ columns;
        let start = self.base + rows + fragment;
        let of_step = |m16: u32, step: u32| {
            let at = (start ^ (step * STEP)).at((self.smem.score_grads + m16 * LINES).into());
            k.ldmatrix(at, false)
        };
        let steps = || 0..c.warp_cols() / M16;
        (0..c.m16_tiles).map(|m16| steps().map(|step| of_step(m16, step)).collect()).collect()
    }

    /// Adds a warp's part of a share to the sums. The block of queries is of a head; all warps have written dS.
    pub(super) fn add_share(
        &self,
        sums: DqSums<'k>,
        work: &WorkTile<'k>,
        (head, block): (Reg<'k, u32>, Reg<'k, i32>),
    ) {
        let (k, c) = (self.k, self.c);
        let Element::Half(half) = c.element else { panic!("it was checked") };
        let place @ Lane { lane, warp, .. } = Lane::new(k);
        let (m16_tiles, columns) = (c.warp_cols() / M16, c.share_columns());
        let share: Vec<Vec<Reg<f32>>> =
            (0..m16_tiles).map(|_| (0..columns / 2).map(|_| k.var(0f32)).collect()).collect();
        let share: Vec<_> = share.iter().map(|sums| &sums[..]).collect();

        let queries = SwizzledTile::fragment(MatrixOrder::Chunks, lane);
        let queries = match place.second(c, m16_tiles * STEP) {
            Some(before) => queries ^ before,
            None => queries,
        };
        let score_grads = self.base + queries;
        // Of the keys' columns those of this warp.
        let tile = c.left_tiles()[0];
        let group = warp / c.sharers();
        let before = group * (columns * c.element.size());
        let start = SwizzledTile::fragment(MatrixOrder::Lines, lane);
        let start = (start ^ (before % SwizzledTile::BYTES))
            + before / SwizzledTile::BYTES * tile.panel_bytes();
        let start = self.base + start;
        let add = |keys: u32| {
            let fragment = |m16: u32| {
                let at = self.smem.score_grads + keys * LINES;
                vec![k.ldmatrix((score_grads ^ (m16 * STEP)).at(at.into()), true)]
            };
            let left: Vec<_> = (0..m16_tiles).map(fragment).collect();
            let region = self.smem.left[0] + keys * LINES;
            let lines = Lines { tile: tile.part(M16, columns), start, region };
            product::add_lines(half, &share, &left, lines);
        };
        let steps = c.rows() / M16;
        for keys in (0..steps).step_by(AHEAD as usize) {
            // A predicate that always holds.
            k.apart(self.tiles.size[0].ge(0), || (keys..(keys + AHEAD).min(steps)).for_each(add));
        }

        let of_head = work.batch * self.tiles.heads[0] + head;
        let first = block.cast::<u32>() * c.cols;
        let number = sums.first(of_head, work.sequence, work.queries) + first / sums::BLOCK;
        let m16 = plus(first % sums::BLOCK / M16, place.second(c, m16_tiles));
        let thread = (m16 * WARP + lane) * 4 + group * (columns / 8 * sums::OCTET);
        let to = sums.block(number) + thread.wide();
        for (m16, sums) in (0..).zip(&share) {
            for (octet, quad) in (0..).zip(sums.chunks(4)) {
                for (i, &sum) in (0..).zip(quad) {
                    let at = m16 * (4 * WARP) + octet * sums::OCTET + i * sums::PLANE;
                    k.red_add(to.at(at.into()), sum);
                }
            }
        }
    }
}
