//! How the blocks of a cluster add their sums: each sends its own to those who add them.
//!
//! Each block adds a share of the tile's units, and has room for all parts of them beside the rings of its warps, which may
//! still be read. Nobody asks for another's memory: a block leaves when it has sent its sums and stored its share, and no
//! store is flushed before a barrier of the cluster.

use super::config::Config;
use crate::kernel::Element;
use crate::kernel::gemm::terms::add;
use crate::ptx::{Kernel, Reg};

/// What lies where in a block's mailbox: its share of each part of the split, of each side of a gate. A barrier follows.
#[derive(Clone, Copy)]
pub struct Mail {
    split: u32,
    sides: u32,
    /// Units that each block adds. As all are powers of two, and there are at least as many units as blocks, there is
    /// no rest.
    share: u32,
    /// Floats of a unit.
    unit: u32,
}

impl Mail {
    const BARRIER: u32 = 8;

    pub fn new(c: &Config) -> Self {
        let share = c.units() / c.split;
        Self { split: c.split, sides: c.sums_of_column(), share, unit: c.unit }
    }

    fn unit_bytes(&self) -> u32 {
        self.unit * Element::F32.size()
    }

    /// Bytes of one side of one part.
    fn side_bytes(&self) -> u32 {
        self.share * self.unit_bytes()
    }

    fn part_bytes(&self) -> u32 {
        self.sides * self.side_bytes()
    }

    /// Bytes of all parts, after which the barrier lies.
    fn sum_bytes(&self) -> u32 {
        self.split * self.part_bytes()
    }

    pub fn bytes(&self) -> u32 {
        self.sum_bytes() + Self::BARRIER
    }
}

/// A block's mailbox, and the way to the others'.
#[derive(Clone, Copy)]
pub struct Mailbox<'k> {
    k: &'k Kernel,
    mail: Mail,
    /// Where it begins.
    base: Reg<'k, u32>,
    /// Which part of the split, and so which block of the cluster.
    part: Reg<'k, u32>,
}

impl<'k> Mailbox<'k> {
    /// Gets it ready, and tells the others: for all threads of a block.
    pub fn open(c: &Config, base: Reg<'k, u32>, thread: Reg<'k, u32>, part: Reg<'k, u32>) -> Self {
        let (k, mail) = (base.kernel(), Mail::new(c));
        let base = base + c.mailbox();
        k.if_(thread.eq(0), || {
            let barrier = base.at(mail.sum_bytes().into());
            k.mbarrier_init(barrier, 1);
            k.fence_mbarrier_init();
            k.mbarrier_arrive_expect_tx(barrier, mail.sum_bytes());
        });
        k.bar_warp_sync();
        k.arrive_cluster();
        Self { k, mail, base, part }
    }

    /// Units that the block adds, and the first of them.
    pub fn share(&self) -> (Reg<'k, u32>, u32) {
        (self.part * self.mail.share, self.mail.share)
    }

    /// Sends the sums of each side of a unit to the block that adds them. All blocks must be ready.
    pub fn send(&self, unit: Reg<'k, u32>, sides: &[Vec<Reg<'k, f32>>]) {
        let (k, mail) = (self.k, self.mail);
        let (owner, unit) = (unit / mail.share, unit % mail.share);
        let mine = self.base + self.part * mail.part_bytes() + unit * mail.unit_bytes();
        let to = k.mapa(mine, owner);
        let barrier = k.mapa(self.base, owner).at(mail.sum_bytes().into());
        for (side, sums) in (0..).zip(sides) {
            let to = to.at((side * mail.side_bytes()).into());
            match sums[..] {
                [a, b, c, d] => k.st_async(to, [a, b, c, d], barrier),
                _ => k.st_async(to, [sums[0]], barrier),
            }
        }
    }

    /// Waits for all that the block adds.
    pub fn wait(&self) {
        self.k.mbarrier_wait(self.base.at(self.mail.sum_bytes().into()), self.k.var(0));
    }

    /// The sums of each side of a unit of the block's share: those of all parts, in their order.
    pub fn sums(&self, unit: Reg<'k, u32>) -> Vec<Vec<Reg<'k, f32>>> {
        let (k, mail) = (self.k, self.mail);
        let at = self.base + unit % mail.share * mail.unit_bytes();
        let load = |side: u32, part: u32| {
            let at = at.at((part * mail.part_bytes() + side * mail.side_bytes()).into());
            match mail.unit {
                4 => k.ld_shared::<f32, 4>(at).to_vec(),
                _ => k.ld_shared::<f32, 1>(at).to_vec(),
            }
        };
        let side = |side| add((0..mail.split).map(|part| load(side, part)));
        (0..mail.sides).map(|i| side(i).expect("there is a part")).collect()
    }
}
