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

const F32_BIAS: [Tile; 5] = [
    (4, false, 1, 32, 1, 2),
    (4, false, 1, 32, 1, 1),
    (4, false, 1, 16, 1, 1),
    (2, false, 1, 16, 1, 1),
    (1, false, 1, 16, 1, 1),
];

/// The passes for the gradients of queries, keys and values.
pub fn choose(problem: &Problem, device: &Device) -> Vec<Config> {
    let [all, both, keys, values] =
        [KeySums::All, KeySums::Both, KeySums::Keys, KeySums::Values].map(Pass::Keys);
    let tiles = tiles(problem, [&KEYS, &F32]);
    // A bias takes the registers of shares.
    if !problem.deterministic
        && problem.attention.score_mod.bias.is_none()
        && let Some(config) = first(problem, device, all, tiles, false)
    {
        return vec![config];
    }
    // Sums of both fit if there is a tile that is not the last resort.
    let of_keys = match first(problem, device, both, tiles, false) {
        Some(config) => vec![config],
        None => vec![least(problem, device, values, tiles), least(problem, device, keys, tiles)],
    };
    let queries = least(problem, device, Pass::Queries, self::tiles(problem, [&QUERIES, &F32]));
    of_keys.into_iter().chain([queries]).collect()
}

/// The pass for the gradient of a bias.
pub fn bias(problem: &Problem, device: &Device, repeated_queries: u64) -> Config {
    let pass = Pass::Bias {
        pairs: problem.attention.keys.is_multiple_of(2),
        shared: repeated_queries > 1,
    };
    least(problem, device, pass, tiles(problem, [&BIAS, &F32_BIAS]))
}

/// Those for halves, or those for f32.
fn tiles(problem: &Problem, [halves, floats]: [&'static [Tile]; 2]) -> &'static [Tile] {
    match problem.attention.element {
        Element::Half(_) => halves,
        Element::F32 => floats,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::attention::choose::tests::causal;
    use crate::kernel::attention::{self, Bias, Lengths, ScoreMod};
    use crate::ptx::{Half, Target};

    const fn device(multiprocessors: u32, shared_per_block: u32) -> Device {
        Device { target: Target::Sm80, multiprocessors, shared_per_block }
    }
    const A100: Device = device(108, 166_912);
    const ADA: Device = device(128, 101_376);
    const H200: Device = device(132, 232_448);

    fn backward(attention: attention::Problem) -> Problem {
        Problem { attention, aligned: 8, lse_grad: false, bias_grad: None, deterministic: true }
    }

    fn f32(attention: attention::Problem) -> attention::Problem {
        attention::Problem { element: Element::F32, out: Element::F32, ..attention }
    }

    /// Of each pass what it sums, rows of a tile, columns of a block, and whether warps are paired.
    fn passes(attention: attention::Problem, device: &Device) -> Vec<(Pass, u32, u32, bool)> {
        let pass = |c: &Config| (c.pass, c.rows(), c.cols, c.paired);
        choose(&backward(attention), device).iter().map(pass).collect()
    }

    const BOTH: Pass = Pass::Keys(KeySums::Both);

    #[test]
    fn long_sequences_take_large_tiles() {
        let tiles = |dim, device: &Device| passes(causal(4096, 4096, dim), device);
        // Two blocks have no room on an RTX 4090.
        assert_eq!(tiles(64, &ADA)[0], (BOTH, 128, 64, false));
        assert_eq!(tiles(64, &A100)[0], (BOTH, 128, 32, false));
        let narrow = [(BOTH, 128, 32, false), (Pass::Queries, 128, 64, false)];
        assert_eq!(tiles(64, &H200), narrow);
        assert_eq!(tiles(128, &A100), [(BOTH, 128, 64, true), (Pass::Queries, 128, 64, true)]);
        assert_eq!(tiles(128, &H200), [(BOTH, 128, 64, true), (Pass::Queries, 128, 32, false)]);
        assert_eq!(tiles(256, &H200), [(BOTH, 64, 64, true), (Pass::Queries, 128, 32, true)]);
    }

    #[test]
    fn where_rounding_may_differ_one_pass_has_all() {
        let pass = |attention: attention::Problem, device: &Device| {
            let problem = Problem { deterministic: false, ..backward(attention) };
            choose(&problem, device)
                .iter()
                .map(|c| (c.pass, c.rows(), c.cols, c.paired))
                .collect::<Vec<_>>()
        };
        let all = |cols, paired| vec![(Pass::Keys(KeySums::All), 128, cols, paired)];
        for device in [A100, H200] {
            assert_eq!(pass(causal(4096, 4096, 64), &device), all(32, false));
            assert_eq!(pass(causal(4096, 4096, 128), &device), all(64, true));
        }
        for attention in [causal(4096, 4096, 96), causal(4096, 4096, 256), f32(causal(9, 9, 64))] {
            assert_eq!(pass(attention, &H200), passes(attention, &H200));
        }
    }

    #[test]
    fn f32_sums_are_of_two_warps() {
        let tiles = |dim| passes(f32(causal(4096, 4096, dim)), &H200);
        assert_eq!(tiles(64), [(BOTH, 64, 64, true), (Pass::Queries, 64, 64, true)]);
        assert_eq!(tiles(128), [(BOTH, 64, 32, true), (Pass::Queries, 64, 64, true)]);
        // Where registers hold one of them, keys and values have a pass each.
        let [keys, values] = [KeySums::Keys, KeySums::Values].map(Pass::Keys);
        let wide = [(values, 64, 32, true), (keys, 64, 32, true), (Pass::Queries, 64, 32, true)];
        assert_eq!(tiles(256), wide);
    }

    #[test]
    fn few_tiles_are_small() {
        let few = attention::Problem { batch: 1, heads: 8, kv_heads: 8, ..causal(512, 512, 128) };
        for (_, rows, ..) in passes(few, &H200) {
            assert_eq!(rows, 64);
        }
    }

    #[test]
    fn every_choice_can_be_built() {
        let bias = |element| Some(Bias { element, pairs: false });
        let biases = [None, bias(Element::F32), bias(Element::Half(Half::F16))];
        let lengths = [Lengths::Full, Lengths::Padded, Lengths::Packed];
        for device in [A100, ADA, H200] {
            for (head_dim, value_dim) in
                (1..=256).flat_map(|dim| [1, 8, 64, 136, 256].map(|value| (dim, value)))
            {
                for (lengths, bias) in lengths.into_iter().zip(biases) {
                    let score_mod = ScoreMod { bias, softcap: true, ..ScoreMod::default() };
                    let p = attention::Problem {
                        value_dim,
                        lengths,
                        score_mod,
                        left: Some(9),
                        ..causal(300, 4096, head_dim)
                    };
                    for p in [p, f32(p)].map(backward) {
                        let passes = choose(&p, &device);
                        let bias = [1, 300].map(|shared| super::bias(&p, &device, shared));
                        for config in passes.iter().chain(&bias) {
                            config.check(device.shared_per_block).unwrap();
                        }
                    }
                }
            }
        }
    }
}
