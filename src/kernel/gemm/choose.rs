//! The choice of Hopper's kernel for a problem: an estimate of the time of each candidate.
//!
//! The candidates are the shapes that won somewhere, and the constants were fitted, on 1439 timings of
//! 127 problems (H200, 2026-11-23; `cargo bench --features cuda --bench matmul -- --sweep all`). On
//! those the choice is 1.6 % slower than the fastest kernel on average, of which 1.0 % is that not all
//! shapes are candidates. docs/notebook.md has what was learnt.

use super::sm90::{Config, Launch, Order, Orient, Store, TALL};
use super::{BLOCK, Major, Problem, Scale};
use crate::kernel::Device;
use crate::kernel::w4::{self, Codes, Scheme};
use crate::ptx::Factor;

/// The largest number of blocks along y and z of a grid.
const GRID_LIMIT: u32 = 65_535;
/// Columns of a tile that takes a whole small dimension.
const NARROW: [u32; 8] = [8, 16, 24, 32, 48, 64, 96, 128];
/// Columns of the others.
const WIDE: [u32; 7] = [64, 96, 128, 160, 192, 224, 256];
/// Columns of tiles of 128 rows that a warpgroup has to itself: for large products, and for a tile that
/// has the whole of the smaller side.
const OWN: [u32; 6] = [128, 144, 160, 168, 176, 192];

/// What estimates take for the clock, 1.7 GHz.
pub(in crate::kernel) const CLOCKS_PER_US: f64 = 1700.0;

/// The configuration with the least estimated time.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    candidates(problem, device)
        .into_iter()
        .map(|config| (estimate(&config, problem, device), config))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .expect("each problem has a candidate")
        .1
}

/// The configurations worth an estimate.
pub fn candidates(problem: &Problem, device: &Device) -> Vec<Config> {
    let mut all = Vec::with_capacity(32);
    for orient in [Orient::Plain, Orient::Swapped] {
        let [height, width] = orient.order([problem.m, problem.n]);
        // Scales of blocks of n are those of whole tiles.
        let divides = |cols: u32| {
            let blocks = problem.epilogue.scale == Scale::Blocks;
            !blocks || orient == Orient::Swapped || BLOCK.is_multiple_of(cols)
        };
        let mut narrow = NARROW.into_iter().filter(|&cols| divides(cols));
        let whole = narrow.find(|&cols| u64::from(cols) >= width);
        // Both dimensions small: the larger one fills wgmma's rows.
        let narrow = whole.filter(|_| width <= height);
        let enough = WIDE.iter().position(|&cols| u64::from(cols) >= width);
        let wide = match orient {
            Orient::Plain if problem.m > 48 && problem.n > 48 => {
                &WIDE[..enough.map_or(WIDE.len(), |i| i + 1)]
            }
            _ => &[],
        };
        for rows in [64, 128] {
            for split in [1, 2, 4, 8] {
                if let Some(cols) = narrow {
                    // Registers of a second block are those of the second sums of blocks, or of what a zero point takes.
                    let promoted = problem.elements[0] == Factor::E4m3;
                    let most = match problem.epilogue.scale {
                        _ if promoted && rows == 128 => 0,
                        // Nor are there any for scales of so many columns.
                        Scale::Blocks | Scale::ZeroPoint => 32,
                        _ => 64,
                    };
                    let blocks_per_sm = if cols <= most { 2 } else { 1 };
                    let shape = Shape { split, blocks_per_sm, ..Shape::new(orient, rows, cols) };
                    all.extend(shape.config(problem, device));
                }
                // Blocks that share a depth read nothing in common: wide tiles lose more by that.
                if rows == 64 || split == 1 {
                    let shape = |&cols| Shape { split, ..Shape::new(orient, rows, cols) };
                    all.extend(wide.iter().map(shape).filter_map(|s| s.config(problem, device)));
                }
            }
        }
        // Sums that are scaled on their way take long to add up, and one warpgroup's products run meanwhile: 4096×4096×4096
        // took 121 µs, and 126 in tiles of 128×128. Without such scales it was 110, and 104.
        if problem.epilogue.scale == Scale::Blocks && orient == Orient::Plain {
            all.extend(Shape::new(orient, TALL, 128).config(problem, device));
        }
        // Weights of layers by up to 128 tokens take other tiles; two tiles along the smaller side were
        // 3 % behind (256×128256×4096), one tile across 7 % ahead (192×128256×4096).
        let across = |&cols: &u32| width > 128 && width <= cols.into();
        let several = height.min(width) >= 384;
        let own = OWN.into_iter().filter(|cols| several || across(cols));
        let own = own.map(|cols| Shape { pingpong: true, ..Shape::new(orient, 128, cols) });
        all.extend(own.filter_map(|shape| shape.config(problem, device)));
    }
    all
}

