//! Products on Hopper: a warpgroup lets TMA fill a ring of stages, one to four
//! others multiply with wgmma.
//!
//! The kernel computes `rows × cols` of tiles. It does so for `C`, or, where M is small, for
//! `Cᵀ = Bᵀ·Aᵀ` ([`Orient::Swapped`]): then the large dimension fills wgmma's 64 rows and N shrinks to
//! the tokens.

mod blocks;
mod boxes;
mod config;
mod launch;
mod lines;
mod load;
mod packed;
mod shared;
mod slabs;
mod store;

pub use boxes::Boxes;
pub(in crate::kernel) use config::TALL;
pub use config::{Config, Order, Orient, Store};
pub use launch::Launch;

use super::share::Share;
use super::terms::{Sum, Terms};
use super::{Major, Name, Scale};
use crate::kernel::hopper::barriers::Mbarrier;
use crate::kernel::hopper::pingpong::PingpongTurn;
use crate::kernel::hopper::product::{Descriptor, LeftStep, products};
use crate::kernel::hopper::ring::Cursor;
use crate::kernel::hopper::{SLAB_BYTES, WARPGROUP};
use crate::kernel::raster::{Raster, Tile};
use crate::kernel::w4::params::WeightNames;
use crate::kernel::w4::weight::Weight;
use crate::ptx::{Factor, Kernel, Reg, Source, Target};
use blocks::BlockScales;
use packed::Packed;
use shared::SharedMap;

/// The kernel of a configuration that [`Config::check`] accepts.
///
/// Its parameters are those of [`Name`](super::Name): `tile_rows` to `group` only for [`Order::Raster`].
pub fn emit(config: &Config) -> Source {
    let k = &Kernel::new("matmul", Target::Sm90a, config.threads());
    k.blocks_per_sm(config.blocks_per_sm);
    k.cluster(config.split);
    let smem = config.smem();
    let result = |name| match config.store {
        Store::Tma => k.tensor_map(name),
        Store::Staged { .. } => k.pointer(name),
    };
    let (lhs, weights) = match config.weight {
        None => (Some(k.tensor_map(Name::Lhs)), vec![]),
        Some(scheme) => {
            let codes = |names: &WeightNames| match scheme.codes.are_bytes() {
                true => (k.tensor_map(names.codes), None),
                false => (k.pointer(names.codes), None),
            };
            (None, Weight::params(k, scheme, config.weights, codes, result))
        }
    };
    let rhs = k.tensor_map(Name::Rhs);
    let first = weights.first();
    let out = first.map_or_else(|| result(Name::Out), |weight| weight.out);
    let size = [k.param(Name::M), first.map_or_else(|| k.param(Name::N), |weight| weight.n)];
    let terms = Terms::params(k, config.epilogue);
    let blocks = (config.epilogue.scale == Scale::Blocks).then(|| BlockScales {
        rows: k.pointer(Name::RowScales),
        cols: k.pointer(Name::ColScales),
    });
    let depth = k.param(Name::Depth);
    let raster = (config.order == Order::Raster).then(|| Raster::params(k));
    let inner_batch = config.batched.then(|| k.param(Name::InnerBatch));
    let base = k.shared(smem.bytes);
    let thread = k.thread();
    let warp = k.shfl_idx(thread / 32, 0);
    let group = k.shfl_idx(thread / WARPGROUP, 0);

    k.if_(warp.eq(0), || {
        k.if_(k.elect_sync(), || {
            let outs = match weights.as_slice() {
                [] => vec![out],
                all => all.iter().map(|weight| weight.out).collect(),
            };
            let outs = outs.into_iter().filter(|_| config.store == Store::Tma);
            for map in lhs.into_iter().chain([rhs]).chain(outs) {
                k.prefetch_tensor_map(map);
            }
            if let Some(pingpong) = smem.pingpong {
                pingpong.init(k, base);
            }
            smem.ring.init(k, base, config.readers());
        })
    });
    let lhs = match lhs {
        Some(map) => Left::Matrix(map),
        None => {
            let depth = k.param(Name::K);
            Left::Packed(Packed::new(config, weights[0], depth, base + smem.table))
        }
    };
    k.sync_block();
    k.griddepcontrol_wait();
    k.griddepcontrol_launch_dependents();

    let g = Gemm {
        k,
        c: config,
        smem: &smem,
        lhs,
        weights: &weights,
        rhs,
        out,
        size,
        terms,
        blocks,
        depth,
        raster,
        inner_batch,
        base,
    };
    let registers = config.moved_registers();
    k.if_else(
        group.eq(0),
        || {
            if let Some([producer, _]) = registers {
                k.setmaxnreg_dec(producer);
            }
            let produce = || k.if_(k.elect_sync(), || g.produce(warp));
            match config.producers() {
                1 => k.if_(warp.eq(0), produce),
                _ => produce(),
            }
            k.bar_warp_sync();
            if config.split > 1 {
                // Once for the staged parts, once for their sum.
                k.sync_cluster();
                k.sync_cluster();
            }
        },
        || {
            if let Some([_, consumer]) = registers {
                k.setmaxnreg_inc(consumer);
            }
            let (thread, group) = (thread - WARPGROUP, group - 1);
            match config.factor() {
                Factor::Half(_) | Factor::E4m3 => g.consume::<f32>(thread, group),
                Factor::S8 => g.consume::<i32>(thread, group),
            }
            if config.split > 1 {
                // Nobody leaves while others read its memory.
                k.sync_cluster();
            }
        },
    );
    k.finish()
}

