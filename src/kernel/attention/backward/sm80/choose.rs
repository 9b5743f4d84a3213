//! Which configurations a problem gets.

use super::super::variant::Variant;
use super::super::{Problem, Side};
use super::{Config, KeySums, Pass};
use crate::kernel::{Device, Element};

/// Warps, whether they are paired, m16 tiles of each, columns of a block, stages, blocks of a multiprocessor: the
/// first that fits is taken. Two m16 tiles halve what is read from shared memory for each product, which is the
/// bottleneck; 64 rows are for problems of few tiles, and for devices of little shared memory.
type Tile = (u32, bool, u32, u32, u32, u32);

const KEYS: [Tile; 14] = [
    (4, false, 2, 32, 2, 2),
    (8, true, 2, 64, 2, 1),
    (8, false, 1, 64, 2, 1),
    (8, false, 1, 32, 2, 1),
    (4, false, 1, 64, 2, 2),
    (4, false, 1, 64, 2, 1),
    (8, true, 1, 64, 2, 1),
    (8, true, 1, 32, 2, 1),
    (4, false, 1, 32, 2, 1),
    (4, true, 1, 32, 2, 1),
    (4, true, 1, 32, 1, 1),
    (4, false, 1, 16, 2, 1),
    (4, false, 1, 16, 1, 1),
    (2, false, 1, 16, 1, 1),
];
const QUERIES: [Tile; 15] = [
    (4, false, 2, 64, 2, 2),
    (4, false, 2, 32, 2, 2),
    (8, true, 2, 64, 2, 1),
    (8, false, 1, 64, 2, 1),
    (8, true, 2, 32, 2, 1),
    (8, false, 1, 32, 2, 1),
    (4, false, 1, 64, 2, 2),
    (4, false, 1, 64, 2, 1),
    (8, true, 1, 64, 2, 1),
    (4, false, 1, 32, 2, 1),
    (4, true, 1, 32, 2, 1),
    (4, true, 1, 32, 1, 1),
    (4, false, 1, 16, 2, 1),
    (4, false, 1, 16, 1, 1),
    (2, false, 1, 16, 1, 1),
];
const BIAS: [Tile; 6] = [
    (4, false, 1, 64, 1, 2),
    (4, false, 1, 64, 1, 1),
    (4, false, 1, 32, 1, 2),
    (4, false, 1, 32, 1, 1),
    (4, false, 1, 16, 1, 1),
    (2, false, 1, 16, 1, 1),
];

/// The same for f32, whose products take six times as long as those of halves: reading is never the bottleneck,
/// registers are.
const F32: [Tile; 13] = [
    (8, true, 1, 64, 2, 1),
    (8, true, 1, 32, 2, 1),
    (8, false, 1, 32, 2, 1),
    (8, true, 1, 32, 1, 1),
    (4, false, 1, 32, 2, 1),
    (4, true, 1, 32, 2, 1),
    (4, true, 1, 32, 1, 1),
    (2, true, 1, 32, 1, 1),
    (4, false, 1, 16, 2, 1),
    (4, false, 1, 16, 1, 1),
    (2, false, 1, 16, 2, 1),
    (2, false, 1, 16, 1, 1),
    (1, false, 1, 16, 1, 1),
];

/// The passes for the gradients of queries, keys and values.
pub fn choose(problem: &Problem, device: &Device) -> Vec<Config> {
    let [both, keys, values] = [KeySums::Both, KeySums::Keys, KeySums::Values].map(Pass::Keys);
    let tiles = tiles(problem, &KEYS);
    // Sums of both fit if there is a tile that is not the last resort.
    let of_keys = match first(problem, device, both, tiles, false) {
        Some(config) => vec![config],
        None => vec![least(problem, device, values, tiles), least(problem, device, keys, tiles)],
    };
    let queries = least(problem, device, Pass::Queries, self::tiles(problem, &QUERIES));
    of_keys.into_iter().chain([queries]).collect()
}

/// The pass for the gradient of a bias.
pub fn bias(problem: &Problem, device: &Device, repeated_queries: u64) -> Config {
    let pass = Pass::Bias {
        pairs: problem.attention.keys.is_multiple_of(2),
        shared: repeated_queries > 1,
    };
    least(problem, device, pass, tiles(problem, &BIAS))
}

fn tiles(problem: &Problem, halves: &'static [Tile]) -> &'static [Tile] {
    match problem.attention.element {
        Element::Half(_) => halves,
        Element::F32 => &F32,
    }
}

/// The first that fits, at worst by a guess of its registers.
fn least(problem: &Problem, device: &Device, pass: Pass, tiles: &[Tile]) -> Config {
    let config = first(problem, device, pass, tiles, true);
    config.expect("the small tiles fit every device")
}

/// The first that fits, if there is one. The `last` resorts are for what has no other.
fn first(
    problem: &Problem,
    device: &Device,
    pass: Pass,
    tiles: &[Tile],
    last: bool,
) -> Option<Config> {
    let config = |&(warps, paired, m16_tiles, cols, stages, blocks_per_sm): &Tile| Config {
        variant: Variant::new(problem),
        element: problem.attention.element,
        pass,
        warps,
        paired,
        m16_tiles,
        cols,
        stages,
        blocks_per_sm,
    };
    let attention = &problem.attention;
    let (heads, rows) = match pass.side() {
        Side::Keys => (
            attention.rows() / attention.queries / attention.heads * attention.kv_heads,
            attention.keys,
        ),
        Side::Queries => (attention.rows() / attention.queries, attention.queries),
    };
    // Few tiles: smaller ones, so that more multiprocessors have one.
    let few = heads * rows.div_ceil(LARGE) <= u64::from(device.multiprocessors);
    let fits = |config: &Config| config.check(device.shared_per_block).is_ok();
    let all = || tiles.iter().map(config).filter(|config| last || config.cols > 16).filter(fits);
    let small = all().find(|config| !few || u64::from(config.rows()) < LARGE);
    small.or_else(|| all().next())
}

/// Rows of large tiles.
const LARGE: u64 = 128;