/// The choices that decide most about speed.
pub(in crate::kernel) struct Shape<'a> {
    pub orient: Orient,
    pub rows: u32,
    pub cols: u32,
    pub split: u32,
    pub teams: u32,
    pub blocks_per_sm: u32,
    pub pingpong: bool,
    pub weights: Option<&'a w4::Problem>,
}

impl Shape<'_> {
    /// One that is not split.
    pub fn new(orient: Orient, rows: u32, cols: u32) -> Self {
        let (split, blocks_per_sm, pingpong, weights) = (1, 1, false, None);
        Self { orient, rows, cols, split, teams: 1, blocks_per_sm, pingpong, weights }
    }

    /// All other choices, unless the shape is not possible or plainly idle.
    pub fn config(self, problem: &Problem, device: &Device) -> Option<Config> {
        let Self { orient, rows, cols, split, teams, blocks_per_sm, pingpong, weights } = self;
        let weight = weights.map(|of| of.scheme);
        let [lhs, rhs] = orient.order([problem.lhs, problem.rhs]);
        let [height, width] = orient.order([problem.m, problem.n]);
        let elements = orient.order(problem.elements);
        if u64::from(split) > problem.k.div_ceil(elements[0].per_line().into()) {
            return None;
        }
        let widths = weights.map_or(vec![problem.n], |of| of.widths().to_vec());
        let in_units = |unit: u64| widths.iter().all(|n| n.is_multiple_of(unit));
        let aligned = in_units(16 / u64::from(problem.epilogue.out.size()));
        let whole = orient == Orient::Plain && cols.is_multiple_of(64);
        let slabs = pingpong || (weight.is_some() && cols >= 32);
        // The last of a row's slabs would add some columns twice.
        let apart = !problem.epilogue.adds || cols.is_multiple_of(32);
        let tma = aligned && split == 1 && teams == 1 && (whole || slabs) && apart;
        let unit = if in_units(4) { 4 } else { 1 };
        let largest = (rows, cols) == (128, 256);
        let mut config = Config {
            elements,
            weight,
            weights: weights.map_or(1, w4::Problem::weights),
            lhs,
            rhs,
            orient,
            rows,
            cols,
            lhs_lines: lines(lhs, rows, height),
            rhs_lines: match rhs {
                // Little of the last box is outside.
                Major::K if pingpong => cols,
                _ => lines(rhs, cols, width),
            },
            stages: 2,
            split,
            teams,
            pingpong,
            store_stages: 2,
            order: Order::Grid,
            blocks_per_sm,
            batched: problem.batch > 1,
            store: if tma { Store::Tma } else { Store::Staged { unit } },
            epilogue: problem.epilogue,
        };
        let launch = match weights {
            None => Launch::new(&config, problem, device.multiprocessors),
            Some(_) => Launch::of_weights(&config, problem, &widths, device.multiprocessors),
        };
        if pingpong && problem.elements[0] == Factor::E4m3 {
            return None;
        }
        // There are no turns to take with a tile or less for each block.
        if pingpong && (!tma || launch.tiles <= device.multiprocessors) {
            return None;
        }
        // Without a swizzled line's width wgmma reads lines of the depth at half the speed.
        if pingpong && rhs == Major::Outer && !cols.is_multiple_of(64) {
            return None;
        }
        // ptxas loads a bias for each column of a tile at once, and spills; of what comes through shared memory,
        // all of 64 columns.
        let crowded = match problem.epilogue.vector_bytes() {
            None => problem.epilogue.bias.is_some() && (orient == Orient::Plain || cols > 176),
            Some(_) => problem.epilogue.out.size() == 2 && orient == Orient::Plain && cols > 176,
        };
        if pingpong && crowded {
            return None;
        }
        // Teams have a block for each tile.
        if teams > 1 && split == 1 && launch.tiles > device.multiprocessors {
            return None;
        }
        // Parts that read nothing in common are for the few small tiles of a deep product: wider
        // tiles in eight parts were estimated at 35 µs for 64×4096×14336, and took 41.
        if split > 2 && (cols > 64 || launch.tiles > device.multiprocessors / 8) {
            return None;
        }
        // The scales of blocks and a bias do not fit the registers beside 192 columns in two places, nor beside twice 128.
        let scaled = problem.epilogue.scale == Scale::Blocks && problem.epilogue.bias.is_some();
        if scaled && orient == Orient::Plain && (cols > 128 || rows == TALL) {
            return None;
        }
        // Clusters of eight large blocks that fill the device do not all find room at once: 14.8 µs for 128×1024×4096,
        // and 10.9 in four parts.
        if weight.is_some()
            && split > 4
            && launch.tiles > device.multiprocessors * blocks_per_sm / 9
        {
            return None;
        }
        // Each column of a tile of `Cᵀ` has scales of its own, and two sums.
        let wide = if rows == 64 { 64 } else { 32 };
        let blocks = problem.epilogue.scale == Scale::Blocks;
        if blocks && orient == Orient::Swapped && cols > wide {
            return None;
        }
        let beyond = launch.grid[1..].iter().any(|&blocks| blocks > GRID_LIMIT);
        let waves = launch.tiles > device.multiprocessors * blocks_per_sm;
        if beyond || (waves && split == 1 && (tma || cols <= 128 && orient == Orient::Swapped)) {
            config.order = Order::Raster;
            // Many rows find the right operand in L2: a short ring will do, and leaves room for the
            // result. From memory, or with one tile for each block, a long ring is faster.
            config.store_stages = if largest && launch.tile_rows >= 8 { 4 } else { 2 };
        }
        config.stages = config.max_stages(device.shared_per_block).min(16);
        // A stage is always the same team's.
        config.stages -= config.stages % teams;
        (config.stages >= 3 && config.check(device.shared_per_block).is_ok()).then_some(config)
    }
}

