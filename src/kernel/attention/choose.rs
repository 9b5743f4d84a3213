//! The choice of Hopper's kernel for a problem.

use super::sm90::{Config, Store};
use super::{Lengths, Mask, Problem, Variant};
use crate::kernel::{Device, Element};

/// The configuration for a problem of 16-bit operands. If it splits the keys, a kernel of
/// [`combine`](super::combine) follows.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    debug_assert!(
        matches!(problem.element, Element::Half(_)),
        "wgmma of tf32 reads no transposed values: f32 is for the portable kernel"
    );
    let head_dim = (problem.head_dim as u32).next_multiple_of(16);
    let limit = device.shared_per_block;
    let pack = pack(problem, 64);
    let split = splits(problem, pack, KEYS, device);
    let config = |warpgroups| {
        let config = Config {
            variant: Variant { head_dim, ..Variant::new(problem, pack, split) },
            element: problem.element,
            rows: 64 * warpgroups,
            keys: 16,
            query_stages: 1,
            stages: 2,
            store_stages: 0,
            pingpong: warpgroups > 1,
            store: if split { Store::Direct } else { Store::Tma },
        };
        Config { keys: keys(problem, &config, limit), ..config }
    };
    let time = |&warpgroups: &u32| {
        // One and two were compared with blocks of the same keys.
        let keys = config(warpgroups.max(2)).keys;
        time(problem, pack, warpgroups, keys, device.multiprocessors)
    };
    let fastest = (1..=most_warpgroups(problem)).rev().min_by_key(time);
    config(fastest.expect("at least one")).filled(limit)
}

/// The widest heads that count as narrow.
const NARROW: u64 = 64;

fn widest(problem: &Problem) -> u64 {
    problem.head_dim.max(problem.value_dim)
}

/// The number of warpgroups that have registers for their sums, and for a bias on its way.
fn most_warpgroups(problem: &Problem) -> u32 {
    if widest(problem) <= 112 && problem.score_mod.bias.is_none() { 3 } else { 2 }
}

/// Keys of a block, with `limit` bytes of shared memory.
fn keys(problem: &Problem, config: &Config, limit: u32) -> u32 {
    let fits = |keys: &u32| Config { keys: *keys, ..*config }.roomy(limit);
    let most = (1..=8).map(|n| 16 * n).rev().find(fits).unwrap_or(16);
    // Half of a block that a mask cuts is wasted, and narrow heads are fastest with 128 keys.
    if config.rows != 128 || widest(problem) <= NARROW || config.variant.mask != Mask::None {
        return most;
    }
    let keys = problem.each().keys;
    let time = |&n: &u32| keys.div_ceil(n.into()).saturating_mul((n + BESIDE_KEYS).into());
    // These need no spare registers, except for score modifications.
    let tight = |&keys: &u32| Config { keys, ..*config }.check(limit).is_ok();
    let long = [192, 160, 144, 128].into_iter();
    let long = long.filter(|n| fits(n) || (problem.score_mod.plain() && tight(n)));
    long.min_by_key(time).unwrap_or(most)
}

/// What a block of keys costs beside its keys, in keys: on an H200, D = 128, no mask.
const BESIDE_KEYS: u32 = 11;
/// About how many keys a block has.
const KEYS: u64 = 128;

/// How long tiles of one to three warpgroups take on an H200, for the same keys. The more share a block of
/// keys, the better their products and exponentials overlap; the wider the heads, the less.
fn tile_time(warpgroups: u32, widest: u64) -> u64 {
    match warpgroups {
        1 => 214,
        2 => 314,
        _ => 384 + widest.saturating_sub(NARROW),
    }
}

/// How long a problem takes, to compare configurations by.
fn time(problem: &Problem, pack: u32, warpgroups: u32, keys: u32, multiprocessors: u32) -> u64 {
    let problem = &problem.each();
    let each = tiles_of_head(problem, pack, warpgroups.into());
    let (mut all, mut longest) = (0, 0);
    for tile in 0..each.min(MOST_TILES) {
        // Spread over all of them, if they are too many to look at.
        let tile = tile * each / each.min(MOST_TILES);
        let positions = u64::from(warpgroups * (64 / pack));
        let blocks = problem.keys_of(tile * positions, positions).div_ceil(keys.into()).max(1);
        all += blocks;
        longest = longest.max(blocks);
    }
    let multiprocessors = u64::from(multiprocessors);
    let tiles = tiles(problem, pack, warpgroups.into());
    let each = each.clamp(1, MOST_TILES);
    // Tiles that differ are dealt out so that all multiprocessors have as much; equal ones come in
    // rounds.
    let blocks = match problem.mask() {
        Mask::Right => (tiles * all).div_ceil(each * multiprocessors).max(longest),
        Mask::None | Mask::Window => tiles.div_ceil(multiprocessors) * longest,
    };
    let block = u64::from(keys + BESIDE_KEYS) * tile_time(warpgroups, widest(problem));
    blocks.saturating_mul(block)
}