/// The left operand. It is copied while the text is written, and registers are numbers.
#[derive(Clone, Copy)]
#[allow(clippy::large_enum_variant)]
enum Left<'k> {
    /// By its descriptor.
    Matrix(Reg<'k, u64>),
    Packed(Packed<'k>),
}

#[derive(Clone, Copy)]
struct Gemm<'k, 'c> {
    k: &'k Kernel,
    c: &'c Config,
    smem: &'c SharedMap,
    lhs: Left<'k>,
    /// If the left operand is packed: all of those that have tiles.
    weights: &'c [Weight<'k>],
    rhs: Reg<'k, u64>,
    /// The address of `C`, or its descriptor.
    out: Reg<'k, u64>,
    /// Rows and columns of `C`.
    size: [Reg<'k, u32>; 2],
    terms: Terms<'k>,
    blocks: Option<BlockScales<'k>>,
    /// Stages of the whole depth.
    depth: Reg<'k, u32>,
    raster: Option<Raster<'k>>,
    inner_batch: Option<Reg<'k, u32>>,
    base: Reg<'k, u32>,
}

impl<'k> Gemm<'k, '_> {
    /// Runs `body` for each tile of this block, or of its warpgroup `turn` if warpgroups play ping-pong.
    fn tiles(&self, turn: Option<Reg<'k, u32>>, body: impl FnOnce(Tile<'k>)) {
        let (k, c) = (self.k, self.c);
        let Some(raster) = self.raster else {
            let row = if c.split == 1 { k.block_x() } else { k.cluster_x() };
            return body(Tile { batch: k.block_z(), row, col: k.block_y() });
        };
        let (first, all) = (k.block_x(), k.blocks_x());
        let (first, all) = match turn {
            None => (first, all),
            Some(turn) => (first + turn * all, all * c.consumers()),
        };
        k.for_(first, raster.count, all, |i| body(raster.tile(i, c.batched)));
    }

    /// With the weight, of as many as there are, that has a tile, and the tile as one of that weight's.
    fn of_weight(&self, tile: Tile<'k>) -> (Self, Tile<'k>) {
        let Left::Packed(mut packed) = self.lhs else { return (*self, tile) };
        let (weight, row) = Weight::of_line(self.weights, tile.row, self.c.rows);
        let (out, size) = (weight.out, [self.size[0], weight.n]);
        packed.weight = weight;
        (Self { lhs: Left::Packed(packed), out, size, ..*self }, Tile { row, ..tile })
    }

    /// This block's share of the depth.
    fn share(&self) -> Share<'k> {
        Share::new(self.depth, self.c.split, || self.k.cluster_rank())
    }

    /// A warpgroup multiplies 64 rows of each tile, 128 of the tallest, or all rows of each second one, and stores them.
    fn consume<S: Sum>(&self, thread: Reg<'k, u32>, group: Reg<'k, u32>) {
        let (k, c) = (self.k, self.c);
        let place = self.smem.ring.consumer(k, self.base);
        let leader = (thread % WARPGROUP).eq(0);
        let turn = self.smem.pingpong.map(|both| both.join(self.base, group, leader));
        if turn.is_some() {
            k.if_(group.ne(0), || place.skip(self.depth));
        }
        let tile = |_| (0..c.cols / 2).map(|_| k.reg::<S>()).collect();
        let accumulators: Vec<Vec<_>> = (0..c.m64_tiles()).map(tile).collect();
        self.tiles(turn.map(|_| group), |tile| {
            let (of, tile) = self.of_weight(tile);
            let scales = of.copy_scales(tile, thread, group);
            // Those of packed codes and of blocks are floats: see `Config::check`.
            let cast = |tile: &Vec<Reg<'k, S>>| tile.iter().map(|sum| sum.cast()).collect();
            let floats = || accumulators.iter().map(cast).collect::<Vec<Vec<_>>>();
            match &of.lhs {
                Left::Packed(packed) => {
                    of.multiply_packed(packed, &floats()[0], place, tile, (thread, group));
                }
                Left::Matrix(_) if c.promotes() => {
                    of.promote(&floats(), place, tile, (thread, group, leader));
                }
                Left::Matrix(_) => of.multiply(&accumulators, place, group, turn, leader),
            }
            match c.store {
                Store::Tma => of.store_slabs(&accumulators, tile, (thread, group), leader, scales),
                Store::Staged { unit } => {
                    of.stage(&accumulators[0], thread);
                    of.store_staged::<S>(unit, tile, thread);
                }
            }
        });
        if c.store == Store::Tma {
            k.when(leader, || k.tma_wait_read(0));
        }
    }

    /// Accumulates over this block's share of the depth, with one wgmma group under way while the next
    /// stage is waited for.
    fn multiply<S: Sum>(
        &self,
        accumulators: &[Vec<Reg<'k, S>>],
        place: Cursor<'k>,
        group: Reg<'k, u32>,
        turn: Option<PingpongTurn<'k>>,
        leader: Reg<'k, bool>,
    ) {
        let (k, c) = (self.k, self.c);
        let first_rows = match turn {
            None => group * SLAB_BYTES,
            Some(turn) => {
                turn.begin();
                k.var(0)
            }
        };
        let lhs = descriptor(self.base + self.smem.lhs + first_rows, c.lhs, c.rows, c.depth());
        let rhs = descriptor(self.base + self.smem.rhs, c.rhs, c.cols, c.depth());
        let Share { count, .. } = self.share();
        // The barrier of the stage whose products are under way.
        let before = Mbarrier::unset(k);
        k.for_(0, count, 1, |i| {
            place.wait();
            let done = place.done();
            let a = lhs.stage(place.stage, c.lhs_boxes().bytes);
            let b = rhs.stage(place.stage, c.rhs_boxes().bytes);
            let later = i.ne(0);
            products(c.factor(), accumulators, c.depth(), later, |step| {
                let b = b.operand(step);
                ((0..).map(move |i| LeftStep::Shared(a.rows(i).operand(step))), b)
            });
            k.wgmma_wait(1);
            k.when(leader & later, || before.arrive());
            before.set(done);
            place.advance();
        });
        if let Some(turn) = turn {
            turn.end();
            place.skip(self.depth);
        }
        k.wgmma_wait(0);
        k.when(leader, || before.arrive());
    }
}

/// The descriptor of the first stage of an operand, which has `extent` rows or columns and is `depth` deep.
fn descriptor(address: Reg<u32>, major: Major, extent: u32, depth: u32) -> Descriptor {
    match major {
        Major::K => Descriptor::along_k(address, extent),
        Major::Outer => Descriptor::across_k(address, depth),
    }
}
