//! Products on Hopper: a warpgroup lets the copy engine (TMA) fill a ring of stages, one or two
//! others multiply with wgmma.
//!
//! The kernel computes `rows × cols` of tiles. It does so for `C`, or, where M is small, for
//! `Cᵀ = Bᵀ·Aᵀ` ([`Orient::Swapped`]): then the large dimension fills wgmma's 64 rows and N shrinks to
//! the tokens.

mod config;
mod descriptor;
mod load;
mod store;

pub use config::{Boxes, Config, DEPTH, Launch, MAX_SHARED, Order, Orient, Store};

use super::share::Share;
use crate::kernel::raster::{Raster, Tile};
use crate::kernel::ring::Cursor;
use crate::ptx::{Kernel, Reg, Source, Target, Wgmma};
use config::{Plan, SLAB_BYTES, WARPGROUP};
use descriptor::Descriptor;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Parameters, in order:
///
/// | | type | |
/// |---|---|---|
/// | `lhs`, `rhs` | descriptor | of the kernel's left and right operand; a box is 64 elements wide and has the lines of [`Config::lhs_boxes`] and [`Config::rhs_boxes`] |
/// | `out` | descriptor or address | of `C`: a descriptor for [`Store::Tma`], with boxes of [`Config::slab_cols`] columns and 64 rows |
/// | `m`, `n` | u32 | rows and columns of `C` |
/// | `bias` | address | only with a bias |
/// | `depth` | u32 | stages along K |
/// | `tile_rows`, `tile_cols`, `tiles`, `group` | u32 | only for [`Order::Raster`]: those of [`Launch`] |
/// | `inner_batch` | u32 | only if batched: the length of the inner batch dimension |
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("matmul", Target::Sm90a, config.threads());
    k.blocks_per_sm(config.blocks_per_sm);
    k.cluster(config.cluster());
    let plan = config.plan();
    let (lhs, rhs) = (k.tensor_map("lhs"), k.tensor_map("rhs"));
    let out = match config.store {
        Store::Tma => Out::Map(k.tensor_map("out")),
        Store::Staged { unit } => Out::Memory { unit, address: k.pointer("out") },
    };
    let size = [k.param("m"), k.param("n")];
    let bias = config.epilogue.bias.map(|_| k.pointer("bias"));
    let depth = k.param("depth");
    let raster = (config.order == Order::Raster).then(|| Raster::params(k));
    let inner_batch = config.batched.then(|| k.param("inner_batch"));
    let base = k.shared(plan.bytes);
    let thread = k.thread();
    let warp = k.broadcast(thread / 32, 0);
    let group = k.broadcast(thread / WARPGROUP, 0);

    k.if_(warp.eq(0), || {
        k.if_(k.elect(), || {
            k.prefetch_tensor_map(lhs);
            k.prefetch_tensor_map(rhs);
            if let Out::Map(map) = out {
                k.prefetch_tensor_map(map);
            }
            plan.ring.init(k, base, config.consumers() * config.together());
        })
    });
    match config.pair {
        true => k.sync_cluster(),
        false => k.sync_block(),
    }
    k.wait_for_stream();
    k.let_next_start();

    let g =
        Gemm { k, c: config, plan, lhs, rhs, out, size, bias, depth, raster, inner_batch, base };
    k.if_else(
        group.eq(0),
        || {
            if config.moves_registers() {
                k.give_registers(40);
            }
            k.if_(warp.eq(0), || k.if_(k.elect(), || g.produce()));
            k.sync_warp();
            if config.split > 1 {
                k.sync_cluster();
            }
            if config.cluster() > 1 {
                k.sync_cluster();
            }
        },
        || {
            if config.moves_registers() {
                k.take_registers(232);
            }
            g.consume(thread - WARPGROUP, group - 1);
            if config.cluster() > 1 {
                // Nobody leaves while others read its memory or arrive at its barriers.
                k.sync_cluster();
            }
        },
    );
    k.finish()
}

