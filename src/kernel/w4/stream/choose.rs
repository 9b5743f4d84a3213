//! Which configuration a problem gets: an estimate of its cycles.

use super::config::LINE;
use super::{Config, Launch};
use crate::kernel::w4::nibbles::Table;
use crate::kernel::w4::{BLOCK, Codes, Problem, Scheme};
use crate::kernel::{Device, Element};
use crate::ptx::Target;

/// Rows of `x` that a block takes, at most.
pub const MOST: u64 = 16;

/// What estimates take for granted, in clocks unless it says otherwise.
struct Fit {
    /// Bytes in a clock: from memory if all multiprocessors read, and what one alone can take.
    memory: f64,
    fill: f64,
    /// Bytes on their way to a multiprocessor that saturate memory.
    in_flight: f64,
    /// How much a byte of `x`, which others find in L2, counts beside one of the weight.
    shared: f64,
    /// Of a pair of sixteen warps, and of one alone.
    pair: f64,
    latency: f64,
    /// As many times for half of the columns.
    half: [f64; 2],
    /// As many times if a code is looked up, or has a zero point.
    involved: f64,
    /// Of a round of blocks, and more for each warp.
    first: f64,
    warp: f64,
    /// What each further round takes of that.
    further: f64,
    /// Of a round of clusters, and more for each warp of them on a multiprocessor.
    cluster: f64,
    share: f64,
}

/// Of int4 and up to as many rows as a block takes: fitted to all candidates of 25 problems of groups of 128 on an H200
/// (2026-11-30), whose multiprocessors are taken for 1.7 GHz: the choices took 0.6 % longer than the fastest ones. Other groups
/// are taken for such: with what their codes and scales take besides, 16×8192² with zero points was given blocks in which it took
/// 17.2 µs instead of 16.1. Since copies are of whole chunks, which smaller blocks gain more from, `half` is less: so that one row
/// of 8192² is given the blocks in which it took 13.3 µs instead of 13.7, and 1024×4096 those that were ahead for 4 and 8 rows.
const INTEGERS: Fit = Fit {
    memory: 25.6,
    fill: 20.9,
    in_flight: 48_000.0,
    shared: 0.13,
    pair: 2310.0,
    latency: 940.0,
    half: [0.40, 0.50],
    involved: 1.0,
    first: 4140.0,
    warp: 56.0,
    further: 0.11,
    cluster: 790.0,
    share: 14.0,
};
/// The same of nf4: fitted to all candidates of 20 problems of groups of 64 on an H200 (2026-12-01): the choices took 1.1 % longer
/// than the fastest ones, at most 7.5 %.
const LOOKED_UP: Fit = Fit {
    memory: 24.2,
    fill: 18.8,
    in_flight: 54_800.0,
    shared: 0.35,
    pair: 1474.0,
    latency: 681.0,
    half: [0.693, 0.797],
    involved: 1.0,
    first: 7880.0,
    warp: 53.8,
    further: 0.134,
    cluster: 591.0,
    share: 13.5,
};
/// The same of bytes, and of more rows: fitted to 60 problems on that one.
const OTHERS: Fit = Fit {
    memory: 24.0,
    fill: 40.0,
    in_flight: 53_600.0,
    shared: 1.0,
    pair: 2200.0,
    latency: 960.0,
    half: [0.5, 0.6],
    involved: 1.65,
    first: 1300.0,
    warp: 40.0,
    further: 1.0,
    cluster: 1150.0,
    share: 15.0,
};
/// Clocks of one more kernel.
const LAUNCH: f64 = 4000.0;

/// The configuration with the least estimated time.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    candidates(problem, device)
        .into_iter()
        .map(|config| (estimate(&config, problem, device), config))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .expect("small blocks fit every device")
        .1
}

/// Estimated clocks of what is chosen, with its launch.
pub fn time(problem: &Problem, device: &Device) -> f64 {
    LAUNCH + estimate(&choose(problem, device), problem, device)
}

