//! Which configuration a problem gets: an estimate of cycles for each of a few tiles.

use super::Config;
use crate::kernel::Device;
use crate::kernel::gemm::Problem;

/// A tile, its warps, and blocks of a multiprocessor.
struct Tile {
    rows: u32,
    cols: u32,
    warps: [u32; 2],
    blocks_per_sm: u32,
}

const fn tile(rows: u32, cols: u32, warps: [u32; 2], blocks_per_sm: u32) -> Tile {
    Tile { rows, cols, warps, blocks_per_sm }
}

/// Large warps' tiles load little for each product; small tiles fill the device or waste less of it.
const TILES: [Tile; 10] = [
    tile(128, 256, [2, 4], 1),
    tile(256, 128, [4, 2], 1),
    tile(128, 128, [2, 2], 2),
    tile(64, 128, [2, 2], 2),
    tile(128, 64, [2, 2], 2),
    tile(64, 64, [2, 2], 3),
    tile(32, 128, [1, 4], 2),
    tile(128, 32, [4, 1], 2),
    tile(16, 128, [1, 4], 2),
    tile(128, 16, [4, 1], 2),
];
const SPLITS: [u32; 9] = [1, 2, 3, 4, 6, 8, 12, 16, 32];

// Of a multiprocessor, in a cycle: steps of tensor cores along K, bytes of shared memory, bytes from L2.
// The rates differ between devices; what counts is roughly how they relate.
const STEPS: u64 = 64;
const SHARED_BYTES: u64 = 128;
const L2_BYTES: u64 = 32;
/// Bytes along K of a step, of elements of whatever size.
const STEP_BYTES: u64 = 32;
/// Cycles of a step that nothing hides, of a block's beginning and end, of a second kernel.
const STEP: u64 = 16;
const BLOCK: u64 = 2500;
const LAUNCH: u64 = 4000;

/// The configuration for a problem.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    TILES
        .iter()
        .flat_map(|tile| SPLITS.map(|split| config(problem, device, tile, split)))
        .filter(|config| config.check(device.shared_per_block).is_ok())
        // Each part of a split has at least two stages of the depth.
        .filter(|c| c.split == 1 || problem.k.div_ceil(c.depth.into()) >= 2 * u64::from(c.split))
        .min_by_key(|config| cycles(config, problem, device))
        .expect("the small tiles fit every device")
}

fn config(problem: &Problem, device: &Device, tile: &Tile, split: u32) -> Config {
    let deep = Config {
        elements: problem.elements,
        lhs: problem.lhs,
        rhs: problem.rhs,
        rows: tile.rows,
        cols: tile.cols,
        depth: 128 / problem.elements[0].size(),
        warps: tile.warps,
        stages: 2,
        split,
        blocks_per_sm: tile.blocks_per_sm,
        batched: problem.batch > 1,
        unit: if problem.n.is_multiple_of(4) { 4 } else { 1 },
        epilogue: problem.epilogue,
    };
    // Fewer barriers, unless the ring would be too short.
    let whole = deep.max_stages(device.shared_per_block) >= 3;
    let depth = if whole { deep.depth } else { deep.depth / 2 };
    let config = Config { depth, ..deep };
    Config { stages: config.max_stages(device.shared_per_block).min(8), ..config }
}

