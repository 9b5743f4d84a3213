//! Which configuration a problem gets.

use super::Config;
use crate::kernel::attention::choose::{pack, splits};
use crate::kernel::attention::{Lengths, Problem, Variant};
use crate::kernel::{Device, Element};

/// Warps, m16 tiles of each, keys of a block, blocks of a multiprocessor, and whether queries stay in
/// registers: the first that fits is taken. Two m16 tiles halve what is read from shared memory for each
/// product, which is the bottleneck; 64 rows are for problems of few tiles.
const TILES: [(u32, u32, u32, u32, bool); 14] = [
    (4, 2, 64, 2, true),
    (4, 2, 64, 2, false),
    (4, 2, 32, 2, false),
    (8, 1, 64, 1, true),
    (8, 1, 64, 1, false),
    (8, 1, 32, 1, false),
    (4, 1, 64, 2, true),
    (4, 1, 64, 2, false),
    (4, 1, 64, 1, true),
    (4, 1, 64, 1, false),
    (4, 1, 32, 1, true),
    (4, 1, 32, 1, false),
    (4, 1, 16, 1, true),
    (4, 1, 16, 1, false),
];

/// The same for f32, whose products take six times as long as those of halves: reading is never the
/// bottleneck, registers are.
const F32_TILES: [(u32, u32, u32, u32, bool); 6] = [
    (8, 1, 64, 1, false),
    (8, 1, 32, 1, false),
    (4, 1, 64, 1, false),
    (4, 1, 32, 1, false),
    (4, 1, 16, 1, false),
    (2, 1, 16, 1, false),
];

/// The configuration for a problem. If it splits the keys, a kernel of
/// [`combine`](crate::kernel::attention::combine) follows.
pub fn choose(problem: &Problem, device: &Device) -> Config {
    // The lowest tiles that there are.
    let (tiles_of, lowest): (&[_], _) = match problem.element {
        Element::Half(_) => (&TILES, 64),
        Element::F32 => (&F32_TILES, 32),
    };
    // The sums of the widest f32 rows leave no registers for heads that differ from row to row.
    let wide = problem.element == Element::F32 && problem.value_dim > 192;
    let pack = if wide { 1 } else { pack(problem, lowest) };
    let sequences = match problem.lengths {
        Lengths::Full | Lengths::Padded => problem.batch,
        Lengths::Packed => 1,
    };
    let groups = problem.queries.div_ceil((64 / pack).into());
    let tiles = groups * problem.heads / u64::from(pack) * sequences;
    // Few tiles: smaller ones, so that more multiprocessors have one.
    let few = groups == 1 || tiles <= u64::from(device.multiprocessors) * 2;
    let variant = Variant::new(problem, pack, splits(problem, pack, 64, device));
    let element = problem.element;
    let config = |(warps, m16_tiles, keys, blocks_per_sm, q_in_regs)| Config {
        variant,
        element,
        warps,
        m16_tiles,
        keys,
        blocks_per_sm,
        q_in_regs,
    };
    tiles_of
        .iter()
        .copied()
        .map(config)
        .filter(|config| config.rows() <= 64 || !few)
        .find(|config| config.check(device.shared_per_block).is_ok())
        .expect("the small tiles fit every device")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::attention::choose::tests::causal;
    use crate::kernel::attention::sm80::Launch;
    use crate::kernel::attention::{Bias, ScoreMod};
    use crate::ptx::{Half, Target};

    const fn device(multiprocessors: u32, shared_per_block: u32) -> Device {
        Device { target: Target::Sm80, multiprocessors, shared_per_block }
    }
    const A100: Device = device(108, 166_912);
    const ADA: Device = device(128, 101_376);
    const H200: Device = device(132, 232_448);

    #[test]
    fn long_sequences_take_large_tiles() {
        for device in [A100, ADA, H200] {
            let tile = |dim| {
                let c = choose(&causal(4096, 4096, dim), &device);
                (c.rows(), c.keys, c.blocks_per_sm)
            };
            assert_eq!(tile(64), (128, 64, 2));
            assert_eq!(tile(128), if device == ADA { (128, 64, 1) } else { (128, 32, 2) });
        }
    }

    #[test]
    fn wide_heads_take_few_keys_where_memory_is_short() {
        let keys = |device| {
            let c = choose(&causal(4096, 4096, 256), device);
            (c.rows(), c.keys)
        };
        assert_eq!([keys(&A100), keys(&ADA)], [(128, 32), (64, 32)]);
    }

    #[test]
    fn tiles_of_f32() {
        let tile = |device, dim| {
            let p = causal(4096, 4096, dim);
            let c = choose(&Problem { element: Element::F32, out: Element::F32, ..p }, device);
            (c.rows(), c.keys)
        };
        assert_eq!([64, 128, 256].map(|dim| tile(&H200, dim)), [(128, 64), (128, 32), (64, 16)]);
        assert_eq!([64, 128, 256].map(|dim| tile(&ADA, dim)), [(128, 64), (64, 32), (32, 16)]);
    }

    #[test]
    fn one_token_packs_heads_and_splits_keys() {
        let one = Problem { batch: 1, ..causal(1, 8192, 128) };
        for device in [A100, ADA, H200] {
            let c = choose(&one, &device);
            assert_eq!(
                (c.rows(), c.variant.pack, c.variant.split, c.variant.out),
                (64, 4, true, Element::F32)
            );
            let launch = Launch::new(&c, &one, device.multiprocessors);
            assert_eq!(launch.order.tiles, 8 * launch.parts);
            assert!(launch.order.tiles >= device.multiprocessors * 3 / 4, "{launch:?}");
        }
    }

    #[test]
    fn every_choice_can_be_built() {
        let bias = |element| Some(Bias { element, pairs: false });
        let biases = [None, bias(Element::F32), bias(Element::Half(Half::F16))];
        for device in [A100, ADA, H200] {
            for dim in 1..=256 {
                for value_dim in [8, 64, 136, 256] {
                    for (queries, keys) in [(1, 1), (1, 4096), (70, 10_000), (4096, 4096)] {
                        for (lengths, bias) in [Lengths::Full, Lengths::Padded, Lengths::Packed]
                            .into_iter()
                            .zip(biases)
                        {
                            let score_mod = ScoreMod { bias, ..ScoreMod::default() };
                            let p = causal(queries, keys, dim);
                            let p = Problem { value_dim, lengths, score_mod, left: Some(9), ..p };
                            choose(&p, &device).check(device.shared_per_block).unwrap();
                            let p = Problem { element: Element::F32, out: Element::F32, ..p };
                            choose(&p, &device).check(device.shared_per_block).unwrap();
                        }
                    }
                }
            }
        }
    }
}