/// Those worth an estimate, the simplest first.
pub fn candidates(problem: &Problem, device: &Device) -> Vec<Config> {
    let bytes = problem.scheme.codes.are_bytes();
    let splits: &[u32] = match device.target {
        Target::Sm90a => &[1, 2, 4, 8],
        Target::Sm80 | Target::Sm89 => &[1, 2, 4, 8, 16, 32],
    };
    let mut all = vec![];
    for &split in splits {
        // No part is without a row.
        if u64::from(split) > problem.k.div_ceil(128) {
            continue;
        }
        let widths: &[u32] = if bytes { &[BLOCK] } else { &[BLOCK, BLOCK / 2] };
        let tokens = count_of_tokens(problem.m);
        let shapes = widths.iter().flat_map(|&cols| {
            // The more sums a warp has, the fewer warps have the registers for them.
            let blocks: &[[u32; 2]] = match (tokens, cols) {
                // Of 16 rows and bytes, smaller blocks took 0.86 to 0.99 of the time (H200, 8192² and 4096², 16 to 128 rows).
                (9.., BLOCK) if bytes => &[[4, 2]],
                (9.., BLOCK) => &[[8, 1], [4, 2]],
                (..=8, ..BLOCK) if split == 1 && problem.weights() == 1 => {
                    &[[16, 1], [8, 2], [4, 4], [4, 7]]
                }
                _ => &[[16, 1], [8, 2], [4, 4]],
            };
            blocks.iter().map(move |&block| (cols, block))
        });
        for (cols, [warps, blocks_per_sm]) in shapes {
            // Scales of four groups for each pair of blocks leave no registers for addresses of several weights beside a way
            // to the other blocks of a cluster or a table, nor in f32 for a split and a table.
            let clustered = split > 1 && device.target == Target::Sm90a;
            let Scheme { codes, scale, group, .. } = problem.scheme;
            let (several, table) = (problem.weights() > 1, codes == Codes::Nf4);
            let four = group == Some(32) && cols == BLOCK;
            let float = scale == Element::F32 && split > 1;
            if four && (several && (clustered || table) || table && float) {
                continue;
            }
            let cut = Config::cuts(problem, cols);
            let config =
                Config { cols, cut, warps, split, blocks_per_sm, ..small(problem, device) };
            // 16 rows of 8192² by nf4 took 14.8 µs with a wide table and 15.7 with a narrow one, 1 row in two blocks of a
            // multiprocessor 13.0 with two slots beside a wide one, 13.4 to 13.6 with two or four beside a narrow one.
            let wide = Config { table: Table::Wide, ..config };
            let fits = wide.max_slots(device.shared_per_block) > 0;
            let config = if table && fits { wide } else { config };
            // More copies before the first products take longer than what they save: 16 rows of 8192² in bf16 took 13.7 µs with
            // four slots, 13.9 with two, 14.5 with six; 1 to 8 rows of 28672×4096, in seven small blocks on each multiprocessor,
            // 18.5 to 19.3 with two, and 19.7 to 20.5 with four to eight.
            let most = match blocks_per_sm {
                5.. => 2,
                _ if tokens > 8 && !bytes => 4,
                _ => 8,
            };
            let slots = config.max_slots(device.shared_per_block).min(most);
            let config = Config { slots, ..config };
            all.extend(config.check(device.shared_per_block).is_ok().then_some(config));
        }
    }
    if all.is_empty() {
        // Where there is little shared memory, a table leaves room for one small block.
        let config = small(problem, device);
        all.extend(config.check(device.shared_per_block).is_ok().then_some(config));
    }
    all
}

/// The least that a multiprocessor can have: one block of four warps.
fn small(problem: &Problem, device: &Device) -> Config {
    Config {
        target: device.target_without_e4m3(),
        half: problem.half,
        scheme: problem.scheme,
        tokens: count_of_tokens(problem.m),
        cols: BLOCK,
        cut: Config::cuts(problem, BLOCK),
        several: problem.m > MOST,
        warps: 4,
        slots: 2,
        table: Table::Narrow,
        split: 1,
        blocks_per_sm: 1,
        unit: if problem.widths().iter().all(|n| n.is_multiple_of(4)) { 4 } else { 1 },
        weights: problem.weights(),
        gated: problem.gated,
        epilogue: problem.epilogue,
    }
}

/// The power of two that has room for them.
fn count_of_tokens(m: u64) -> u32 {
    m.min(MOST).next_power_of_two() as u32
}

