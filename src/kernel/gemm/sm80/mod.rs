//! Products on every GPU from Ampere on: warps copy their operands into a ring of stages
//! (`cp.async`), and multiply with `mma.sync` what they load from there (`ldmatrix`).
//!
//! The loop over the depth has neither bounds nor zero-fill: a block takes the last of its tiles of
//! the depth, the only one that may be cut off, first.

mod choose;
mod config;
mod copies;
mod launch;
mod layout;
mod multiply;
mod reduce;

pub use choose::choose;
pub use config::Config;
pub use launch::Launch;
pub use reduce::{Reduce, emit_reduce};

use super::result::TileOfResult;
use super::share::Share;
use super::terms::{Sum, Terms};
use super::{Epilogue, Name, Scale};
use crate::kernel::Element;
use crate::kernel::multiprocessor::WARP;
use crate::kernel::raster::Raster;
use crate::ptx::{Factor, Kernel, Reg, Source, Target};
use copies::Operand;
use layout::Layout;
use multiply::Multiply;

/// The kernel of a configuration that [`Config::check`] accepts. The grid is tiles × split blocks in x.
///
/// Its parameters are those of [`Name`].
/// Addresses of operands and strides are multiples of 16 bytes; `n` is one of [`Config::unit`]. Where the
/// contiguous extent is none, up to 15 bytes after it are read and ignored, but none after the last line.
pub fn emit(config: &Config) -> Source {
    match config.factor() {
        Factor::Half(_) | Factor::E4m3 => emit_sums::<f32>(config),
        Factor::S8 => emit_sums::<i32>(config),
    }
}

fn emit_sums<S: Sum>(config: &Config) -> Source {
    let target = if config.factor() == Factor::E4m3 { Target::Sm89 } else { Target::Sm80 };
    let k = &Kernel::new("matmul", target, config.threads());
    k.blocks_per_sm(config.blocks_per_sm);
    let (lhs, rhs, out) = (k.pointer(Name::Lhs), k.pointer(Name::Rhs), k.pointer(Name::Out));
    let terms = Terms::params(k, config.first_epilogue());
    let [m, n, depth] = [Name::M, Name::N, Name::K].map(|name| k.param::<u32>(name));
    let lines = [Name::LhsLine, Name::RhsLine].map(|name| k.param::<u64>(name));
    let raster = Raster::params(k);
    let batches = config.batched.then(|| Batches::params(k, config.split > 1));
    let base = k.shared(config.shared_bytes());
    let thread = k.thread();

    // With a split, the batch counts the parts too: parts are the outermost dimension.
    let tile = raster.tile(k.block_x(), config.batched || config.split > 1);
    let (part, [lhs, rhs]) = match &batches {
        None => (tile.batch, [lhs, rhs]),
        Some(batches) => batches.operands(config, [lhs, rhs], tile.batch),
    };
    let share = Share::new(depth.div_ceil(config.depth), config.split, || part);
    let operand = |layout: Layout, address, line, extent, first| Operand {
        layout,
        address,
        line,
        extent,
        first,
        depth,
    };
    let multiply = Multiply::<S>::new(
        k,
        config,
        base,
        thread,
        operand(config.lhs_layout(), lhs, lines[0], m, tile.row * config.rows),
        operand(config.rhs_layout(), rhs, lines[1], n, tile.col * config.cols),
    );
    let sums = multiply.run(share);
    let first = (tile.row * config.rows, tile.col * config.cols);
    let result = TileOfResult { terms, out, rows: m, cols: n, first, batch: tile.batch };
    store(config, &result, &sums, base, thread);
    k.finish()
}

impl Config {
    /// The epilogue of the kernel that multiplies.
    pub(super) fn first_epilogue(&self) -> Epilogue {
        match self.split {
            1 => self.epilogue,
            _ if self.factor() == Factor::S8 => {
                Epilogue { scale: Scale::Exact, ..Epilogue::round(Element::F32) }
            }
            _ => Epilogue::round(Element::F32),
        }
    }
}

/// Up to two batch dimensions.
struct Batches<'k> {
    inner: Reg<'k, u32>,
    /// Elements along the inner and the outer one, for each operand.
    strides: [[Reg<'k, u64>; 2]; 2],
    count: Option<Reg<'k, u32>>,
}

impl<'k> Batches<'k> {
    fn params(k: &'k Kernel, split: bool) -> Self {
        let inner = k.param(Name::InnerBatch);
        let strides = [[Name::LhsInner, Name::LhsOuter], [Name::RhsInner, Name::RhsOuter]];
        let strides = strides.map(|side| side.map(|stride| k.param(stride)));
        Self { inner, strides, count: split.then(|| k.param(Name::Batch)) }
    }

    /// The part of the depth and the operands' addresses of product `index`.
    fn operands(
        &self,
        config: &Config,
        addresses: [Reg<'k, u64>; 2],
        index: Reg<'k, u32>,
    ) -> (Reg<'k, u32>, [Reg<'k, u64>; 2]) {
        let (part, index) = match self.count {
            Some(count) => (index / count, index % count),
            None => (index, index),
        };
        let at = [index % self.inner, index / self.inner].map(Reg::wide);
        let operand = |i: usize| {
            let [inner, outer] = self.strides[i];
            addresses[i] + (at[0] * inner + at[1] * outer) * u64::from(config.elements[i].size())
        };
        (part, [operand(0), operand(1)])
    }
}

/// Strips of 16 rows: from the fragments through the warp's own shared memory to `C`, so that lanes
/// side by side store elements side by side.
fn store<'k, S: Sum>(
    c: &Config,
    result: &TileOfResult<'k>,
    sums: &[Vec<[Reg<'k, S>; 4]>],
    base: Reg<'k, u32>,
    thread: Reg<'k, u32>,
) {
    let k = thread.kernel();
    let (lane, warp) = (thread % WARP, thread / WARP);
    let (pitch, size) = (c.strip_pitch(), Element::F32.size());
    let strip = base + warp * c.strip_bytes();
    let write = strip + (lane / 4 * pitch + lane % 4 * 2) * size;
    let lanes_of_row = c.warp_cols() / c.unit;
    let units = 16 * lanes_of_row;
    // Some at a time, so that their loads are under way together.
    let together = (units / WARP).min(4);
    let row = warp / c.warps[1] * c.warp_rows();
    let col = warp % c.warps[1] * c.warp_cols();
    // All warps have read the stages.
    k.sync_block();
    for (i, blocks) in sums.iter().enumerate() {
        for (j, quad) in blocks.iter().enumerate() {
            for h in 0..2 {
                let at = (8 * h * pitch as usize + 8 * j) * size as usize;
                k.st_shared(write.at(at as i64), [quad[2 * h], quad[2 * h + 1]]);
            }
        }
        k.bar_warp_sync();
        k.for_(0, units, WARP * together, |done| {
            let loaded: Vec<_> = (0..together)
                .map(|u| {
                    let unit = done + lane + u * WARP;
                    let (line, col) = (unit / lanes_of_row, unit % lanes_of_row * c.unit);
                    let from = strip + (line * pitch + col) * size;
                    let sums = match c.unit {
                        4 => k.ld_shared::<S, 4>(from).to_vec(),
                        _ => k.ld_shared::<S, 1>(from).to_vec(),
                    };
                    (sums, line, col)
                })
                .collect();
            for (sums, line, at) in loaded {
                result.store(&sums, row + line + 16 * i as u32, col + at, None);
            }
        });
        k.bar_warp_sync();
    }
}