/// Lines of a box for a tile's `extent` of a matrix's `whole`: few boxes, but little of the last one
/// outside, which costs about 5 clocks a line.
fn lines(major: Major, extent: u32, whole: u64) -> u32 {
    if major == Major::Outer {
        // A box has all of the depth: the number means nothing, and is always the same.
        return 64;
    }
    let wasted = |lines: u32| whole.next_multiple_of(lines.into()) - whole;
    let fits = |&lines: &u32| extent.is_multiple_of(lines) && wasted(lines) * 32 <= whole;
    [64, 32, 16].into_iter().find(fits).unwrap_or(8)
}

/// Microseconds, roughly.
pub fn estimate(config: &Config, problem: &Problem, device: &Device) -> f64 {
    /// Bytes that a multiprocessor takes from L2 in a clock, and how much of what its neighbour takes
    /// too counts.
    const FILL: f64 = 52.5;
    const SHARED: f64 = 0.56;
    /// Bytes per µs from memory and, for all multiprocessors, from L2.
    const MEMORY: f64 = 4.28e6;
    const L2: f64 = 18.25e6;
    /// What stays in L2 between calls.
    const CACHED: f64 = 45e6;
    /// Bytes on their way to a multiprocessor that saturate memory.
    const IN_FLIGHT: f64 = 53_600.0;

    let launch = Launch::new(config, problem, device.multiprocessors);
    let sms = f64::from(device.multiprocessors);
    let resident = f64::from(config.blocks_per_sm);
    let tiles = f64::from(launch.tiles);
    let blocks = tiles * f64::from(config.split);
    let slots = sms * resident;

    // A stage: what wgmma needs, or what its bytes need to arrive.
    let cols = f64::from(config.cols);
    let each = f64::from(config.rows / 64) * 4.0 * (cols / 2.0).max(16.0 + cols / 4.0);
    let teams = f64::from(config.teams);
    let multiply = match config.weight {
        Some(scheme) => {
            let together = (blocks / sms).ceil().min(resident);
            decoded(config, &scheme, each * teams * together, together) / teams / together
        }
        None => each,
    };
    let [lhs, rhs] = [config.lhs_bytes(), config.rhs_boxes().bytes].map(f64::from);
    // Neighbours are tiles below each other: they share the right operand, or, in the only row of
    // tiles, the left one; of a split, neither.
    let distinct = match (config.split, launch.tile_rows) {
        (1, 1) => SHARED * lhs + rhs,
        (1, _) => lhs + SHARED * rhs,
        _ => lhs + rhs,
    };
    // Sums of a stage are added up, after its scales have come: more of it is in the way where there is no other stage's
    // meanwhile.
    let (added, latency) = match (problem.elements[0], problem.epilogue.scale) {
        (Factor::E4m3, Scale::Blocks) => {
            let added = match (config.orient, config.rows, config.cols) {
                (Orient::Plain, TALL, _) => 450.0,
                (Orient::Plain, _, ..=128) => 240.0,
                (Orient::Plain, ..) => 300.0,
                (Orient::Swapped, ..) => 340.0,
            };
            (added, 740.0)
        }
        (Factor::E4m3, _) => (if config.cols > 128 { 200.0 } else { 60.0 }, 0.0),
        _ => (0.0, 0.0),
    };
    let stage = multiply.max(distinct / FILL) + added;
    // Of as many blocks of a multiprocessor.
    let stages = |blocks: f64| (stage * blocks).max(latency);
    let depth = f64::from(launch.depth.div_ceil(config.split));

    let area = f64::from(config.rows * config.cols);
    let bytes = f64::from(config.epilogue.out.size());
    let end = match config.store {
        Store::Tma => {
            640.0 + 0.026 * area * bytes * if config.store_stages > 2 { 0.65 } else { 1.0 }
        }
        Store::Staged { .. } => 1335.0 + 0.118 * area,
    } + if config.split > 1 { 640.0 } else { 0.0 };
    let between = match config.order {
        Order::Raster => 0.9 * end,
        Order::Grid => end + 2650.0,
    } / if resident > 1.0 { 1.5 } else { 1.0 };
    // The other warpgroup multiplies meanwhile.
    let between = if config.pingpong { 0.0 } else { between };

    let (full, rest) = ((blocks / slots).floor(), blocks % slots);
    let last = if rest > 0.0 { depth * stages((rest / sms).ceil()) } else { 0.0 };
    let mut compute = (full * (depth * stages(resident) + between) + last + end) / CLOCKS_PER_US;
    if full >= 4.0 && !config.pingpong {
        // Power lowers the clock of long products, the more so the more operands a sum takes.
        let reads = f64::from(config.rows + config.cols) / area;
        compute *= 1.0 + 20.0 * (reads - 3.0 / 256.0).max(0.0);
    }

    let [lhs_size, rhs_size] = problem.elements.map(|element| f64::from(element.size()));
    let rhs_size = match config.weight {
        Some(scheme) if scheme.codes.are_bytes() => 1.0,
        Some(_) => 0.5,
        None => rhs_size,
    };
    let lines = problem.m as f64 * lhs_size + problem.n as f64 * rhs_size;
    let operands = lines * problem.k as f64 * problem.batch as f64;
    // Where a dimension is small, the other operand is a weight, which is not read twice in a row.
    let cold = problem.m.min(problem.n) <= 64 || operands > CACHED;
    let stage_bytes = f64::from(config.stage_bytes());
    let under_way = blocks.min(slots) * f64::from(config.stages) * stage_bytes / sms / IN_FLIGHT;
    let memory = if cold { operands / (MEMORY * under_way.min(1.0).sqrt()) } else { 0.0 };
    let l2 = tiles * f64::from(launch.depth) * stage_bytes / L2;
    let transfer = memory.max(l2) + 0.8 + end / CLOCKS_PER_US;
    // The larger of both, or a little more where they are close.
    3.5 + (compute.powi(5) + transfer.powi(5)).powf(0.2)
}

