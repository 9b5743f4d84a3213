//! From the sums of warps to the result.

use super::Sums;
use super::config::Config;
use super::copies::Operands;
use super::mail::Mailbox;
use crate::kernel::gemm::result::TileOfResult;
use crate::kernel::gemm::terms::{Terms, add};
use crate::ptx::{Kernel, Reg};

/// A block's tile of the result.
pub struct Tile<'k, 'c> {
    pub k: &'k Kernel,
    pub c: &'c Config,
    pub base: Reg<'k, u32>,
    pub warp: Reg<'k, u32>,
    pub lane: Reg<'k, u32>,
    pub thread: Reg<'k, u32>,
    /// Which part of the split, unless a cluster adds them.
    pub part: Reg<'k, u32>,
    pub mailbox: Option<Mailbox<'k>>,
    /// Its first token.
    pub token: Reg<'k, u32>,
    /// Which of the blocks' columns.
    pub column: Reg<'k, u32>,
}

/// As many elements of a row of the tile as are stored at once.
#[derive(Clone, Copy)]
struct Unit<'k> {
    /// Which of the tile's.
    number: Reg<'k, u32>,
    /// The bytes before them in staged sums.
    at: Reg<'k, u32>,
    token: Reg<'k, u32>,
    col: Reg<'k, u32>,
    /// Whether there are any for the thread, if that is a question.
    inside: Option<Reg<'k, bool>>,
}

impl<'k> Tile<'k, '_> {
    /// Adds the sums of each weight's warps, and those of a cluster's blocks, in their order, and stores.
    pub fn store(&self, sums: &Sums<'k>, operands: Operands<'k>, terms: Terms<'k>) {
        let (k, c) = (self.k, self.c);
        // All warps are done with their rings.
        k.sync_block();
        self.stage(sums);
        k.sync_block();
        let partial = c.split > 1 && !c.clustered();
        let zero = k.var(0u32);
        let result = TileOfResult {
            terms,
            out: operands.weight.out,
            rows: operands.m,
            cols: operands.weight.n,
            first: (self.token, self.column * c.cols),
            batch: if partial { self.part } else { zero },
        };
        // Of each weight's warps.
        let warps: Vec<_> = (0..c.warps).map(|warp| warp * c.sums_bytes()).collect();
        let sides: Vec<_> = warps.chunks(c.together() as usize).collect();
        let whole = |at| sides.iter().map(|warps| self.whole(warps, at)).collect::<Vec<_>>();
        let store = |sums: &[Vec<_>], Unit { token, col, inside, .. }| match sums {
            [gate, by] => result.store_times(gate, by, token, col, inside),
            sums => result.store(&sums[0], token, col, inside),
        };
        let all = (zero, c.units());
        let Some(mailbox) = self.mailbox else {
            return self.units(all, |unit| store(&whole(unit.at), unit));
        };
        // Everyone is ready for it.
        k.wait_cluster();
        self.units(all, |unit| {
            let send = || mailbox.send(unit.number, &whole(unit.at));
            match unit.inside {
                Some(inside) => k.if_(inside, send),
                None => send(),
            }
        });
        mailbox.wait();
        self.units(mailbox.share(), |unit| store(&mailbox.sums(unit.number), unit));
    }

    /// Writes the warp's sums, token after token.
    fn stage(&self, sums: &Sums<'k>) {
        let (k, c) = (self.k, self.c);
        let pitch = c.sums_pitch();
        let token = self.lane % 4 * 2;
        let to = self.base + self.warp * c.sums_bytes() + (token * pitch + self.lane / 4) * 4;
        for (sums, tile) in sums.iter().zip(0..) {
            for (quad, eight) in sums.iter().zip(0..) {
                for (&sum, i) in quad.iter().zip(0..) {
                    let more = 8 * eight + i % 2;
                    let at = to.at((4 * (more * pitch + 16 * tile + i / 2 * 8)).into());
                    match c.tokens {
                        8.. => k.st_shared(at, [sum]),
                        tokens => k.when((token + more).lt(tokens), || k.st_shared(at, [sum])),
                    }
                }
            }
        }
    }

    /// Calls `each` for those of `count` units from `first` on that are the thread's.
    fn units(&self, (first, count): (Reg<'k, u32>, u32), each: impl Fn(Unit<'k>)) {
        let c = self.c;
        let of_token = c.cols / c.unit;
        for before in (0..count).step_by(c.threads() as usize) {
            let unit = self.thread + before;
            let inside = (before + c.threads() > count).then(|| unit.lt(count));
            let unit = if inside.is_some() { unit.min(count - 1) } else { unit };
            let number = first + unit;
            let (token, col) = (number / of_token, number % of_token * c.unit);
            let at = (token * c.sums_pitch() + col) * 4;
            each(Unit { number, at, token, col, inside });
        }
    }

    /// The sums of all warps, whose parts begin at these places.
    fn whole(&self, warps: &[u32], at: Reg<'k, u32>) -> Vec<Reg<'k, f32>> {
        let parts = warps.iter().map(|&warp| self.load(self.base + warp + at));
        add(parts).expect("there is a warp")
    }

    fn load(&self, at: Reg<'k, u32>) -> Vec<Reg<'k, f32>> {
        match self.c.unit {
            4 => self.k.ld_shared::<f32, 4>(at).to_vec(),
            _ => self.k.ld_shared::<f32, 1>(at).to_vec(),
        }
    }
}
