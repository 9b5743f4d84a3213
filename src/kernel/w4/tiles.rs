//! Which tiles a product takes on Hopper: those of `Cᵀ` that have a weight of four bits as their left operand.

use super::Problem;
use crate::kernel::Device;
use crate::kernel::gemm::choose::{CLOCKS_PER_US, Shape, estimate};
use crate::kernel::gemm::sm90::{Config, Orient, TALL};

/// Columns of a tile, which are rows of `x`.
const WIDTHS: [u32; 10] = [16, 24, 32, 48, 64, 96, 128, 160, 192, 256];

/// The configuration with the least estimated time.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    let product = problem.products();
    candidates(problem, device)
        .into_iter()
        .map(|config| (estimate(&config, &product, device), config))
        .min_by(|a, b| a.0.total_cmp(&b.0))
        .expect("each problem has a candidate")
        .1
}

/// Estimated clocks of what is chosen, with its launch.
pub fn time(problem: &Problem, device: &Device) -> f64 {
    let config = choose(problem, device);
    CLOCKS_PER_US * estimate(&config, &problem.products(), device)
}

/// Those worth an estimate.
pub fn candidates(problem: &Problem, device: &Device) -> Vec<Config> {
    let (product, scheme) = (problem.products(), &problem.scheme);
    let whole = WIDTHS.iter().position(|&cols| u64::from(cols) >= problem.m);
    // All rows of `x` at once, or with as few tiles as there are in narrower ones.
    let (least, most) = match whole {
        Some(i) => (if i < 5 { i } else { 4 }, i),
        None => (6, WIDTHS.len() - 1),
    };
    let shape =
        |rows, cols| Shape { weights: Some(problem), ..Shape::new(Orient::Swapped, rows, cols) };
    let mut all = vec![];
    for &cols in &WIDTHS[least..=most] {
        for rows in [64, 128] {
            for split in [1, 2, 4, 8] {
                // Two blocks of three warpgroups have the registers for the fragments of two stages, and few sums; but not
                // those for groups' scales of bytes besides, and addresses of three weights.
                let full = scheme.codes.are_bytes() && scheme.group.is_some() && rows == 128;
                let few = cols <= 32 || (rows == 64 && cols <= 64);
                let blocks_per_sm = if few && !(full && problem.weights() > 2) { 2 } else { 1 };
                let split = Shape { split, blocks_per_sm, ..shape(rows, cols) };
                all.extend(split.config(&product, device));
            }
        }
        // Four warpgroups that decode have registers for so few sums. Those of bytes wait for memory, and not for each other.
        if cols <= 64 && !scheme.codes.are_bytes() {
            let tall = [shape(TALL, cols)];
            let teams = [1, 2].map(|split| Shape { split, teams: 2, ..shape(128, cols) });
            let both = tall.into_iter().chain(teams);
            all.extend(both.filter_map(|shape| shape.config(&product, device)));
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::Element;
    use crate::kernel::gemm::Epilogue;
    use crate::kernel::w4::{Codes, Scheme, stream};
    use crate::ptx::{Half, Target};

    /// An H200, and a slice of one.
    const DEVICES: [Device; 2] = [
        Device { target: Target::Sm90a, multiprocessors: 132, shared_per_block: 232_448 },
        Device { target: Target::Sm90a, multiprocessors: 16, shared_per_block: 232_448 },
    ];

    fn schemes() -> Vec<Scheme> {
        let kinds = [(Codes::Int4, false), (Codes::Int4, true), (Codes::Nf4, false)];
        let groups = [None, Some(32), Some(64), Some(128)];
        let scales = [Element::Half(Half::Bf16), Element::F32];
        let all = kinds.into_iter().flat_map(|kind| groups.map(|group| (kind, group)));
        let all = all.flat_map(|of| scales.map(|scale| (of, scale)));
        all.map(|(((codes, zeros), group), scale)| Scheme { codes, zeros, scale, group }).collect()
    }

    fn problem([m, n, k]: [u64; 3], scheme: Scheme) -> Problem {
        let epilogue = Epilogue::round(Element::Half(Half::Bf16));
        Problem { m, n, others: [0; 2], gated: false, k, half: Half::Bf16, scheme, epilogue }
    }

    #[test]
    fn every_problem_has_a_choice_that_can_be_built() {
        const SIZES: [u64; 6] = [1, 64, 100, 1024, 14_336, 128_256];
        const ROWS: [u64; 8] = [stream::MOST + 1, 24, 33, 64, 100, 256, 1000, 100_000];
        for device in DEVICES {
            for scheme in schemes() {
                for m in ROWS {
                    for (n, k) in SIZES.into_iter().flat_map(|n| SIZES.map(|k| (n, k))) {
                        let problem = problem([m, n, k], scheme);
                        let c = choose(&problem, &device);
                        c.check(device.shared_per_block).unwrap_or_else(|why| {
                            panic!("{m}x{n}x{k} {scheme:?} {}: {why}", c.name());
                        });
                        assert_eq!((c.weight, c.orient), (Some(scheme), Orient::Swapped));
                        assert!(u64::from(c.split) <= k.div_ceil(64), "{} of {k}", c.name());
                    }
                }
            }
        }
    }

    #[test]
    fn a_few_rows_are_one_column_of_tiles() {
        for scheme in schemes() {
            for m in [17, 24, 32, 48, 64] {
                let c = choose(&problem([m, 8192, 8192], scheme), &DEVICES[0]);
                assert!(u64::from(c.cols) >= m, "{m} rows: {}", c.name());
            }
        }
    }

    #[test]
    fn few_columns_are_split_and_prompts_are_not() {
        let scheme = schemes()[6];
        let c = choose(&problem([32, 1024, 8192], scheme), &DEVICES[0]);
        assert!(c.split > 1, "{}", c.name());
        let c = choose(&problem([8192, 8192, 8192], scheme), &DEVICES[0]);
        assert_eq!(c.split, 1, "{}", c.name());
    }
}