/// The estimated cycles of a configuration.
fn cycles(c: &Config, problem: &Problem, device: &Device) -> u64 {
    let sms = u64::from(device.multiprocessors);
    let (rows, cols) = (u64::from(c.rows), u64::from(c.cols));
    let tiles = problem.m.div_ceil(rows) * problem.n.div_ceil(cols) * problem.batch;
    let blocks = tiles * u64::from(c.split);
    let steps = problem.k.div_ceil(c.depth.into()).div_ceil(c.split.into()) * u64::from(c.steps());

    // Of a step along K: 32 bytes of each row and column.
    let stage_bytes = (rows + cols) * STEP_BYTES;
    let warps = u64::from(c.warps[0] * c.warps[1]);
    let read_bytes = warps * u64::from(c.warp_rows() + c.warp_cols()) * STEP_BYTES;
    let step = (rows * cols / STEPS)
        .max((stage_bytes + read_bytes) / SHARED_BYTES)
        .max(stage_bytes / L2_BYTES)
        + STEP;
    // Blocks of a multiprocessor share it, but hide each other's beginning and end.
    let resident = u64::from(c.blocks_per_sm);
    let (waves, rest) = (blocks / (sms * resident), blocks % (sms * resident));
    let wave = |blocks: u64| if blocks == 0 { 0 } else { blocks * step * steps + BLOCK };
    let multiply = waves * wave(resident) + wave(rest.div_ceil(sms));

    let sums = problem.m * problem.n * problem.batch;
    let out_bytes = u64::from(problem.epilogue.out.size());
    let stored = match c.split {
        1 => sums * out_bytes,
        split => sums * (8 * u64::from(split) + out_bytes),
    };
    let second = if c.split > 1 { LAUNCH } else { 0 };
    multiply + stored / (L2_BYTES * sms) + second
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Element;
    use crate::kernel::gemm::{Epilogue, Major};
    use crate::ptx::{Factor, Half, Target};

    const H200: Device =
        Device { target: Target::Sm80, multiprocessors: 132, shared_per_block: 232_448 };
    const A100: Device =
        Device { target: Target::Sm80, multiprocessors: 108, shared_per_block: 166_912 };
    const ADA: Device =
        Device { target: Target::Sm80, multiprocessors: 128, shared_per_block: 101_376 };

    fn problem(batch: u64, m: u64, n: u64, k: u64) -> Problem {
        let epilogue = Epilogue::round(Element::Half(Half::F16));
        let (lhs, rhs) = (Major::K, Major::Outer);
        let elements = [Factor::Half(Half::F16); 2];
        Problem { m, n, k, batch, elements, lhs, rhs, epilogue }
    }

    fn tile_of(device: &Device, batch: u64, m: u64, n: u64, k: u64) -> (u32, u32, u32) {
        let c = choose(&problem(batch, m, n, k), device);
        (c.rows, c.cols, c.split)
    }

    #[test]
    fn large_problems_get_large_tiles() {
        for device in [H200, A100, ADA] {
            for size in [4096, 8192] {
                let (rows, cols, split) = tile_of(&device, 1, size, size, size);
                assert!(rows * cols >= 128 * 128 && split == 1, "{rows}×{cols}, split {split}");
            }
        }
    }

    #[test]
    fn few_rows_or_columns_get_low_or_narrow_tiles() {
        let (rows, _, split) = tile_of(&H200, 1, 1, 4096, 4096);
        assert!(rows == 16 && split > 1, "{rows} rows, split {split}");
        let (_, cols, _) = tile_of(&H200, 1, 4096, 8, 4096);
        assert_eq!(cols, 16);
        assert_eq!(tile_of(&H200, 1, 32, 65536, 512).0, 32);
    }

    #[test]
    fn few_tiles_of_great_depth_are_split() {
        for device in [H200, A100, ADA] {
            let (.., split) = tile_of(&device, 1, 256, 256, 16384);
            assert!(split >= 4, "split {split}");
            let (.., split) = tile_of(&device, 1, 512, 512, 64);
            assert_eq!(split, 1);
        }
    }

    #[test]
    fn every_choice_can_be_built() {
        const SIZES: [u64; 11] = [1, 7, 16, 33, 64, 100, 129, 512, 1000, 4096, 100_000];
        for device in [H200, A100, ADA] {
            for i in 0..SIZES.len().pow(3) {
                let [m, n, k] = [i, i / 11, i / 121].map(|i| SIZES[i % 11]);
                let config = choose(&problem(3, m, n, k), &device);
                config.check(device.shared_per_block).expect("it was checked");
                assert!(u64::from(config.split) <= k.div_ceil(config.depth.into()));
                assert!(n.is_multiple_of(config.unit.into()));
            }
        }
    }
}