#[derive(Clone, Copy)]
enum Out<'k> {
    Map(Reg<'k, u64>),
    Memory { unit: u32, address: Reg<'k, u64> },
}

struct Gemm<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    plan: Plan,
    lhs: Reg<'k, u64>,
    rhs: Reg<'k, u64>,
    out: Out<'k>,
    /// Rows and columns of `C`.
    size: [Reg<'k, u32>; 2],
    bias: Option<Reg<'k, u64>>,
    /// Stages of the whole depth.
    depth: Reg<'k, u32>,
    raster: Option<Raster<'k>>,
    inner_batch: Option<Reg<'k, u32>>,
    base: Reg<'k, u32>,
}

impl<'k> Gemm<'k, '_> {
    /// Runs `body` for each tile of this block.
    fn tiles(&self, body: impl FnOnce(Tile<'k>)) {
        let (k, c) = (self.k, self.c);
        let single = c.cluster() == 1;
        let (first, all) = match single {
            true => (k.block_x(), k.blocks_x()),
            false => (k.cluster_x(), k.clusters_x()),
        };
        let place = |tile: Tile<'k>| match c.pair {
            true => Tile { row: tile.row * 2 + k.cluster_rank(), ..tile },
            false => tile,
        };
        match self.raster {
            Some(raster) => {
                k.for_(first, raster.count, all, |i| body(place(raster.tile(i, c.batched))));
            }
            None => body(place(Tile { batch: k.block_z(), row: first, col: k.block_y() })),
        }
    }

    /// This block's share of the depth.
    fn share(&self) -> Share<'k> {
        Share::new(self.depth, self.c.split, || self.k.cluster_rank())
    }

    /// A warpgroup multiplies 64 rows of each tile and stores them.
    fn consume(&self, thread: Reg<'k, u32>, group: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let place = self.plan.ring.consumer(k, self.base);
        let leader = (thread % WARPGROUP).eq(0);
        // The threads that say at which block's barriers a stage is free again.
        let release = match c.pair {
            false => (leader, self.base),
            true => {
                let i = thread % WARPGROUP;
                (i.lt(2), k.mapa(self.base, i.min(1)))
            }
        };
        let sums: Vec<_> = (0..c.cols / 2).map(|_| k.reg::<f32>()).collect();
        self.tiles(|tile| {
            self.multiply(&sums, place, group, release);
            match self.out {
                Out::Map(map) => self.store_slabs(&sums, map, tile, thread, group, leader),
                Out::Memory { unit, address } => {
                    self.stage(&sums, thread);
                    self.store_staged(unit, address, tile, thread);
                }
            }
        });
        if let Out::Map(_) = self.out {
            k.when(leader, || k.tma_wait_read(0));
        }
    }

    /// Sums over this block's share of the depth, with one wgmma group under way while the next
    /// stage is waited for.
    fn multiply(
        &self,
        sums: &[Reg<'k, f32>],
        place: Cursor<'k>,
        group: Reg<'k, u32>,
        (releases, barriers): (Reg<'k, bool>, Reg<'k, u32>),
    ) {
        let (k, c) = (self.k, self.c);
        let arrive = |at: Reg<'k, u32>| match c.pair {
            true => k.mbarrier_arrive_cluster(at),
            false => k.mbarrier_arrive(at),
        };
        let lhs = Descriptor::new(self.base + self.plan.lhs + group * SLAB_BYTES, c.lhs);
        let rhs = Descriptor::new(self.base + self.plan.rhs, c.rhs);
        let Share { count, .. } = self.share();
        let behind = k.reg::<u32>();
        k.for_(0, count, 1, |i| {
            place.wait();
            let done = place.done(barriers);
            let a = lhs.stage(place.stage, c.lhs_boxes().bytes);
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            let later = i.ne(0);
            k.wgmma_fence();
            for step in 0..DEPTH / 16 {
                let accumulate = if step == 0 { later.into() } else { true.into() };
                let (a, b) = (a.operand(step), b.operand(step));
                k.wgmma(sums, Wgmma { half: c.half, a, b, accumulate });
            }
            k.wgmma_commit();
            k.wgmma_wait(1);
            k.when(releases & later, || arrive(behind));
            behind.set(done);
            place.advance();
        });
        k.wgmma_wait(0);
        k.when(releases, || arrive(behind));
    }
}