/// Clocks, roughly.
fn estimate(c: &Config, problem: &Problem, device: &Device) -> f64 {
    let blocks = f64::from(Launch::new(c, problem).grid[0]);
    let (sms, resident) = (f64::from(device.multiprocessors), f64::from(c.blocks_per_sm));
    let (warps, split) = (f64::from(c.warps), f64::from(c.split));
    let pairs = problem.k.div_ceil(128).div_ceil(c.split.into());
    let of_warp = pairs.div_ceil(c.together().into()) as f64;
    let rounds = (blocks / (sms * resident)).ceil();
    let busiest = (blocks / sms).ceil();

    let (fit, scheme) = match c.scheme.codes {
        Codes::Int4 if problem.m <= MOST => {
            (&INTEGERS, Scheme { zeros: false, group: Some(128), ..c.scheme })
        }
        Codes::Nf4 if problem.m <= MOST => (&LOOKED_UP, Scheme { group: Some(64), ..c.scheme }),
        _ => (&OTHERS, c.scheme),
    };
    let c = &Config { scheme, ..*c };
    let [half_pair, half_latency] = if c.cols < BLOCK { fit.half } else { [1.0; 2] };

    // The warps of a multiprocessor share its units.
    let together = busiest.min(resident) * warps;
    let involved = c.scheme.zeros || c.scheme.codes == Codes::Nf4;
    let involved = if involved { fit.involved } else { 1.0 };
    let pair = fit.pair * half_pair * involved;
    let compute = rounds * of_warp * (pair * together / 16.0).max(fit.latency * half_latency);

    let slot = f64::from(c.slot().bytes);
    // Blocks of the same columns find them in L2.
    let columns = problem.widths().iter().sum::<u64>();
    let counted = slot - (1.0 - fit.shared) * f64::from(c.tokens * LINE);
    let bytes = columns as f64 * problem.k as f64 * counted / f64::from(BLOCK * c.cols);
    let under_way =
        blocks.min(sms * resident) * f64::from(c.warps * c.slots) * slot / sms / fit.in_flight;
    let all = bytes / (sms * fit.memory * under_way.min(1.0).sqrt());
    let one = bytes / blocks * busiest / fit.fill;

    let between = (1.0 + fit.further * (rounds - 1.0)) * (fit.first + fit.warp * warps);
    let sums = match (c.split, c.target) {
        (1, _) => 0.0,
        (_, Target::Sm90a) => rounds * (fit.cluster + fit.share * warps * resident * split),
        (_, Target::Sm80 | Target::Sm89) => LAUNCH,
    };
    // The larger of both, or a little more where they are close.
    (compute.powi(3) + all.max(one).powi(3)).cbrt() + between + sums
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::gemm::Epilogue;
    use crate::ptx::Half;

    const H200: Device =
        Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 };
    const A100: Device =
        Device { target: Target::Sm80, multiprocessors: 108, shared_per_block: 166_912 };
    const ADA: Device =
        Device { target: Target::Sm80, multiprocessors: 128, shared_per_block: 101_376 };

    fn problem(m: u64, n: u64, k: u64, codes: Codes, group: Option<u32>) -> Problem {
        let element = Element::Half(Half::Bf16);
        let scheme = Scheme { codes, zeros: false, scale: element, group };
        let epilogue = Epilogue::round(element);
        Problem { m, n, others: [0; 2], gated: false, k, half: Half::Bf16, scheme, epilogue }
    }

    #[test]
    fn large_weights_fill_the_device_without_a_split() {
        let c = choose(&problem(1, 8192, 8192, Codes::Int4, Some(128)), &H200);
        assert_eq!((c.tokens, c.split, c.warps * c.blocks_per_sm), (1, 1, 16));
        for codes in [Codes::Int4, Codes::Nf4] {
            let c = choose(&problem(16, 8192, 8192, codes, Some(128)), &H200);
            assert_eq!((c.tokens, c.split, c.warps * c.blocks_per_sm), (16, 1, 8));
        }
    }

    #[test]
    fn wide_tables_leave_room_for_two_slots() {
        for m in [1, 4] {
            let c = choose(&problem(m, 8192, 8192, Codes::Nf4, Some(64)), &H200);
            let of = (c.table, c.warps, c.slots, c.blocks_per_sm);
            assert_eq!(of, (Table::Wide, 8, 2, 2));
        }
        let c = choose(&problem(8, 8192, 8192, Codes::Nf4, Some(64)), &H200);
        assert_eq!((c.table, c.warps, c.blocks_per_sm), (Table::Narrow, 8, 2));
    }

    #[test]
    fn many_columns_are_one_round_of_small_blocks() {
        for m in [1, 4, 8] {
            let problem = problem(m, 28_672, 4096, Codes::Int4, Some(128));
            let c = choose(&problem, &H200);
            assert_eq!((c.cols, c.warps, c.slots), (32, 4, 2));
            assert!(Launch::new(&c, &problem).grid[0] <= H200.multiprocessors * c.blocks_per_sm);
        }
    }

    #[test]
    fn half_as_wide_blocks_fill_the_device_without_a_split() {
        for m in [1, 4, 8, 16] {
            let c = choose(&problem(m, 4096, 4096, Codes::Int4, Some(128)), &H200);
            assert_eq!((c.cols, c.split, c.warps * c.blocks_per_sm), (32, 1, 16));
        }
        let bytes = choose(&problem(1, 4096, 4096, Codes::Int8, None), &H200);
        assert_eq!(bytes.cols, BLOCK);
    }

    #[test]
    fn a_few_columns_are_split() {
        for device in [H200, A100] {
            let c = choose(&problem(1, 512, 28_672, Codes::Int4, Some(128)), &device);
            assert!(c.split > 1, "{}", c.name());
        }
    }

    #[test]
    fn every_problem_has_a_choice_that_can_be_built() {
        const SIZES: [u64; 7] = [1, 64, 100, 1024, 4096, 28_672, 128_256];
        for device in [H200, A100, ADA] {
            for codes in [Codes::Int4, Codes::Nf4, Codes::Int8, Codes::E4m3] {
                for group in [None, Some(32), Some(64), Some(128)] {
                    if problem(1, 1, 1, codes, group).scheme.check().is_err() {
                        continue;
                    }
                    for m in [1, 3, 8, 16, 100] {
                        for (n, k) in SIZES.into_iter().flat_map(|n| SIZES.map(|k| (n, k))) {
                            let problem = problem(m, n, k, codes, group);
                            let c = choose(&problem, &device);
                            c.check(device.shared_per_block).expect("it was checked");
                            assert!(
                                u64::from(c.tokens) >= m.min(MOST)
                                    && n.is_multiple_of(c.unit.into())
                            );
                            assert!(u64::from(c.split) <= k.div_ceil(128));
                        }
                    }
                }
            }
        }
    }
}