/// Tiles of a head that are looked at.
const MOST_TILES: u64 = 64;

/// Tiles of a head, or of a pack of heads, by that number of warpgroups.
fn tiles_of_head(problem: &Problem, pack: u32, warpgroups: u64) -> u64 {
    problem.queries.div_ceil((64 / pack).into()).div_ceil(warpgroups)
}

/// Tiles of all heads.
fn tiles(problem: &Problem, pack: u32, warpgroups: u64) -> u64 {
    let packs = problem.heads / u64::from(pack) * problem.batch;
    tiles_of_head(problem, pack, warpgroups).saturating_mul(packs)
}

/// Whether the keys of a tile, in blocks of `keys`, are divided: where tiles are few and take a while
/// each, the time of some blocks pays for putting parts together.
pub(super) fn splits(problem: &Problem, pack: u32, keys: u64, device: &Device) -> bool {
    let few = tiles(problem, pack, 1) * 2 <= device.multiprocessors.into();
    let long = problem.seen_keys(64) >= 8 * keys;
    problem.lengths != Lengths::Packed && !problem.stats && few && long
}

/// Heads of a tile: more than one where a head alone would not fill its rows, which come in groups of
/// `rows`.
pub(super) fn pack(problem: &Problem, rows: u64) -> u32 {
    let group = problem.heads / problem.kv_heads;
    // Groups of rows for the heads that share keys.
    let groups = |pack: u64| problem.queries.div_ceil(rows / pack) * (group / pack);
    let best =
        (1..=group.min(rows)).filter(|&pack| group.is_multiple_of(pack)).min_by_key(|&p| groups(p));
    match best {
        Some(best) if groups(best) * 10 < groups(1) * 9 => best as u32,
        _ => 1,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::kernel::attention::sm90::Launch;
    use crate::kernel::attention::{Bias, ScoreMod};
    use crate::ptx::{Half, Target};

    const H200: Device =
        Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };

    fn problem(queries: u64, keys: u64, dim: u64) -> Problem {
        Problem {
            batch: 2,
            heads: 32,
            kv_heads: 8,
            queries,
            keys,
            head_dim: dim,
            value_dim: dim,
            element: Element::Half(Half::Bf16),
            out: Element::Half(Half::Bf16),
            left: None,
            right: None,
            score_mod: ScoreMod::default(),
            lengths: Lengths::Full,
            lse: false,
            stats: false,
        }
    }

    pub fn causal(queries: u64, keys: u64, dim: u64) -> Problem {
        Problem { right: Some(0), ..problem(queries, keys, dim) }
    }

    #[test]
    fn long_sequences_take_the_tiles_that_were_fastest() {
        let tile = |problem| {
            let c = choose(&problem, &H200);
            (c.rows, c.keys, c.pingpong)
        };
        assert_eq!(tile(problem(4096, 4096, 64)), (192, 128, true));
        assert_eq!(tile(causal(2048, 2048, 64)), (192, 128, true));
        // A diagonal wastes less of small tiles.
        assert_eq!(tile(causal(1024, 1024, 64)), (128, 128, true));
        assert_eq!(tile(causal(512, 512, 64)), (128, 128, true));
        // Two rounds, in which the smaller tiles are through sooner.
        assert_eq!(tile(problem(512, 512, 64)), (128, 128, true));
        let many = Problem { batch: 32, ..problem(512, 512, 64) };
        assert_eq!(tile(many), (192, 128, true));
        // Three warpgroups have registers for fewer keys, which does not pay at 1024.
        assert_eq!(tile(problem(1024, 1024, 80)), (128, 128, true));
        assert_eq!(tile(problem(4096, 4096, 80)), (192, 112, true));
        assert_eq!(tile(causal(4096, 4096, 96)), (192, 96, true));
        assert_eq!(tile(problem(8192, 8192, 128)), (128, 192, true));
        // 22 blocks of 192 would be 128 keys more.
        assert_eq!(tile(problem(4096, 4096, 128)), (128, 160, true));
        assert_eq!(tile(problem(1024, 1024, 128)), (128, 128, true));
        assert_eq!(tile(causal(4096, 4096, 128)), (128, 128, true));
        assert_eq!(tile(problem(4096, 4096, 192)), (128, 112, true));
        assert_eq!(tile(problem(4096, 4096, 256)), (128, 80, true));
    }

    #[test]
    fn one_token_packs_heads_and_splits_keys() {
        let one = Problem { batch: 1, ..causal(1, 8192, 128) };
        let c = choose(&one, &H200);
        assert_eq!((c.rows, c.variant.pack, c.variant.split), (64, 4, true));
        let launch = Launch::new(&c, &one, 132);
        assert!((96..=132).contains(&launch.order.tiles), "{launch:?}");
        assert_eq!(launch.order.tiles, 8 * launch.parts);
    }

    #[test]
    fn no_part_is_empty() {
        for keys in [1024, 5000, 8192, 100_000] {
            for heads in [1, 2, 8, 13] {
                let p = Problem { batch: 1, heads, kv_heads: heads, ..problem(1, keys, 128) };
                let c = choose(&p, &H200);
                let launch = Launch::new(&c, &p, 132);
                let blocks = keys.div_ceil(c.keys.into());
                let each = blocks.div_ceil(launch.parts.into());
                assert!(
                    c.variant.split && u64::from(launch.parts - 1) * each < blocks,
                    "{launch:?}"
                );
            }
        }
    }

    #[test]
    fn few_tiles_are_small() {
        let p = Problem { batch: 1, heads: 4, kv_heads: 4, ..problem(512, 512, 128) };
        assert_eq!(choose(&p, &H200).rows, 64);
        assert!(!choose(&p, &H200).variant.split);
    }

    #[test]
    fn a_bias_takes_keys_for_its_registers() {
        let bias = |pairs| Some(Bias { element: Element::F32, pairs });
        let with = |pairs| Problem {
            score_mod: ScoreMod { bias: bias(pairs), ..ScoreMod::default() },
            ..problem(4096, 4096, 128)
        };
        let keys =
            [problem(4096, 4096, 128), with(true), with(false)].map(|p| choose(&p, &H200).keys);
        assert!(keys.is_sorted_by(|a, b| a > b), "{keys:?}");
        let narrow = choose(&Problem { head_dim: 64, value_dim: 64, ..with(false) }, &H200);
        assert_eq!((narrow.rows, narrow.keys >= 64), (128, true), "{narrow:?}");
    }

    #[test]
    fn every_choice_can_be_built() {
        let lengths = [Lengths::Full, Lengths::Padded, Lengths::Packed];
        for dim in (8..=256).step_by(8) {
            for value_dim in [8, 64, 136, 256] {
                for (queries, keys) in [(1, 1), (1, 4096), (70, 10_000), (4096, 4096)] {
                    for lengths in lengths {
                        for out in [Element::F32, Element::Half(Half::Bf16)] {
                            let p =
                                Problem { value_dim, lengths, out, ..causal(queries, keys, dim) };
                            choose(&p, &H200).check(H200.shared_per_block).unwrap();
                        }
                    }
                }
            }
        }
    }

    /// The order of tiles relies on it (`scheduler.rs`).
    #[test]
    fn sections_are_of_about_two_rounds_or_all() {
        for dim in [64, 96, 128, 192, 256] {
            for length in [300, 512, 1000, 1024, 2048, 4096, 16_384, 65_536] {
                for (batch, heads) in [(1, 32), (16, 16), (32, 16)] {
                    let p =
                        Problem { batch, heads, kv_heads: heads, ..causal(length, length, dim) };
                    let launch = Launch::new(&choose(&p, &H200), &p, 132);
                    let order = launch.order;
                    let (all, each) = (order.section == order.heads, order.columns);
                    let tenths = order.section * each * 10 / launch.blocks;
                    // Of long sequences one head is more.
                    let most = 26.max(each * 10 / launch.blocks + 1);
                    assert!(all || (19..=most).contains(&tenths), "{tenths} of {p:?}");
                }
            }
        }
    }

    #[test]
    fn sections_hold_what_fits_l2() {
        let p = causal(4096, 4096, 128);
        let order = Launch::new(&choose(&p, &H200), &p, 132).order;
        // 2 MiB of keys and values for four heads; two rounds are 264 tiles.
        assert_eq!((order.heads, order.columns, order.section), (64, 32, 8));
        let long = causal(65_536, 65_536, 128);
        assert_eq!(Launch::new(&choose(&long, &H200), &long, 132).order.section, 4);
        // What is at work of packed sequences is one or two of them.
        let packed = Problem { batch: 16, lengths: Lengths::Packed, ..long };
        assert_eq!(Launch::new(&choose(&packed, &H200), &packed, 132).order.section, 32);
    }
}