/// Clocks of a stage of each team, of a weight of codes, whose products take `multiply` of all blocks `together` on a
/// multiprocessor: a warpgroup decodes the next stage meanwhile. Fitted to 45 problems on an H200;
/// of eight bits estimated: 64 to 112 instructions of a warp, where four bits take 60.
fn decoded(config: &Config, scheme: &Scheme, multiply: f64, together: f64) -> f64 {
    let first = match (scheme.codes, scheme.zeros) {
        (Codes::Int4, false) => 190.0,
        (Codes::Int4, true) => 200.0,
        (Codes::Int8 | Codes::E4m3, _) if scheme.group.is_none() => 200.0,
        (Codes::E4m3, _) => 300.0,
        _ => 250.0,
    };
    let decode = first + 140.0 * f64::from(config.consumers()) * together;
    // Wide tiles of other widths took longer than the wider ones.
    let odd = config.cols > 64 && !config.cols.is_multiple_of(64);
    let tall = if config.rows > 128 { 0.88 } else { 1.0 };
    decode.hypot(multiply) * if odd { 1.3 } else { tall }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Element;
    use crate::kernel::gemm::Epilogue;
    use crate::ptx::{Half, Target};

    const H200: Device =
        Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };

    fn problem(m: u64, n: u64, k: u64) -> Problem {
        let epilogue = Epilogue::round(Element::Half(Half::Bf16));
        let (lhs, rhs) = (Major::K, Major::Outer);
        let elements = [Factor::Half(Half::Bf16); 2];
        Problem { m, n, k, batch: 1, elements, lhs, rhs, epilogue }
    }

    fn chosen(m: u64, n: u64, k: u64) -> Config {
        choose(&problem(m, n, k), &H200)
    }

    #[test]
    fn large_products_take_the_largest_tile_and_stay() {
        let c = chosen(4096, 4096, 4096);
        assert_eq!((c.rows, c.cols, c.order, c.store), (128, 256, Order::Raster, Store::Tma));
        let c = chosen(8192, 8192, 8192);
        assert_eq!((c.cols, c.pingpong, c.order, c.store), (192, true, Order::Raster, Store::Tma));
    }

    /// 128×256 fills half of the sixteenth wave, 128×192 a third of the 22nd along N, but along M most
    /// of the 21st.
    #[test]
    fn the_last_wave_counts() {
        let c = chosen(16_384, 4096, 4096);
        assert_eq!((c.orient, c.cols, c.pingpong), (Orient::Swapped, 192, true));
    }

    /// What the fastest of all candidates did on an H200.
    #[test]
    fn warpgroups_take_turns_but_for_two_tiles_across() {
        let tile = |m| {
            let c = chosen(m, 128_256, 4096);
            (c.orient, c.cols, c.pingpong)
        };
        assert_eq!(tile(192), (Orient::Swapped, 192, true));
        assert_eq!(tile(256), (Orient::Plain, 256, false));
        assert_eq!(tile(384), (Orient::Plain, 128, true));
        assert_eq!(tile(512), (Orient::Plain, 192, true));
    }

    /// Of e4m3, what the fastest of all candidates did on an H200, or was within 1 % of.
    #[test]
    fn scales_of_blocks_take_tall_tiles_where_there_are_enough() {
        let tile = |scale, m, n, k| {
            let epilogue = Epilogue { scale, ..Epilogue::round(Element::Half(Half::Bf16)) };
            let (elements, rhs) = ([Factor::E4m3; 2], Major::K);
            let c = choose(&Problem { elements, rhs, epilogue, ..problem(m, n, k) }, &H200);
            (c.rows, c.cols)
        };
        assert_eq!(tile(Scale::Blocks, 4096, 4096, 4096), (TALL, 128));
        assert_eq!(tile(Scale::Blocks, 1024, 8192, 8192), (TALL, 128));
        assert_eq!(tile(Scale::Blocks, 256, 8192, 8192), (128, 128));
        assert_eq!(tile(Scale::Lines, 4096, 4096, 4096), (128, 128));
        assert_eq!(tile(Scale::Lines, 4096, 8192, 8192), (128, 128));
    }

    #[test]
    fn few_tokens_lie_along_the_narrow_side() {
        for (m, cols) in [(1, 8), (8, 8), (9, 16), (16, 16), (40, 48)] {
            let c = chosen(m, 8192, 8192);
            assert_eq!((c.orient, c.cols), (Orient::Swapped, cols));
            let c = chosen(8192, m, 8192);
            assert_eq!((c.orient, c.cols), (Orient::Plain, cols));
        }
    }

    #[test]
    fn what_is_not_16_bytes_wide_is_staged() {
        assert_eq!(chosen(4096, 4097, 4096).store, Store::Staged { unit: 1 });
        assert_eq!(chosen(4096, 4100, 4096).store, Store::Staged { unit: 4 });
    }

    #[test]
    fn small_squares_fill_the_machine() {
        let c = chosen(1024, 1024, 1024);
        let launch = Launch::new(&c, &problem(1024, 1024, 1024), 132);
        assert!((100..=132).contains(&launch.tiles), "{c:?}");
    }

    #[test]
    fn few_tiles_of_a_deep_product_share_it() {
        let c = chosen(256, 256, 65_536);
        let launch = Launch::new(&c, &problem(256, 256, 65_536), 132);
        assert!(launch.tiles * c.split >= 64, "{c:?}");
    }

    #[test]
    fn grids_stay_within_their_limits() {
        let many = Problem { batch: 1 << 20, ..problem(3, 2, 5) };
        let c = choose(&many, &H200);
        assert_eq!((c.order, c.batched), (Order::Raster, true));
        assert_eq!(chosen(200, 1 << 23, 64).order, Order::Raster);
    }

    #[test]
    fn every_candidate_can_be_built_and_one_is_there() {
        let sizes = [1, 7, 8, 31, 64, 100, 129, 500, 4096, 5000, 131_072];
        for m in sizes {
            for n in sizes {
                for k in [1, 63, 64, 65, 128, 4096] {
                    for batch in [1, 3, 100_000] {
                        let problem = Problem { batch, ..problem(m, n, k) };
                        let all = candidates(&problem, &H200);
                        assert!(!all.is_empty(), "{problem:?}");
                        all.iter().for_each(|c| c.check(H200.shared_per_block).unwrap());
                        assert!(estimate(&all[0], &problem, &H200).is_finite());
                    }
                }
            }
        }
    }

    #[test]
    fn boxes_end_near_the_matrix() {
        let lines = |extent, whole| lines(Major::K, extent, whole);
        assert_eq!([lines(128, 4096), lines(128, 80), lines(16, 16)], [64, 16, 16]);
        assert_eq!([lines(96, 4096), lines(24, 24), lines(256, 4097)], [32, 8, 64]);
    }
}
